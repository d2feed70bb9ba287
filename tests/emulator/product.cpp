// product_kernel.cuh on the emulated machine; `run` returns "" or what went wrong.
#include "cuda/product_kernel.cuh"

#include <tuple>
#include <utility>

namespace {

using namespace bldm::cuda;
using namespace bldm::cuda::products;

using Shapes = std::tuple<Large, Middle, Narrow>;

// f of the shape of this number.
template <class F, size_t... kIndices>
void with_shape(int shape, F f, std::index_sequence<kIndices...>) {
    ((size_t(shape) == kIndices ? f(std::tuple_element_t<kIndices, Shapes>{}) : void()), ...);
}
template <class F>
void with_shape(int shape, F f) {
    with_shape(shape, f, std::make_index_sequence<std::tuple_size_v<Shapes>>{});
}

template <class S>
void (*chosen(int kind, bool low))(Arguments) {
    static constexpr void (*kKernels[])(Arguments) = {kernel<kRead, false, S>, kernel<kReadGelu, false, S>, kernel<kAdd, false, S>,
                                                      kernel<kRead, true, S>,  kernel<kReadGelu, true, S>,  kernel<kAdd, true, S>};
    return kKernels[3 * low + kind];
}

}  // namespace

// As in the tests.
struct Launch {
    const void *rows, *weights;
    const float *input_scale, *weight_scale, *bias, *moments, *out_scale, *stream_scale;
    void *out, *h;
    float* new_moments;
    uint8_t* stream;
    long num_rows, num_columns, depth, parts;
    int kind, low, shape, share_weights, clusters, rows_first;  // clusters: as many at most
    unsigned seed;
    float eps;
};

// Rows and columns of a tile, and the columns of a part of the moments.
extern "C" void sizes(int shape, int* to) {
    with_shape(shape, [&](auto s) { to[0] = s.kRows, to[1] = s.kColumns, to[2] = s.kWidth; });
}

extern "C" const char* run(const Launch* launch) {
    const Launch& l = *launch;
    static std::string error;
    error.clear();
    with_shape(l.shape, [&](auto shape) {
        using S = decltype(shape);
        const int bytes = l.low ? 1 : 2;
        const auto ceil_div = [](long a, long b) { return int((a + b - 1) / b); };
        Arguments a{};
        const auto part_of = [](int tile, bool shared) { return shared ? tile / kCluster : tile; };
        const int row_tiles = ceil_div(l.num_rows, S::kRows), column_tiles = ceil_div(l.num_columns, S::kColumns);
        a.rows = {l.rows, {int(l.depth), int(l.num_rows), 1}, part_of(S::kRows, !l.share_weights), bytes};
        a.weights = {l.weights, {int(l.depth), int(l.num_columns), 1}, part_of(S::kColumns, l.share_weights), bytes};
        a.num_rows = int(l.num_rows), a.num_columns = int(l.num_columns), a.steps = ceil_div(l.depth * bytes, kStageDepth);
        a.column_tiles = column_tiles, a.share_weights = l.share_weights;
        a.row_groups = l.share_weights ? ceil_div(row_tiles, kCluster) : row_tiles;
        a.column_groups = l.share_weights ? column_tiles : ceil_div(column_tiles, kCluster);
        a.units = a.row_groups * a.column_groups, a.rows_first = l.rows_first, a.backwards = l.kind == kAdd;
        a.input_scale = l.input_scale, a.weight_scale = l.weight_scale;
        a.bias = l.bias, a.moments = reinterpret_cast<const float2*>(l.moments);
        a.parts = int(l.parts), a.depth = int(l.depth), a.eps = l.eps, a.out = l.out, a.out_scale = l.out_scale;
        a.h = static_cast<__nv_bfloat16*>(l.h), a.stream_scale = l.stream_scale;
        a.new_moments = reinterpret_cast<float2*>(l.new_moments), a.stream = l.stream;
        const auto kernel = chosen<S>(l.kind, l.low);
        const int grid = kCluster * std::min(a.units, l.clusters);
        try {
            emulator::launch(grid, S::kBlockThreads, kCluster, Shared<S>::kBytes, l.seed, [kernel, a] { kernel(a); });
        } catch (const std::exception& e) {
            error = e.what();
        }
    });
    return error.c_str();
}
