// The launches of product_kernel.cuh: which tiles for which sizes.
#include "cuda/product_kernel.cuh"
#include "cuda/tensor_map.cuh"

namespace bldm::cuda {

namespace {

using namespace products;

struct Tiling {
    int shape, rows, columns, parts;  // which of the shapes; of a tile; of a tile's moments
    int stage, read;                  // cycles of a stage's products, and of writing a tile
    int added, added_often;           // of adding it to the stream, as one of two at most of a block, and of more
    bool share_weights;

    // Of tiles of a cluster, in rows and in columns.
    int64_t row_groups(int64_t num_rows) const { return ceil_div<int64_t>(num_rows, rows * (share_weights ? kCluster : 1)); }
    int64_t column_groups(int64_t num_columns) const {
        return ceil_div<int64_t>(num_columns, columns * (share_weights ? 1 : kCluster));
    }
    int64_t units(int64_t num_rows, int64_t num_columns) const { return row_groups(num_rows) * column_groups(num_columns); }

    // Cycles of the slowest block: its stages take as long as their products or as what is fetched for them, at about 32 bytes a
    // cycle.
    int64_t cost(Kind kind, int64_t num_rows, int64_t num_columns, int64_t steps, int clusters) const {
        const int64_t fetched = kStageDepth * (share_weights ? rows + columns / kCluster : rows / kCluster + columns);
        const int64_t products = steps * std::max<int64_t>(stage, fetched / 32);
        const int64_t rounds = ceil_div<int64_t>(units(num_rows, num_columns), clusters);
        return rounds * (products + (kind != kAdd ? read : rounds > 2 ? added_often : added));
    }
};

// A stage takes as long as the tensor cores, or as its bytes at 128 a cycle, those that are copied to shared memory and those that
// products read there: shared memory itself is faster, but electrical power is what limits many tiles, and bytes cost power. Three
// warpgroups write faster than two. An estimate, whose constants are such that it takes the tiles that were the fastest, or within 1%
// of them, in steps of 8, 64, 128, 256 and 512 samples of the paper's model: from 256 on tiles of 192 columns, which ask for less of
// the stream ahead, made a step 4 to 6% longer.
template <class S>
Tiling tiling_of(int shape, bool share_weights) {
    const int multiplied = S::kRows / 64 * S::kColumns * 2, results = S::kRows * S::kColumns;
    const int read = S::kGroups * S::kBlocks * (64 + S::kWidth) * kStageDepth, copied = Shared<S>::kStageBytes;
    const int stage = std::max(multiplied, (read + copied) / 128), written = S::kGroups > 2 ? results * 3 / 20 : results * 4 / 25;
    const int added = results * 2 / 5, added_often = S::kColumns == Middle::kColumns ? results * 11 / 20 : added;
    return {shape, S::kRows, S::kColumns, S::kColumnGroups, stage, written, added, added_often, share_weights};
}

constexpr int kShapes = 3;

Tiling tiling_of(int shape, bool share_weights) {
    switch (shape) {
        case 0: return tiling_of<Large>(shape, share_weights);
        case 1: return tiling_of<Middle>(shape, share_weights);
        default: return tiling_of<Narrow>(shape, share_weights);
    }
}

Tiling best_tiling(Kind kind, int64_t rows, int64_t columns, int64_t steps, int clusters) {
    Tiling best{};
    int64_t least = INT64_MAX;
    for (int shape = 0; shape < kShapes; ++shape)
        for (const bool share_weights : {true, false}) {
            const Tiling tiling = tiling_of(shape, share_weights);
            const int64_t cycles = tiling.cost(kind, rows, columns, steps, clusters);
            if (cycles < least) least = cycles, best = tiling;
        }
    return best;
}

template <Kind kKind, bool kLow, class S>
void launch(Arguments& a, int clusters, bool early, cudaStream_t stream) {
    const auto chosen = kernel<kKind, kLow, S>;
    check(cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared<S>::kBytes), "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kCluster * std::min(a.units, clusters)), config.blockDim = dim3(S::kBlockThreads);
    config.dynamicSmemBytes = Shared<S>::kBytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early;
    check(cudaLaunchKernelEx(&config, chosen, a), "product");
}

struct Sizes {
    int64_t rows, columns, depth;  // of the result, of k
    bool low;

