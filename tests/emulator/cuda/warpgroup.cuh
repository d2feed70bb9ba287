// The functions of csrc/cuda/warpgroup.cuh, on the machine of machine.h.
#pragma once

#include <algorithm>
#include <array>

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// Of values of `bytes` bytes: values in a row, rows, samples, from a base on; boxes of 128 bytes of a number of rows.
struct TensorMap {
    const void* base;
    int sizes[3], rows, bytes = 2;
};

inline void prefetch_bulk(const void*, uint32_t) {}
inline void prefetch_map(const TensorMap*) {}

// The 128-byte swizzle is one of addresses: bits 4 to 6 are changed by bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box_to_block(int block, void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    const uint32_t address = shared_address(to);
    const int row_bytes = map->sizes[0] * map->bytes, first = x * map->bytes;
    emulator::expect(address % 1024 == 0, "a box at no multiple of 1024 bytes");
    emulator::expect(row_bytes % 16 == 0 && first % 16 == 0, "a box or a row of a tensor at no multiple of 16 bytes");
    uint8_t* const shared = machine.blocks[block].shared;
    emulator::Barrier* const b = &emulator::barrier(block, machine.offset(barrier));
    machine.copies.push_back([=, map = *map] {
        for (int row = 0; row < map.rows; ++row) {
            const int64_t from = (int64_t(z) * map.sizes[1] + y + row) * row_bytes + first;
            for (int i = 0; i < 128; i += 16) {
                const bool inside = first + i < row_bytes && y + row < map.sizes[1] && z < map.sizes[2];
                uint8_t* const chunk = shared + swizzled(address + row * 128 + i) - kFirstAddress;
                if (inside)
                    std::memcpy(chunk, static_cast<const uint8_t*>(map.base) + from + i, 16);
                else
                    std::memset(chunk, 0, 16);
            }
        }
        emulator::end_copy(block, *b, map.rows * 128);
    });
}
enum Keep { kBriefly, kAsUsual, kLong };
template <Keep kKeep = kAsUsual>
void copy_box(void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    copy_box_to_block(machine.current->block, to, map, x, y, z, barrier);
}
template <Keep kKeep = kAsUsual>
void copy_box_to(uint16_t blocks, void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    for (int rank = 0; rank < machine.cluster; ++rank)
        if (blocks >> rank & 1) copy_box_to_block(machine.neighbour(rank), to, map, x, y, z, barrier);
}

inline void wait_for_inputs() {}
inline void let_next_start() {}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}
template <int kThreads>
void sync_part(int barrier) { emulator::meet(machine.block().parts[barrier], kThreads); }
template <int kThreads>
void arrive_part(int barrier) { emulator::arrive(machine.block().parts[barrier], kThreads); }

template <class Words>
void store_if(bool there, void* to, Words x) {
    emulator::expect(!there || uint64_t(to) % sizeof(x) == 0, "a store at no multiple of its size");
    if (there) *static_cast<Words*>(to) = x;
}
inline void added_up_here(float (&)[2]) {}
inline float4 load_four_again(const float* from) { return load_four(shared_address(from)); }
inline uint32_t from_here_on(uint32_t x) { return x; }
inline float log2_fast(float x) { return std::log2(x); }
inline uint32_t bfloat16_pair(float low, float high) { return to_bfloat16(low) | uint32_t(to_bfloat16(high)) << 16; }
inline uint16_t e4m3_pair(float low, float high) { return uint16_t(to_e4m3(low) | to_e4m3(high) << 8); }

// Element (row, column) of a matrix of 128-byte rows, 8 of them in 1024 bytes.
inline float of_matrix(uint32_t operand, int row, int column) {
    uint16_t value;
    std::memcpy(&value, at(swizzled(((operand & 0x3FFF) << 4) + row / 8 * 1024 + row % 8 * 128 + column * 2)), 2);
    return from_bfloat16(value);
}

template <int kRest>
void multiply_scores(float (&d)[128], float (&rest)[kRest], uint32_t a, uint32_t b) {
    const int lane = machine.lane(), g = lane / 4, t = lane % 4, warp = machine.current->thread / 32 % 4;
    float rows[2][64];
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 64; ++k) rows[i][k] = of_matrix(a, 16 * warp + g + 8 * i, k);
    for (int i = 0; i < 128 + kRest; i += i % 2 ? 3 : 1) {  // columns of the upper row
        const int column = 8 * (i / 4) + 2 * t + i % 2;
        float upper = 0, lower = 0;
        for (int k = 0; k < 64; ++k) {
            const float x = of_matrix(b, column, k);
            upper += rows[0][k] * x, lower += rows[1][k] * x;
        }
        float* to = i < 128 ? d + i : rest + i - 128;
        to[0] = upper, to[2] = lower;
    }
}

