// embed_bits_backward: X^T grad, X the bits of all rows. The rows are split over blocks; their partial sums meet in a
// fixed order.
#include "cuda/mma.cuh"

namespace bldm::cuda {
namespace {

constexpr int kChunks = 2;    // of a block: 64 channels, four fragments
constexpr int kWarps = 8;     // of a block, which share its rows, 32 at a time
constexpr int kStages = 4;    // of 16 rows: a warp's reads on their way
constexpr int kBlocks = 132;  // one a multiprocessor of an H100 or H200; fixed, as the order of the sum depends on it

template <class T>
constexpr int kColumns = 8 * kPer<T>;  // of a block: kPer fragments
template <class T>
constexpr int kTotalPitch = kColumns<T> + 1;
template <class T>
constexpr int kShared = kWarps* std::max(kStages * 2048, 32 * kChunks * kTotalPitch<T> * 4);

struct Arguments {
    const uint8_t* packed;
    int64_t rows;
    uint32_t channels, columns, row_bytes, chunks;
    BitValues values;
    float* partial;  // (splits, C, D)
};

int64_t splits_for(int64_t rows, int64_t channels, int64_t columns, int64_t block_columns) {
    const int64_t tiles = ceil_div<int64_t>(channels, 32 * kChunks) * ceil_div<int64_t>(columns, block_columns);
    return std::clamp<int64_t>(kBlocks / tiles, 1, ceil_div<int64_t>(rows, 32 * kWarps));
}

// Fragments of two k, which are rows with the words x and y, from fragment m = 2 chunk + half on: row g + 8 i of it is
// channel g + 8 (2 half + i) of the chunk, the highest bit of byte 2 half + i of the words.
template <int kHalf>
__device__ __forceinline__ void expand_channels(uint32_t x, uint32_t y, const BitValues& values, uint32_t (&to)[2]) {
    to[0] = expand<2 * kHalf, 4 + 2 * kHalf>(x, y, values);
    to[1] = expand<2 * kHalf + 1, 5 + 2 * kHalf>(x, y, values);
}

// B fragment i of two k, rows with the columns x and y. float32 gives its upper half and keeps the rest.
template <class T>
__device__ __forceinline__ uint32_t take_pair(uint32_t (&x)[4], uint32_t (&y)[4], int i) {
    if constexpr (sizeof(T) == 2) return __byte_perm(x[i / 2], y[i / 2], i % 2 ? 0x7632 : 0x5410);
    return take_upper_half(x[i]) >> 16 | take_upper_half(y[i]);
}

// A is X^T: its k are rows, of which this thread has 4 t to 4 t + 3 of every 16. B is grad: column g of fragment i is
// column kPer g + i of the block. A warp reads whole lines of grad, eight threads a row, into shared memory, 16 bytes i
// of row j at place i ^ j / 4 * 2, so that neither side meets a bank conflict.
template <class T, bool kWords, bool kVector>
__global__ void __launch_bounds__(32 * kWarps, 1)
    kernel(const T* __restrict__ grad, const __grid_constant__ Arguments a) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t first_chunk = blockIdx.x * kChunks, first_column = blockIdx.y * kColumns<T>,
                   column = first_column + kPer<T> * (lane % 8);
    uint4* ring = shared + warp * kStages * 128;
    const int64_t begin = (int64_t(blockIdx.z) * kWarps + warp) * 32, stride = int64_t(gridDim.z) * kWarps * 32;

