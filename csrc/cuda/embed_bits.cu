// embed_bits: a product of packed bits and a matrix. The bits are expanded in registers, in front of the tensor cores.
#include "cuda/mma.cuh"

namespace bldm::cuda {
namespace {

constexpr int kColumns = 32;  // of a warp's tile: four fragments
constexpr int kWarps = 4;
constexpr int kMaxSharedChunks = 24;  // 2 KiB of fragments a chunk: as much as a block gets without asking

struct Arguments {
    const uint8_t* packed;
    int64_t rows;
    uint32_t channels, columns, row_bytes, chunks;
};

// B fragment of 16 channels: result column (g / 2) 8 + 2 tile + g % 2 of the tile is column g of fragment `tile`, so
// that a thread's results are 8 neighbouring columns. The pairs of k are channels j and j + 16 of a chunk, j = 4 t + 2
// half_chunk + half: one shift brings both bits of a pair to where `expand` wants them.
template <class T>
__device__ __forceinline__ uint2 weight_fragment(const T* weight, const Arguments& a, uint32_t first_column,
                                                 uint32_t chunk, int half_chunk, int tile, int lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t column = first_column + (g / 2) * 8 + 2 * tile + g % 2;
    uint32_t pair[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t channel = chunk * 32 + 4 * t + 2 * half_chunk + half;
        uint32_t item[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const bool inside = channel + 16 * k < a.channels && column < a.columns;
            item[k] =
                inside ? reinterpret_cast<const uint16_t*>(weight)[int64_t(channel + 16 * k) * a.columns + column] : 0;
        }
        pair[half] = item[0] | item[1] << 16;
    }
    return make_uint2(pair[0], pair[1]);
}

// Block x has its 32 columns, block y and the warp go through the rows, 16 at a time. kShared: the columns' weights are
// kept in shared memory, in the order of fragments; otherwise (more than 768 channels) they are read again for every 16
// rows.
template <class T, bool kSigned, bool kWords, bool kShared>
__global__ void __launch_bounds__(32 * kWarps, 4)
    tensor_core_kernel(const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ out, bool vector_store,
                       const __grid_constant__ Arguments a) {
    extern __shared__ uint2 fragments[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t first_column = blockIdx.x * kColumns;
    if constexpr (kShared) {
        for (uint32_t f = warp; f < a.chunks * 8; f += kWarps)
            fragments[f * 32 + lane] = weight_fragment(weight, a, first_column, f / 8, f / 4 % 2, f % 4, lane);
        __syncthreads();
    }
    const uint32_t column = first_column + 8 * t;  // this thread's 8 results a row
    float start[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) start[j] = bias && column + j < a.columns ? to_float(bias[column + j]) : 0.0f;

    for (int64_t row = (int64_t(blockIdx.y) * kWarps + warp) * 16; row < a.rows;
         row += int64_t(gridDim.y) * kWarps * 16) {
        float sum[4][4];
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[tile][j] = start[2 * tile + j % 2];
        const int64_t upper = min(row + g, a.rows - 1), lower = min(row + g + 8, a.rows - 1);
        for (uint32_t chunk = 0; chunk < a.chunks; ++chunk) {
            const uint32_t bits[2] = {
                load_chunk<kWords>(a.packed + upper * a.row_bytes, chunk, a.row_bytes) << (12 - 4 * t),
                load_chunk<kWords>(a.packed + lower * a.row_bytes, chunk, a.row_bytes) << (12 - 4 * t)};
#pragma unroll(kShared ? 2 : 1)
            for (int half_chunk = 0; half_chunk < 2; ++half_chunk) {
                uint32_t x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = expand<T, kSigned>(bits[i % 2] << (3 - 2 * half_chunk - i / 2));
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    const uint2 w = kShared ? fragments[((chunk * 2 + half_chunk) * 4 + tile) * 32 + lane]
                                            : weight_fragment(weight, a, first_column, chunk, half_chunk, tile, lane);
                    mma<T>(sum[tile], x, w.x, w.y);
                }
            }
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            if (row + g + 8 * part >= a.rows || column >= a.columns) continue;
            T* to = out + (row + g + 8 * part) * a.columns + column;
            float values[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = sum[j / 2][2 * part + j % 2];
            if (vector_store)
                write<true>(to, 8, values);
            else
                write<false>(to, int(min(8u, a.columns - column)), values);
        }
    }
}

// float32: one thread a column, 8 rows at a time, so that a weight is read once for 8 sums.
template <bool kSigned, bool kWords>
__global__ void __launch_bounds__(128) float_kernel(const float* __restrict__ weight, const float* __restrict__ bias,
                                                    float* __restrict__ out, const __grid_constant__ Arguments a) {
    constexpr int kRows = 8;
    const uint32_t column = blockIdx.x * 128 + threadIdx.x;
    if (column >= a.columns) return;
    const float start = bias ? bias[column] : 0.0f;
    for (int64_t row = int64_t(blockIdx.y) * kRows; row < a.rows; row += int64_t(gridDim.y) * kRows) {
        float sum[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = start;
        for (uint32_t chunk = 0; chunk < a.chunks; ++chunk) {
            uint32_t bits[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                bits[r] = load_chunk<kWords>(a.packed + min(row + r, a.rows - 1) * a.row_bytes, chunk, a.row_bytes);
            const uint32_t count = min(32u, a.channels - 32 * chunk);
            for (uint32_t j = 0; j < count; ++j) {
                const float w = weight[int64_t(32 * chunk + j) * a.columns + column];
#pragma unroll
                for (int r = 0; r < kRows; ++r) sum[r] += bits[r] >> j & 1 ? w : kSigned ? -w : 0.0f;
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (row + r < a.rows) out[(row + r) * a.columns + column] = sum[r];
    }
}

}  // namespace

void embed_bits(const uint8_t* packed, const void* weight, int64_t type, const void* bias, int64_t rows,
                int64_t channels, int64_t columns, bool is_signed, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const uint32_t row_bytes = uint32_t(ceil_div<int64_t>(channels, 8)),
                   chunks = uint32_t(ceil_div<int64_t>(channels, 32));
    const Arguments a{packed, rows, uint32_t(channels), uint32_t(columns), row_bytes, chunks};
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        const T *w = static_cast<const T*>(weight), *b = static_cast<const T*>(bias);
        T* to = static_cast<T*>(out);
        with_flag(is_signed, [&](auto with_sign) {
            with_flag(row_bytes % 4 == 0 && aligned(packed, 4), [&](auto words) {
                if constexpr (std::is_same_v<T, float>) {
                    const dim3 grid(unsigned(ceil_div<int64_t>(columns, 128)),
                                    unsigned(std::min<int64_t>(ceil_div<int64_t>(rows, 8), 65535)));
                    float_kernel<with_sign.value, words.value><<<grid, 128, 0, stream>>>(w, b, to, a);
                } else {
                    // Few enough blocks that the weights, read once a block, serve many rows.
                    const int64_t tiles = ceil_div<int64_t>(columns, kColumns);
                    const dim3 grid(unsigned(tiles),
                                    unsigned(std::clamp<int64_t>(ceil_div<int64_t>(rows, 16 * kWarps), 1,
                                                                 ceil_div<int64_t>(kManyBlocks, tiles))));
                    const bool vector = columns % 8 == 0 && aligned(out, 16);
                    with_flag(chunks <= kMaxSharedChunks, [&](auto shared) {
                        tensor_core_kernel<T, with_sign.value, words.value, shared.value>
                            <<<grid, 32 * kWarps, shared.value ? chunks * 2048 : 0, stream>>>(w, b, to, vector, a);
                    });
                }
            });
        });
    });
    check(cudaGetLastError(), "embed_bits");
}

}  // namespace bldm::cuda
