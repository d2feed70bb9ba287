// embed_bits: a product of packed bits and a matrix. The bits are expanded in registers, in front of the tensor cores,
// and multiplied as out^T = weight^T X^T: a warp has 128 bytes of columns, which it writes as whole lines.
#include "cuda/mma.cuh"

namespace bldm::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kHeldChunks = 2;                   // of 32 channels, whose weights a warp can keep in registers
constexpr int kHeldGroups = 4, kReadGroups = 8;  // of 8 rows, that a warp works on at a time
constexpr int kAhead = 2;                        // times as many rows whose bits are on their way
template <class T, bool kHeld>
constexpr int kBlocks = !kHeld ? 2 : sizeof(T) == 4 ? 3 : 4;  // that share a multiprocessor

template <class T>
constexpr int kTiles = kPer<T> / 2;  // fragments of 16 columns

struct Arguments {
    const uint8_t* packed;
    int64_t rows;
    uint32_t channels, columns, row_bytes, chunks;
    BitValues values;
};

// 16 bytes of a row, or of none; 0 outside. kVector: columns come in groups of 16 aligned bytes, in all operands.
template <bool kVector, class T>
__device__ __forceinline__ void load_columns(const T* row, bool exists, uint32_t column, uint32_t columns,
                                             uint32_t (&to)[4]) {
    if constexpr (kVector) {
        *reinterpret_cast<uint4*>(to) = exists && column < columns ? __ldg(reinterpret_cast<const uint4*>(row + column))
                                                                   : make_uint4(0, 0, 0, 0);
    } else {
        T* item = reinterpret_cast<T*>(to);
#pragma unroll
        for (int j = 0; j < kPer<T>; ++j)
            item[j] = exists && column + j < columns ? row[column + j] : from_float<T>(0);
    }
}

// The weights of 16 channels as A fragments. Row g + 8 h of fragment i is this thread's column 2 i + h. The pairs of k
// are channels c and c + 8 of a chunk, c = 16 p + 7 - 2 t - step: the highest bits of bytes 2 p and 2 p + 1 of the
// chunk's bits shifted left by 2 t + step.
template <class T>
using Fragments = uint32_t[kParts<T>][kTiles<T>][4];

template <bool kVector, class T>
__device__ __forceinline__ void load_fragments(const T* weight, const Arguments& a, uint32_t column, uint32_t chunk,
                                               int step, int t, Fragments<T>& to) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        alignas(16) uint32_t raw[2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const uint32_t channel = 32 * chunk + 16 * p + 8 * k + 7 - 2 * t - step;
            load_columns<kVector>(weight + int64_t(channel) * a.columns, channel < a.channels, column, a.columns,
                                  raw[k]);
        }
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part)
#pragma unroll
            for (int j = 0; j < kPer<T>; ++j)
                if constexpr (sizeof(T) == 2)
                    to[part][j / 2][2 * p + j % 2] = __byte_perm(raw[0][j / 2], raw[1][j / 2], j % 2 ? 0x7632 : 0x5410);
                else
                    to[part][j / 2][2 * p + j % 2] = take_upper_half(raw[0][j]) >> 16 | take_upper_half(raw[1][j]);
    }
}

// sum += weights * bits of a chunk. The tensor cores' own sums are truncated, which float32 bears for a few of them
// only: kFresh adds to `sum` outside of them.
template <bool kFresh, class T>
__device__ __forceinline__ void multiply(const Fragments<T>& weights, uint32_t bits, const BitValues& values,
                                         float (&sum)[kTiles<T>][4]) {
    const uint32_t b0 = expand<0, 1>(bits, bits, values), b1 = expand<2, 3>(bits, bits, values);
#pragma unroll
    for (int i = 0; i < kTiles<T>; ++i) {
        float fresh[4] = {};
        float(&to)[4] = kFresh ? fresh : sum[i];
#pragma unroll
        for (int part = kParts<T> - 1; part >= 0; --part) mma<Half<T>>(to, weights[part][i], b0, b1, to);
        if constexpr (kFresh)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] += fresh[j];
    }
}

// Block x has its columns, block y and the warp go through the rows, 8 kGroups at a time. kHeld: at most kHeldChunks
// chunks; otherwise the weights are read again for every 8 kGroups rows.
template <class T, bool kHeld, bool kWords, bool kVector>
__global__ void __launch_bounds__(32 * kWarps, kBlocks<T, kHeld>)
    kernel(const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ out,
           const __grid_constant__ Arguments a) {
    constexpr int kGroups = kHeld ? kHeldGroups : kReadGroups, kSlots = kGroups / 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t column = (blockIdx.x * 8 + g) * kPer<T>;
    const int64_t stride = int64_t(gridDim.y) * kWarps * 8 * kGroups;
    int64_t row = (int64_t(blockIdx.y) * kWarps + warp) * 8 * kGroups;

    // Lane i loads the bits of rows i and, where there are so many, 32 + i.
    const auto load_bits = [&](int64_t first, uint32_t chunk, uint32_t (&bits)[kSlots]) {
#pragma unroll
        for (int k = 0; k < kSlots; ++k) {
            const int64_t mine = min(first + 32 * k + lane, a.rows - 1);
            bits[k] = load_chunk<kWords>(a.packed + mine * a.row_bytes, chunk, a.row_bytes);
        }
    };
    // Column n = 2 t + r of a B fragment and of the result is row 4 r + t of 8: a warp writes four rows at a time.
    const auto bits_of_group = [&](const uint32_t (&bits)[kSlots], int n) {
        return __shfl_sync(~0u, bits[n / 4], 8 * (n % 4) + 4 * (g % 2) + g / 2) << 2 * t;
    };

    alignas(16) uint32_t raw_start[4];
    load_columns<kVector>(bias, bias != nullptr, column, a.columns, raw_start);
    uint32_t queue[kAhead][kHeldChunks][kSlots];  // kHeld: the bits of the next rows
    Fragments<T> held[kHeldChunks][2];
    if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
#pragma unroll
            for (int chunk = 0; chunk < kHeldChunks; ++chunk)
                load_bits(row + i * stride, min(chunk, a.chunks - 1), queue[i][chunk]);
#pragma unroll
        for (int chunk = 0; chunk < kHeldChunks; ++chunk)
#pragma unroll
            for (int step = 0; step < 2; ++step)
                load_fragments<kVector>(weight, a, column, chunk, step, t, held[chunk][step]);
    }
    float start[kPer<T>];
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) start[j] = element<T>(raw_start, j);

    const auto begin = [&](float (&sum)[kTiles<T>][4]) {
#pragma unroll
        for (int i = 0; i < kTiles<T>; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] = start[2 * i + j / 2];
    };
    const auto finish = [&](const float (&sum)[kTiles<T>][4], int64_t first) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            alignas(16) T item[kPer<T>];