    const auto fetch = [&](int64_t first, int stage) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t row = first + 4 * k + lane / 8;
            uint4* to = ring + (16 * stage + 4 * k + lane / 8) * 8 + (lane % 8 ^ 2 * k);
            const T* from = grad + row * a.columns + column;
            if constexpr (kVector) {
                const bool inside = row < a.rows && column < a.columns;
                copy_async(to, inside ? from : grad, inside ? 16 : 0);
            } else {
                T* item = reinterpret_cast<T*>(to);
#pragma unroll
                for (int j = 0; j < kPer<T>; ++j)
                    item[j] = row < a.rows && column + j < a.columns ? from[j] : from_float<T>(0);
            }
        }
        commit_async();
    };
    // Lane i has the bits of row i of 32.
    const auto load_bits = [&](int64_t first, uint32_t (&bits)[kChunks]) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
            bits[chunk] = load_chunk<kWords>(a.packed + min(first + lane, a.rows - 1) * a.row_bytes,
                                             min(first_chunk + chunk, a.chunks - 1), a.row_bytes);
    };

    float sum[2 * kChunks][kPer<T>][4] = {};
    uint32_t bits[kChunks], next[kChunks];
    load_bits(begin, bits);
    load_bits(begin + stride, next);
    static_assert(kStages == 4, "two steps of 32 rows");
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(begin + stage / 2 * stride + stage % 2 * 16, stage);
    int stage = 0;
    for (int64_t first = begin; first < a.rows; first += stride) {
        uint32_t after[kChunks];
        load_bits(first + 2 * stride, after);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            wait_async<kStages - 2>();
            __syncwarp();  // the copies of the others are here too, and what is overwritten now has been read
            fetch(first + (part ? 2 * stride : stride + 16), (stage + kStages - 1) % kStages);
            uint32_t values[4][4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                *reinterpret_cast<uint4*>(values[k]) = ring[(16 * stage + 4 * t + k) * 8 + (g ^ 2 * t)];
            stage = (stage + 1) % kStages;
            uint32_t x[2 * kChunks][2][2];
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const int from = 16 * part + 4 * t + 2 * pair;
                    const uint32_t upper = __shfl_sync(~0u, bits[chunk], from) << (7 - g),
                                   lower = __shfl_sync(~0u, bits[chunk], from + 1) << (7 - g);
                    expand_channels<0>(upper, lower, a.values, x[2 * chunk][pair]);
                    expand_channels<1>(upper, lower, a.values, x[2 * chunk + 1][pair]);
                }
#pragma unroll
            for (int i = 0; i < kPer<T>; ++i) {
                uint32_t b[kParts<T>][2];
#pragma unroll
                for (auto& pair : b)
                    pair[0] = take_pair<T>(values[0], values[1], i), pair[1] = take_pair<T>(values[2], values[3], i);
#pragma unroll
                for (int m = 0; m < 2 * kChunks; ++m) {
                    // The tensor cores' own sums are truncated, which float32 does not bear for many rows.
                    constexpr bool kFresh = sizeof(T) == 4;
                    float fresh[4] = {};
                    float(&to)[4] = kFresh ? fresh : sum[m][i];
#pragma unroll
                    for (const auto& pair : b)
                        mma<Half<T>>(to, {x[m][0][0], x[m][0][1], x[m][1][0], x[m][1][1]}, pair[0], pair[1], to);
                    if constexpr (kFresh)
#pragma unroll
                        for (int j = 0; j < 4; ++j) sum[m][i][j] += fresh[j];
                }
            }
        }
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) bits[chunk] = next[chunk], next[chunk] = after[chunk];
    }
    wait_async<0>();
    __syncthreads();

    float* total = reinterpret_cast<float*>(shared);  // (warps, channels, pitch)
    constexpr int kTotal = 32 * kChunks * kTotalPitch<T>;
#pragma unroll
    for (int m = 0; m < 2 * kChunks; ++m)
#pragma unroll
        for (int i = 0; i < kPer<T>; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                total[warp * kTotal + (16 * m + g + 8 * (j / 2)) * kTotalPitch<T> + kPer<T> * (2 * t + j % 2) + i] =
                    sum[m][i][j];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * kChunks * kColumns<T>; i += 32 * kWarps) {
        const uint32_t c = i / kColumns<T>, d = i % kColumns<T>, channel = 32 * first_chunk + c;
        float result = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) result += total[w * kTotal + c * kTotalPitch<T> + d];
        if (channel < a.channels && first_column + d < a.columns)
            a.partial[(int64_t(blockIdx.z) * a.channels + channel) * a.columns + first_column + d] = result;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits(const float* __restrict__ partial, int64_t size, int64_t splits, T* __restrict__ out) {
    constexpr int kAtOnce = 12;
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
    for (int64_t s = 0; s < splits; s += kAtOnce) {
        float value[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) value[j] = s + j < splits ? partial[(s + j) * size + i] : 0.0f;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sum += value[j];
    }
    out[i] = from_float<T>(sum);
}

}  // namespace

// Half precision has the wider blocks, so the most splits.
int64_t embed_bits_backward_scratch(int64_t rows, int64_t channels, int64_t columns) {
    return splits_for(rows, channels, columns, kColumns<__half>) * channels * columns;
}

void embed_bits_backward(const void* grad, int64_t type, const uint8_t* packed, int64_t rows, int64_t channels,
                         int64_t columns, bool is_signed, float* scratch, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const uint32_t row_bytes = uint32_t(ceil_div<int64_t>(channels, 8)),
                   chunks = uint32_t(ceil_div<int64_t>(channels, 32));
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        const T* from = static_cast<const T*>(grad);
        const Arguments a{packed,    rows,   uint32_t(channels),                uint32_t(columns),
                          row_bytes, chunks, BitValues::of<Half<T>>(is_signed), scratch};
        const int64_t splits = splits_for(rows, channels, columns, kColumns<T>), size = channels * columns;
        const dim3 grid(unsigned(ceil_div<int64_t>(channels, 32 * kChunks)),
                        unsigned(ceil_div<int64_t>(columns, kColumns<T>)), unsigned(splits));
        with_flag(row_bytes % 4 == 0 && aligned(packed, 4), [&](auto words) {
            with_flag(columns % kPer<T> == 0 && aligned(grad, 16), [&](auto vector) {
                const auto run = kernel<T, words.value, vector.value>;
                check(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared<T>),
                      "embed_bits_backward");
                run<<<grid, 32 * kWarps, kShared<T>, stream>>>(from, a);
            });
        });
        check(cudaGetLastError(), "embed_bits_backward");
        add_splits<<<unsigned(ceil_div<int64_t>(size, kThreads)), kThreads, 0, stream>>>(scratch, size, splits,
                                                                                         static_cast<T*>(out));
    });
    check(cudaGetLastError(), "embed_bits_backward");
}

}  // namespace bldm::cuda
