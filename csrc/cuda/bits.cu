// pack_bits, unpack_bits.
#include "cuda/columns.cuh"

namespace bldm::cuda {
namespace {

// Items of 1, 2, 4 or 8 bytes, told apart only by what is not zero.
template <class F>
void with_item_type(int64_t item_bytes, F&& f) {
    switch (item_bytes) {
        case 1:
            return f(uint8_t{});
        case 2:
            return f(uint16_t{});
        case 4:
            return f(uint32_t{});
        case 8:
            return f(uint64_t{});
        default:
            throw std::invalid_argument("items must have 1, 2, 4 or 8 bytes");
    }
}

// Where packed byte `index` of (outer, inner, P) is found in (outer, C, inner): threads run along the inner dimension,
// so that neighbours read neighbours.
struct Place {
    int64_t packed, item;  // of the byte, and of its first channel
    int count;             // channels in the byte

    __device__ __forceinline__ Place(int64_t index, uint32_t channels, uint32_t inner) {
        const uint32_t row_bytes = (channels + 7) / 8;
        const int64_t row = divide(index, inner);  // of (outer, P)
        const int64_t outer = divide(row, row_bytes);
        const uint32_t within = uint32_t(index - row * inner), byte = uint32_t(row - outer * row_bytes);
        packed = (outer * inner + within) * row_bytes + byte;
        item = (outer * channels + 8 * byte) * inner + within;
        count = int(min(8u, channels - 8 * byte));
    }
};

// What a thread moves at a time is 16 bytes, so that a warp moves 512 contiguous ones: this many items.
template <class U>
constexpr int kVector = 16 / sizeof(U);

// The eight items of one packed byte.
template <class U>
struct alignas(sizeof(U) == 1 ? 8 : 16) Words {
    uint32_t word[2 * sizeof(U)];
};

// Bits 7, 15, 23 and 31 next to each other: the product moves them to bits 28 to 31, and nothing else gets there.
__device__ __forceinline__ uint32_t gather(uint32_t bits) { return (bits & 0x80808080u) * 0x00204081u >> 28; }

// Bit j: item j is not zero. Of every word, or of the upper word of 8-byte items, only the bits of `mask` count.
template <class U>
__device__ __forceinline__ uint32_t nonzero(const Words<U>& items, uint32_t mask) {
    uint32_t bits = 0;
    if constexpr (sizeof(U) == 1) {
        // Adding 0x7F to a byte without its upper bit sets that bit unless the byte was 0, and never overflows into the
        // next.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t w = items.word[i];
            bits |= gather(((w & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | w) << (4 * i);
        }
    } else if constexpr (sizeof(U) == 2) {
        uint32_t upper[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t w = items.word[i];
            upper[i] = ((w & 0x7FFF7FFFu) + 0x7FFF7FFFu) | (w & mask);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) bits |= gather(__byte_perm(upper[2 * i], upper[2 * i + 1], 0x7531)) << (4 * i);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint32_t w =
                sizeof(U) == 4 ? items.word[j] & mask : items.word[2 * j] | (items.word[2 * j + 1] & mask);
            bits |= uint32_t(w != 0) << j;
        }
    }
    return bits;
}

// C % 8 == 0 and inner == 1: byte i is made of items 8 i to 8 i + 7, whatever the shape.
template <class U>
__global__ void __launch_bounds__(kThreads)
    pack_flat(const Words<U>* __restrict__ x, uint32_t mask, int64_t bytes, uint8_t* __restrict__ out) {
    constexpr int kTurns = sizeof(U) == 8 ? 2 : 4;  // loads in flight
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x; first < bytes; first += kTurns * stride) {
        Words<U> items[kTurns];
#pragma unroll
        for (int t = 0; t < kTurns; ++t)
            if (first + t * stride < bytes) items[t] = x[first + t * stride];
#pragma unroll
        for (int t = 0; t < kTurns; ++t)
            if (first + t * stride < bytes) out[first + t * stride] = uint8_t(nonzero(items[t], mask));
    }
}

template <class U>
__global__ void __launch_bounds__(kThreads) pack_any(const U* __restrict__ x, U value_mask, int64_t bytes,
                                                     uint32_t channels, uint32_t inner, uint8_t* __restrict__ out) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) {
        const Place place(i, channels, inner);
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < place.count) bits |= uint32_t((x[place.item + int64_t(j) * inner] & value_mask) != 0) << j;
        out[place.packed] = uint8_t(bits);
    }
}

