// How a kernel walks over packed bytes: in groups of up to kLanes of them, spread over threads.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace bldm::BLDM_ISA {

// Bits of one group: 8 vectors of kLanes.
constexpr int kGroupBits = 8 * kLanes;
constexpr int64_t kChunkBytes = 512;
constexpr int64_t kSerialBytes = 4096;  // less than this is not worth waking a thread

// Values lie at (B, rows / inner, C, inner); inner = 1 is channels last.
struct Shape {
    int64_t batch, rows, channels, inner = 1;

    BLDM_INLINE int64_t row_bytes() const { return (channels + 7) / 8; }
    BLDM_INLINE int64_t sample_bytes() const { return rows * row_bytes(); }
    BLDM_INLINE bool whole_bytes() const { return channels % 8 == 0; }
};

// `count` consecutive packed bytes: the index of the first among all, its sample, its index within the sample.
struct Group {
    int64_t first;
    int count;
    int64_t sample, byte;

    // Are the group's values as they lie in memory one full run of kGroupBits?
    BLDM_INLINE bool direct(const Shape& shape) const {
        return count == kLanes && shape.whole_bytes() && shape.inner == 1;
    }

    // Calls body(b, sample, byte within the sample) for each byte b of the group.
    template <class Body>
    BLDM_INLINE void for_bytes(const Shape& shape, Body body) const {
        int64_t s = sample, i = byte;
        for (int b = 0; b < count; ++b) {
            body(b, s, i);
            if (++i == shape.sample_bytes()) i = 0, ++s;
        }
    }

    // Calls body(b, offset of its first value, number of channels in it) for each byte b; channels are shape.inner apart.
    template <class Body>
    BLDM_INLINE void for_values(const Shape& shape, Body body) const {
        const int64_t row = first / shape.row_bytes();
        int64_t channel = 8 * (first % shape.row_bytes()), outer = row / shape.inner, position = row % shape.inner;
        for (int b = 0; b < count; ++b) {
            const int64_t offset = (outer * shape.channels + channel) * shape.inner + position;
            body(b, offset, int(std::min<int64_t>(8, shape.channels - channel)));
            channel += 8;
            if (channel < shape.channels) continue;
            channel = 0;
            if (++position == shape.inner) position = 0, ++outer;
        }
    }

    // Where the group's kGroupBits values lie: in x itself, or gathered into `buffer` with zeros for what is not there.
    template <class T>
    BLDM_INLINE const T* gather(const T* x, const Shape& shape, T* buffer) const {
        if (direct(shape)) return x + 8 * first;
        std::memset(static_cast<void*>(buffer), 0, kGroupBits * sizeof(T));
        for_values(shape, [&](int b, int64_t offset, int channels) {
            for (int j = 0; j < channels; ++j) buffer[8 * b + j] = x[offset + j * shape.inner];
        });
        return buffer;
    }

    // The same for results: where to write kGroupBits of them; `scatter` then moves them from the buffer to x.
    template <class T>
    BLDM_INLINE T* target(T* x, const Shape& shape, T* buffer) const {
        return direct(shape) ? x + 8 * first : buffer;
    }
    template <class T>
    BLDM_INLINE void scatter(T* x, const Shape& shape, const T* buffer) const {
        if (direct(shape)) return;
        for_values(shape, [&](int b, int64_t offset, int channels) {
            for (int j = 0; j < channels; ++j) x[offset + j * shape.inner] = buffer[8 * b + j];
        });
    }
};

// The bits of a group, vector by vector: bits v kLanes .. (v + 1) kLanes - 1.
struct GroupBits {
    uint8_t bytes[kLanes] = {};

    BLDM_INLINE void put(int v, uint32_t bits) {
        if constexpr (kLanes == 16)
            bytes[2 * v] = uint8_t(bits), bytes[2 * v + 1] = uint8_t(bits >> 8);
        else if constexpr (kLanes == 8)
            bytes[v] = uint8_t(bits);
        else
            bytes[v / 2] |= uint8_t(bits << 4 * (v % 2));
    }
    BLDM_INLINE uint32_t get(int v) const {
        if constexpr (kLanes == 16)
            return bytes[2 * v] | uint32_t(bytes[2 * v + 1]) << 8;
        else if constexpr (kLanes == 8)
            return bytes[v];
        else
            return (bytes[v / 2] >> 4 * (v % 2)) & 15u;
    }
    BLDM_INLINE void read(const uint8_t* packed, const Group& group) {
        if (group.count == kLanes)
            std::memcpy(bytes, packed + group.first, kLanes);
        else
            std::memcpy(bytes, packed + group.first, size_t(group.count));
    }
    BLDM_INLINE void write(uint8_t* packed, const Group& group) const {
        if (group.count == kLanes)
            std::memcpy(packed + group.first, bytes, kLanes);
        else
            std::memcpy(packed + group.first, bytes, size_t(group.count));
    }
    // Clears what is beyond the channels of a row.
    BLDM_INLINE void clear_padding(const Shape& shape, const Group& group) {
        if (shape.whole_bytes()) return;
        group.for_values(shape, [&](int b, int64_t, int channels) { bytes[b] &= uint8_t((1 << channels) - 1); });
    }
};

// Tasks of at most kChunkBytes; with `per_sample` none crosses from one sample to the next, so no group does.
struct Tasks {
    int64_t length, chunks, count;

    BLDM_INLINE Tasks(const Shape& shape, bool per_sample) {
        length = shape.sample_bytes() * (per_sample ? 1 : shape.batch);
        chunks = (length + kChunkBytes - 1) / kChunkBytes;
        count = chunks * (per_sample ? shape.batch : 1);
    }
};

// Calls body(group, task) for all packed bytes of the shape.
template <class Body>
BLDM_INLINE void for_groups(const Shape& shape, bool per_sample, int threads, Body body) {
    const Tasks tasks(shape, per_sample);
    const int64_t sample_bytes = shape.sample_bytes();
#pragma omp parallel for num_threads(threads) if (shape.batch * sample_bytes > kSerialBytes)
    for (int64_t task = 0; task < tasks.count; ++task) {
        const int64_t start = task % tasks.chunks * kChunkBytes;
        const int64_t begin = task / tasks.chunks * tasks.length + start;
        const int64_t end = begin + std::min(kChunkBytes, tasks.length - start);
        Group group{begin, 0, begin / sample_bytes, begin % sample_bytes};
        while (group.first < end) {
            group.count = int(std::min<int64_t>(kLanes, end - group.first));
            body(group, task);
            group.first += group.count;
            group.byte += group.count;
            while (group.byte >= sample_bytes) group.byte -= sample_bytes, ++group.sample;
        }
    }
}

}  // namespace bldm::BLDM_ISA