template <int kCount>
void multiply_both(float (&d)[kCount], float (&e)[kCount], uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
    const int lane = machine.lane(), g = lane / 4, t = lane % 4, warp = machine.current->thread / 32 % 4;
    wait_products<0>();
    for (int i = 0; i < kCount; ++i) {
        const int row = 16 * warp + g + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * t + i % 2;
        d[i] = e[i] = 0;
        for (int k = 0; k < 64; ++k) {
            d[i] += of_matrix(a, row, k) * of_matrix(b, column, k);
            e[i] += of_matrix(x, row, k) * of_matrix(y, column, k);
        }
    }
}

// What a product reads in shared memory it may read as late as when it is waited for.
template <int kWords>
void multiply_values(float (&d)[32], const uint32_t (&a)[kWords], uint32_t b) {
    const int t = machine.lane() % 4, quad = machine.lane() / 4 * 4;
    std::array<std::array<float, 4 * kWords>, 2> rows;  // k of rows g and g + 8
    auto& words = emulator::warp().words;
    for (int step = 0; step < kWords / 4; ++step) {
        for (int i = 0; i < 4; ++i) words[machine.lane()][i] = a[4 * step + i];
        emulator::meet_warp();
        for (int k = 0; k < 16; ++k)
            for (int i = 0; i < 2; ++i) {
                const uint32_t word = words[quad + k % 8 / 2][k / 8 * 2 + i];
                rows[i][16 * step + k] = from_bfloat16(uint16_t(word >> k % 2 * 16));
            }
        emulator::meet_warp();
    }
    machine.current->products.start([=, &d] {
        for (int i = 0; i < 32; ++i)
            for (int k = 0; k < 4 * kWords; ++k) d[i] += rows[i / 2 % 2][k] * of_matrix(b, k, 8 * (i / 4) + 2 * t + i % 2);
    });
    commit_products();
}
inline void wait_values(float (&)[32]) { wait_products<0>(); }

// The 128 bytes of a row of an operand, as values.
template <bool kLow>
using StageRow = std::array<float, kLow ? 128 : 64>;
template <bool kLow>
StageRow<kLow> stage_row(uint32_t operand, int row) {
    StageRow<kLow> values;
    const uint32_t address = ((operand & 0x3FFF) << 4) + row / 8 * 1024 + row % 8 * 128;
    for (int chunk = 0; chunk < 8; ++chunk) {
        const uint8_t* const bytes = at(swizzled(address + 16 * chunk));
        for (int i = 0; i < (kLow ? 16 : 8); ++i)
            if constexpr (kLow)
                values[16 * chunk + i] = from_e4m3(bytes[i]);
            else
                values[8 * chunk + i] = from_bfloat16(uint16_t(bytes[2 * i] | bytes[2 * i + 1] << 8));
    }
    return values;
}

// It reads shared memory and has results as late as when it is waited for; before, nobody knows what they are.
template <bool kLow, size_t kCount>
void multiply_stage(float (&d)[kCount], uint32_t a, uint32_t b, uint32_t added) {
    if (!added) std::fill(d, d + kCount, NAN);
    machine.current->products.start([=, &d] {
        const int lane = machine.lane(), row = machine.current->thread / 32 % 4 * 16 + lane / 4;
        const auto upper = stage_row<kLow>(a, row), lower = stage_row<kLow>(a, row + 8);
        for (size_t i = 0; i < kCount; i += i % 2 ? 3 : 1) {  // columns of the upper row
            const auto column = stage_row<kLow>(b, int(8 * (i / 4) + 2 * (lane % 4) + i % 2));
            float sums[2] = {added ? d[i] : 0, added ? d[i + 2] : 0};
            for (size_t k = 0; k < column.size(); ++k) sums[0] += upper[k] * column[k], sums[1] += lower[k] * column[k];
            d[i] = sums[0], d[i + 2] = sums[1];
        }
    });
}
template <size_t kCount>
void settle(float (&)[kCount]) {}

}  // namespace bldm::cuda