// Adds which of kVector items are not zero, as bit j of a byte each.
template <class U>
__device__ __forceinline__ void add_nonzero(const uint4& items, uint32_t mask, int j, uint32_t (&bytes)[4]) {
    const uint32_t words[4] = {items.x, items.y, items.z, items.w};
    constexpr uint32_t kUpper = sizeof(U) == 1 ? 0x80808080u : 0x80008000u;
    uint32_t upper[4];  // sizes 1 and 2: the upper bit of an item, see nonzero()
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t w = words[i];
        if constexpr (sizeof(U) <= 2) upper[i] = ((w & ~kUpper) + ~kUpper) | (w & (sizeof(U) == 1 ? ~0u : mask));
        if constexpr (sizeof(U) == 1) bytes[i] |= (upper[i] & kUpper) >> (7 - j);
        if constexpr (sizeof(U) == 2)
            if (i % 2) bytes[i / 2] |= (__byte_perm(upper[i - 1], upper[i], 0x7531) & 0x80808080u) >> (7 - j);
        if constexpr (sizeof(U) == 4) bytes[0] |= uint32_t((w & mask) != 0) << (8 * i + j);
        if constexpr (sizeof(U) == 8)
            if (i % 2) bytes[0] |= uint32_t((words[i - 1] | (w & mask)) != 0) << (8 * (i / 2) + j);
    }
}

// inner > 1: a thread takes a byte of kVector positions, 16 bytes of each of eight channels.
template <class U>
using ItemColumns = Columns<kThreads * kVector<U>>;

template <class U>
struct Strip {
    uint32_t place;   // of its packed bytes in the tile
    int64_t item;     // of its first channel
    int count;        // channels that exist

    __device__ __forceinline__ explicit Strip(const Tile<kThreads * kVector<U>>& tile) {
        const auto& of = tile.of;
        const uint32_t log_strips = of.log_height - (sizeof(U) == 1 ? 4 : sizeof(U) == 2 ? 3 : sizeof(U) == 4 ? 2 : 1);
        const uint32_t column = threadIdx.x >> log_strips;
        const uint32_t row = (threadIdx.x & ((1u << log_strips) - 1)) * kVector<U>;
        const int64_t position = tile.position + row, outer = divide(position, of.inner);
        const uint32_t channel = 8 * (tile.byte + column);
        place = tile.place(column, row);
        item = (outer * of.channels + channel) * of.inner + (position - outer * of.inner);
        count = position < of.positions && channel < of.channels ? int(min(8u, of.channels - channel)) : 0;
    }
};

