// The functions of csrc/cuda/warpgroup.cuh, on the machine of machine.h.
#pragma once

#include <array>

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// Of bfloat16: values in a row, rows, samples, from a base on; boxes of 64 values of a number of rows.
struct TensorMap {
    const uint16_t* base;
    int sizes[3], rows;
};

inline void prefetch_map(const TensorMap*) {}

// The 128-byte swizzle is one of addresses: bits 4 to 6 are changed by bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    const uint32_t address = shared_address(to), bytes = map->rows * 128;
    emulator::expect(address % 1024 == 0, "a box at no multiple of 1024 bytes");
    uint8_t* shared = machine.block().shared;
    emulator::Barrier* b = &emulator::barrier(machine.current->block, machine.offset(barrier));
    machine.copies.push_back([=, map = *map] {
        const auto& sizes = map.sizes;
        for (int row = 0; row < map.rows; ++row)
            for (int i = 0; i < 64; ++i) {
                const bool inside = x + i < sizes[0] && y + row < sizes[1] && z < sizes[2];
                const uint16_t value = inside ? map.base[(int64_t(z) * sizes[1] + y + row) * sizes[0] + x + i] : 0;
                std::memcpy(shared + swizzled(address + row * 128 + i * 2) - kFirstAddress, &value, 2);
            }
        b->bytes -= bytes;
        emulator::end_phase_if_complete(*b);
    });
}

inline void wait_for_inputs() {}
inline void let_next_start() {}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}
template <int kThreads>
void sync_part(int barrier) { emulator::meet(machine.block().parts[barrier], kThreads); }

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

inline void end_products() {
    for (auto& product : machine.current->products) product();
    machine.current->products.clear();
}

template <int kCount>
void multiply_both(float (&d)[kCount], float (&e)[kCount], uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
    const int lane = machine.lane(), g = lane / 4, t = lane % 4, warp = machine.current->thread / 32 % 4;
    end_products();
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
    machine.current->products.push_back([=, &d] {
        for (int i = 0; i < 32; ++i)
            for (int k = 0; k < 4 * kWords; ++k) d[i] += rows[i / 2 % 2][k] * of_matrix(b, k, 8 * (i / 4) + 2 * t + i % 2);
    });
}
inline void wait_values(float (&)[32]) { end_products(); }

}  // namespace bldm::cuda