    int64_t bytes() const { return depth * (low ? 1 : 2); }  // of k
    Tiling tiling(Kind kind, int device) const {
        return best_tiling(kind, rows, columns, ceil_div<int64_t>(bytes(), kStageDepth), processors(device) / kCluster);
    }
};

// Fills in what follows from the sizes.
template <Kind kKind>
void launch(Arguments a, const void* rows, const void* weights, const Sizes& sizes, const Tiling& tiling, bool early, int device,
            cudaStream_t stream) {
    if (sizes.rows < 1 || sizes.rows > 1 << 26 || sizes.columns < 32 || sizes.columns % 32 || sizes.depth < 1 || sizes.bytes() % 16)
        throw std::invalid_argument("product: expected 1 to 2^26 rows, columns in multiples of 32, and k of multiples of 16 bytes");
    for (const void* tensor : {rows, weights, kKind == kAdd ? static_cast<const void*>(a.h) : a.out})
        if (!aligned(tensor, 16)) throw std::invalid_argument("product: expected memory at multiples of 16 bytes");
    const int rows_box = tiling.share_weights ? tiling.rows : tiling.rows / kCluster;
    const int weights_box = tiling.share_weights ? tiling.columns / kCluster : tiling.columns;
    a.rows = map_of(rows, sizes.low, 1, sizes.rows, sizes.depth, rows_box);
    a.weights = map_of(weights, sizes.low, 1, sizes.columns, sizes.depth, weights_box);
    a.num_rows = int(sizes.rows), a.num_columns = int(sizes.columns), a.depth = int(sizes.depth);
    a.steps = int(ceil_div<int64_t>(sizes.bytes(), kStageDepth));
    a.column_tiles = int(ceil_div<int64_t>(sizes.columns, tiling.columns));
    a.share_weights = tiling.share_weights, a.units = int(tiling.units(sizes.rows, sizes.columns));
    a.row_groups = int(tiling.row_groups(sizes.rows)), a.column_groups = int(tiling.column_groups(sizes.columns));
    const int clusters = processors(device) / kCluster;
    // In a single wave, neighbours with the same weights come from the cache up to 15% faster than those with the same rows; in
    // several, neighbours with the same rows take a little less electrical power.
    a.rows_first = a.units <= clusters;
    // What another kernel has written last is read first: it is still in the cache.
    a.backwards = kKind == kAdd;
    with_flag(sizes.low, [&](auto is_low) {
        switch (tiling.shape) {
            case 0: return launch<kKind, is_low, Large>(a, clusters, early, stream);
            case 1: return launch<kKind, is_low, Middle>(a, clusters, early, stream);
            default: return launch<kKind, is_low, Narrow>(a, clusters, early, stream);
        }
    });
}

}  // namespace

int64_t moments_parts(int64_t rows, int64_t columns, int64_t depth, bool low, int device) {
    const Tiling tiling = Sizes{rows, columns, depth, low}.tiling(kAdd, device);
    return ceil_div<int64_t>(columns, tiling.columns) * tiling.parts;
}

void read_stream(const void* stream, const void* weights, bool low, int64_t rows, int64_t columns, int64_t depth,
                 const float* stream_scale, const float* weight_scale, const float* bias, const float* moments, int64_t parts,
                 float eps, bool gelu, const float* out_scale, void* out, bool early, int device,
                 cudaStream_t cuda_stream) {
    const DeviceGuard guard(device);
    const Sizes sizes{rows, columns, depth, low};
    Arguments a{};
    a.input_scale = stream_scale, a.weight_scale = weight_scale, a.bias = bias;
    a.moments = reinterpret_cast<const float2*>(moments), a.parts = int(parts), a.eps = eps, a.out = out, a.out_scale = out_scale;
    const auto chosen = gelu ? launch<kReadGelu> : launch<kRead>;
    chosen(a, stream, weights, sizes, sizes.tiling(kRead, device), early, device, cuda_stream);
}

void add_to_stream(const void* x, const void* weights, bool low, int64_t rows, int64_t columns, int64_t depth,
                   const float* input_scale, const float* weight_scale, const float* bias, void* h, const float* stream_scale,
                   float* moments, uint8_t* stream, bool early, int device, cudaStream_t cuda_stream) {
    const DeviceGuard guard(device);
    const Sizes sizes{rows, columns, depth, low};
    Arguments a{};
    a.input_scale = input_scale, a.weight_scale = weight_scale, a.bias = bias, a.h = static_cast<__nv_bfloat16*>(h);
    a.stream_scale = stream_scale, a.new_moments = reinterpret_cast<float2*>(moments), a.stream = stream;
    launch<kAdd>(a, x, weights, sizes, sizes.tiling(kAdd, device), early, device, cuda_stream);
}

}  // namespace bldm::cuda