#pragma unroll
            for (int j = 0; j < kPer<T>; ++j) item[j] = from_float<T>(sum[j / 2][2 * (j % 2) + r]);
            const int64_t to_row = first + 4 * r + t;
            T* to = out + to_row * a.columns + column;
            if constexpr (kVector) {
                if (to_row < a.rows && column < a.columns)
                    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(item);
            } else {
#pragma unroll
                for (int j = 0; j < kPer<T>; ++j)
                    if (to_row < a.rows && column + j < a.columns) to[j] = item[j];
            }
        }
    };

    for (; row < a.rows; row += stride) {
        if constexpr (kHeld) {
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
                float sum[kTiles<T>][4];
                begin(sum);
#pragma unroll
                for (int chunk = 0; chunk < kHeldChunks; ++chunk) {
                    const uint32_t bits = bits_of_group(queue[0][chunk], n);
#pragma unroll
                    for (int step = 0; step < 2; ++step)
                        multiply<false, T>(held[chunk][step], bits << step, a.values, sum);
                }
                finish(sum, row + 8 * n);
            }
#pragma unroll
            for (int chunk = 0; chunk < kHeldChunks; ++chunk) {
#pragma unroll
                for (int i = 1; i < kAhead; ++i)
#pragma unroll
                    for (int k = 0; k < kSlots; ++k) queue[i - 1][chunk][k] = queue[i][chunk][k];
                load_bits(row + kAhead * stride, min(chunk, a.chunks - 1), queue[kAhead - 1][chunk]);
            }
        } else {
            float sum[kGroups][kTiles<T>][4];
#pragma unroll
            for (int n = 0; n < kGroups; ++n) begin(sum[n]);
            for (uint32_t chunk = 0; chunk < a.chunks; ++chunk) {
                uint32_t bits[kSlots];
                load_bits(row, chunk, bits);
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    Fragments<T> weights;
                    load_fragments<kVector>(weight, a, column, chunk, step, t, weights);
#pragma unroll
                    for (int n = 0; n < kGroups; ++n)
                        multiply<sizeof(T) == 4, T>(weights, bits_of_group(bits, n) << step, a.values, sum[n]);
                }
            }
#pragma unroll
            for (int n = 0; n < kGroups; ++n) finish(sum[n], row + 8 * n);
        }
    }
}

}  // namespace

void embed_bits(const uint8_t* packed, const void* weight, int64_t type, const void* bias, int64_t rows,
                int64_t channels, int64_t columns, bool is_signed, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const uint32_t row_bytes = uint32_t(ceil_div<int64_t>(channels, 8)),
                   chunks = uint32_t(ceil_div<int64_t>(channels, 32));
    with_float_type(type, [&](auto item) {
        using T = decltype(item);
        const Arguments a{packed,    rows,   uint32_t(channels),                uint32_t(columns),
                          row_bytes, chunks, BitValues::of<Half<T>>(is_signed)};
        const auto run = [&](auto held, auto words, auto vector) {
            // As many blocks as run at a time, so that the weights, read once a warp, serve many rows.
            constexpr int kGroups = held.value ? kHeldGroups : kReadGroups;
            const int64_t row_blocks = ceil_div<int64_t>(rows, 8 * kGroups * kWarps),
                          column_blocks = ceil_div<int64_t>(columns, 8 * kPer<T>),
                          blocks = int64_t(processors(device)) * kBlocks<T, held.value>;
            const dim3 grid(unsigned(column_blocks),
                            unsigned(std::clamp<int64_t>(blocks / column_blocks, 1, row_blocks)));
            kernel<T, held.value, words.value, vector.value><<<grid, 32 * kWarps, 0, stream>>>(
                static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(out), a);
        };
        with_flag(chunks <= kHeldChunks, [&](auto held) {
            with_flag(row_bytes % 4 == 0 && aligned(packed, 4), [&](auto words) {
                with_flag(columns % kPer<T> == 0 && aligned(weight, 16) && aligned(bias, 16) && aligned(out, 16),
                          [&](auto vector) { run(held, words, vector); });
            });
        });
    });
    check(cudaGetLastError(), "embed_bits");
}

}  // namespace bldm::cuda
