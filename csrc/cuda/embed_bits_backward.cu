// embed_bits_backward: X^T grad, X the bits of all rows. The rows are split over blocks; their partial sums meet in a
// fixed order.
#include "cuda/mma.cuh"

namespace bldm::cuda {
namespace {

constexpr int kColumns = 64;  // of a block: eight fragments; its channels are one chunk of 32: two fragments
constexpr int kWarps = 4;

struct Arguments {
    const uint8_t* packed;
    int64_t rows;
    uint32_t channels, columns, row_bytes;
    float* partial;  // (splits, C, D)
};

int64_t splits_for(int64_t rows, int64_t channels, int64_t columns) {
    const int64_t tiles = ceil_div<int64_t>(channels, 32) * ceil_div<int64_t>(columns, kColumns);
    return std::clamp<int64_t>(ceil_div<int64_t>(kManyBlocks / 4, tiles), 1, ceil_div<int64_t>(rows, 16 * kWarps));
}

// A is X^T: its k are rows, of which this thread has 4 t to 4 t + 3 of every 16. B is grad: column g of fragment i is
// column 8 g + i of the tile, so that a thread reads 8 neighbouring columns.
template <class T, bool kSigned, bool kWords, bool kVector>
__global__ void __launch_bounds__(32 * kWarps)
    tensor_core_kernel(const T* __restrict__ grad, const __grid_constant__ Arguments a) {
    __shared__ float total[32][kColumns];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t chunk = blockIdx.x, first_column = blockIdx.y * kColumns, column = first_column + 8 * g;
    const int count = column < a.columns ? int(min(8u, a.columns - column)) : 0;
    float sum[2][8][4] = {};
    for (int64_t first = (int64_t(blockIdx.z) * kWarps + warp) * 16; first < a.rows;
         first += int64_t(gridDim.z) * kWarps * 16) {
        uint32_t bits[4], values[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t row = first + 4 * t + k;
            const bool inside = row < a.rows;
            bits[k] = inside ? load_chunk<kWords>(a.packed + row * a.row_bytes, chunk, a.row_bytes) << (7 - g) : 0;
            const T* from = grad + row * a.columns + column;
            if constexpr (kVector) {
                *reinterpret_cast<uint4*>(values[k]) =
                    inside && count ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint16_t* items = reinterpret_cast<const uint16_t*>(from) + 2 * j;
                    values[k][j] =
                        (inside && 2 * j < count ? items[0] : 0u) | (inside && 2 * j + 1 < count ? items[1] : 0u) << 16;
                }
            }
        }
        // Channel g + 8 u of a row is now the highest bit of byte u.
        uint32_t x[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int u = 2 * m + i % 2, k = i / 2 * 2;
                x[m][i] = expand<T, kSigned>(__byte_perm(bits[k], bits[k + 1], (4 + u) << 12 | u << 4));
            }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t pick = i % 2 ? 0x7632 : 0x5410;
            const uint32_t b0 = __byte_perm(values[0][i / 2], values[1][i / 2], pick);
            const uint32_t b1 = __byte_perm(values[2][i / 2], values[3][i / 2], pick);
#pragma unroll
            for (int m = 0; m < 2; ++m) mma<T>(sum[m][i], x[m], b0, b1);
        }
    }
    for (int w = 0; w < kWarps; ++w) {
        if (warp == w)
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 8; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float& cell = total[16 * m + g + 8 * (j / 2)][8 * (2 * t + j % 2) + i];
                        cell = w == 0 ? sum[m][i][j] : cell + sum[m][i][j];
                    }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 32 * kColumns; i += 32 * kWarps) {
        const uint32_t channel = chunk * 32 + i / kColumns, c = first_column + i % kColumns;
        if (channel < a.channels && c < a.columns)
            a.partial[(int64_t(blockIdx.z) * a.channels + channel) * a.columns + c] = total[i / kColumns][i % kColumns];
    }
}

// float32: one thread a column.
template <bool kSigned, bool kWords>
__global__ void __launch_bounds__(kColumns)
    float_kernel(const float* __restrict__ grad, const __grid_constant__ Arguments a) {
    const uint32_t chunk = blockIdx.x, column = blockIdx.y * kColumns + threadIdx.x;
    if (column >= a.columns) return;
    float sum[32] = {};
    for (int64_t row = blockIdx.z; row < a.rows; row += gridDim.z) {
        const float value = grad[row * a.columns + column];
        const uint32_t bits = load_chunk<kWords>(a.packed + row * a.row_bytes, chunk, a.row_bytes);
#pragma unroll
        for (int j = 0; j < 32; ++j) sum[j] += bits >> j & 1 ? value : kSigned ? -value : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 32; ++j)
        if (chunk * 32 + j < a.channels)
            a.partial[(int64_t(blockIdx.z) * a.channels + chunk * 32 + j) * a.columns + column] = sum[j];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits(const float* __restrict__ partial, int64_t size, int64_t splits, T* __restrict__ out) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += partial[s * size + i];
    out[i] = from_float<T>(sum);
}

}  // namespace

int64_t embed_bits_backward_scratch(int64_t rows, int64_t channels, int64_t columns) {
    return splits_for(rows, channels, columns) * channels * columns;
}

void embed_bits_backward(const void* grad, int64_t type, const uint8_t* packed, int64_t rows, int64_t channels,
                         int64_t columns, bool is_signed, float* scratch, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const uint32_t row_bytes = uint32_t(ceil_div<int64_t>(channels, 8));
    const Arguments a{packed, rows, uint32_t(channels), uint32_t(columns), row_bytes, scratch};
    const int64_t splits = splits_for(rows, channels, columns), size = channels * columns;
    const dim3 grid(unsigned(ceil_div<int64_t>(channels, 32)), unsigned(ceil_div<int64_t>(columns, kColumns)),
                    unsigned(splits));
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        const T* from = static_cast<const T*>(grad);
        with_flag(is_signed, [&](auto with_sign) {
            with_flag(row_bytes % 4 == 0 && aligned(packed, 4), [&](auto words) {
                if constexpr (std::is_same_v<T, float>)
                    float_kernel<with_sign.value, words.value><<<grid, kColumns, 0, stream>>>(from, a);
                else
                    with_flag(columns % 8 == 0 && aligned(grad, 16), [&](auto vector) {
                        tensor_core_kernel<T, with_sign.value, words.value, vector.value>
                            <<<grid, 32 * kWarps, 0, stream>>>(from, a);
                    });
            });
        });
        check(cudaGetLastError(), "embed_bits_backward");
        add_splits<<<unsigned(ceil_div<int64_t>(size, kThreads)), kThreads, 0, stream>>>(scratch, size, splits,
                                                                                         static_cast<T*>(out));
    });
    check(cudaGetLastError(), "embed_bits_backward");
}

}  // namespace bldm::cuda