template <class U>
__global__ void __launch_bounds__(kThreads)
    pack_columns(const U* __restrict__ x, uint32_t mask, const ItemColumns<U> columns, uint8_t* __restrict__ out) {
    __shared__ alignas(16) uint8_t shared[columns.kShared];
    const Tile<kThreads * kVector<U>> tile(columns);
    const Strip<U> strip(tile);
    uint4 items[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
        items[j] = j < strip.count ? __ldg(reinterpret_cast<const uint4*>(x + strip.item + int64_t(j) * columns.inner))
                                   : make_uint4(0, 0, 0, 0);
    uint32_t bytes[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) add_nonzero<U>(items[j], mask, j, bytes);
    void* to = shared + strip.place;
    if constexpr (sizeof(U) == 1) *static_cast<uint4*>(to) = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    if constexpr (sizeof(U) == 2) *static_cast<uint2*>(to) = make_uint2(bytes[0], bytes[1]);
    if constexpr (sizeof(U) == 4) *static_cast<uint32_t*>(to) = bytes[0];
    if constexpr (sizeof(U) == 8) *static_cast<uint16_t*>(to) = uint16_t(bytes[0]);
    __syncthreads();
    tile.store(shared, out);
}

// Four bits, a byte each.
__device__ __forceinline__ uint32_t spread(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

// Stores kVector items, from as many flags: 0 or 1, a byte each.
template <class U>
__device__ __forceinline__ void store_items(void* to, const uint32_t (&flags)[4], uint64_t one) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(U) == 1) words[i] = flags[i] * uint32_t(one);
        if constexpr (sizeof(U) == 2) words[i] = __byte_perm(flags[i / 2], 0, i % 2 ? 0x4342 : 0x4140) * uint32_t(one);
        if constexpr (sizeof(U) == 4) words[i] = __byte_perm(flags[0], 0, 0x4440 + i) * uint32_t(one);
        if constexpr (sizeof(U) == 8)
            words[i] = __byte_perm(flags[0], 0, 0x4440 + i / 2) * uint32_t(i % 2 ? one >> 32 : one);
    }
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// C % 8 == 0 and inner == 1: byte i becomes items 8 i to 8 i + 7, whatever the shape. The lanes of a warp read words of
// 32 bits; each store takes its bits from the lane that holds them.
template <class U, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    unpack_flat(const uint8_t* __restrict__ packed, uint64_t one, int64_t bytes, U* __restrict__ out) {
    constexpr int kWords = sizeof(U) < 4 ? 4 / sizeof(U) : 1, kWarpBytes = 128 * kWords;
    const uint32_t lane = threadIdx.x % 32;
    const int64_t begin = (int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kWarpBytes;
    wait_for_inputs();
    if (begin + kWarpBytes > bytes) {  // the last bytes, one by one
        for (int64_t i = begin + lane; i < bytes; i += 32)
#pragma unroll
            for (int j = 0; j < 8; ++j) out[8 * i + j] = packed[i] >> j & 1 ? U(one) : U(0);
        return;
    }
    uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = load_chunk<kAligned>(packed + begin, 32 * w + lane, kWarpBytes);
    uint4* to = reinterpret_cast<uint4*>(out + 8 * begin) + lane;
    constexpr int kBits = kVector<U>, kStores = 32 / kBits;  // of a store, of a word
#pragma unroll
    for (int i = 0; i < kWords * kStores; ++i) {
        const uint32_t source = i % kStores * kBits + (lane * kBits >> 5);
        const uint32_t bits = __shfl_sync(~0u, words[i / kStores], source) >> (lane * kBits & 31);
        const uint32_t flags[4] = {spread(bits), spread(bits >> 4), spread(bits >> 8), spread(bits >> 12)};
        store_items<U>(to + 32 * i, flags, one);
    }
}

template <class U>
__global__ void __launch_bounds__(kThreads)
    unpack_columns(const uint8_t* __restrict__ packed, uint64_t one, const ItemColumns<U> columns,
                   U* __restrict__ out) {
    __shared__ alignas(16) uint8_t shared[columns.kShared];
    const Tile<kThreads * kVector<U>> tile(columns);
    tile.load(packed, shared);
    __syncthreads();
    const Strip<U> strip(tile);
    uint32_t bytes[4] = {};
    const void* from = shared + strip.place;
    if constexpr (sizeof(U) == 1) {
        const uint4 four = *static_cast<const uint4*>(from);
        bytes[0] = four.x, bytes[1] = four.y, bytes[2] = four.z, bytes[3] = four.w;
    }
    if constexpr (sizeof(U) == 2) {
        const uint2 two = *static_cast<const uint2*>(from);
        bytes[0] = two.x, bytes[1] = two.y;
    }
    if constexpr (sizeof(U) == 4) bytes[0] = *static_cast<const uint32_t*>(from);
    if constexpr (sizeof(U) == 8) bytes[0] = *static_cast<const uint16_t*>(from);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        uint32_t flags[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) flags[i] = bytes[i] >> j & 0x01010101u;
        if (j < strip.count) store_items<U>(out + strip.item + int64_t(j) * columns.inner, flags, one);
    }
}

template <class U>
__global__ void __launch_bounds__(kThreads) unpack_any(const uint8_t* __restrict__ packed, U one, int64_t bytes,
                                                       uint32_t channels, uint32_t inner, U* __restrict__ out) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) {
        const Place place(i, channels, inner);
        const uint32_t bits = packed[place.packed];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < place.count) out[place.item + int64_t(j) * inner] = bits >> j & 1 ? one : U(0);
    }
}

}  // namespace

void pack_bits(const void* x, int64_t item_bytes, bool is_float, int64_t outer, int64_t channels, int64_t inner,
               uint8_t* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const int64_t bytes = outer * inner * ceil_div<int64_t>(channels, 8);
    with_item_type(item_bytes, [&](auto item) {
        using U = decltype(item);
        const U mask = is_float ? U(U(~U(0)) >> 1) : U(~U(0));  // -0.0 is zero
        const uint32_t word_mask = !is_float ? ~0u : item_bytes == 2 ? 0x7FFF7FFFu : 0x7FFFFFFFu;
        if (channels % 8 == 0 && inner == 1 && aligned(x, alignof(Words<U>))) {
            pack_flat<U><<<grid_for(ceil_div<int64_t>(bytes, 4), kThreads), kThreads, 0, stream>>>(
                static_cast<const Words<U>*>(x), word_mask, bytes, out);
        } else if (inner > 1 && inner % kVector<U> == 0 && aligned(x, 16)) {
            const ItemColumns<U> columns(outer, channels, inner);
            pack_columns<U>
                <<<columns.blocks(), kThreads, 0, stream>>>(static_cast<const U*>(x), word_mask, columns, out);
        } else {
            pack_any<U><<<grid_for(bytes, kThreads), kThreads, 0, stream>>>(static_cast<const U*>(x), mask, bytes,
                                                                            uint32_t(channels), uint32_t(inner), out);
        }
    });
    check(cudaGetLastError(), "pack_bits");
}

void unpack_bits(const uint8_t* packed, int64_t outer, int64_t channels, int64_t inner, int64_t item_bytes,
                 uint64_t one, void* out, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const int64_t bytes = outer * inner * ceil_div<int64_t>(channels, 8);
    with_item_type(item_bytes, [&](auto item) {
        using U = decltype(item);
        U* to = static_cast<U*>(out);
        if (channels % 8 == 0 && inner == 1 && aligned(out, 16)) {
            const int64_t threads = ceil_div<int64_t>(bytes, sizeof(U) < 4 ? 16 / sizeof(U) : 4);
            with_flag(aligned(packed, 4), [&](auto words) {
                const unsigned blocks = unsigned(ceil_div<int64_t>(threads, kThreads));
                launch_early(unpack_flat<U, words.value>, blocks, kThreads, device, stream, packed, one, bytes, to);
            });
        } else if (inner > 1 && inner % kVector<U> == 0 && aligned(out, 16)) {
            const ItemColumns<U> columns(outer, channels, inner);
            unpack_columns<U><<<columns.blocks(), kThreads, 0, stream>>>(packed, one, columns, to);
        } else {
            unpack_any<U><<<grid_for(bytes, kThreads), kThreads, 0, stream>>>(packed, U(one), bytes, uint32_t(channels),
                                                                              uint32_t(inner), to);
        }
    });
    check(cudaGetLastError(), "unpack_bits");
}

}  // namespace bldm::cuda
