// The functions of csrc/cuda/warpgroup.cuh on the machine of machine.h.
#pragma once

#include "cuda/cluster.cuh"

inline void __syncthreads() { emulator::meet(emulator::machine.block(), emulator::machine.threads); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {to_bfloat16(x)}; }

namespace bldm::cuda {

// A tensor (z, y, x) of bfloat16 and the tile of it that is copied: `rows` of y, 64 of x.
struct TileMap {
    const uint8_t* from;
    int sizes[3], rows;
};

inline void copy_tile(void* to, const TileMap& map, int x, int y, int z, uint64_t* barrier) {
    const uint32_t address = shared_address(to);
    emulator::expect(address % 1024 == 0, "a tile whose swizzle does not begin with it");
    emulator::expect(x % 64 == 0 && x + 64 <= map.sizes[0] && z < map.sizes[2], "a tile beyond the tensor");
    emulator::Barrier* b = &emulator::barrier(machine.current->block, machine.offset(barrier));
    uint8_t* base = static_cast<uint8_t*>(to);
    const TileMap from = map;
    machine.copies.push_back([=] {
        for (int row = 0; row < from.rows; ++row)
            for (int chunk = 0; chunk < 8; ++chunk) {
                uint8_t* place = base + row * 128 + (chunk ^ row % 8) * 16;
                if (y + row < from.sizes[1])
                    std::memcpy(place, from.from + ((int64_t(z) * from.sizes[1] + y + row) * from.sizes[0] + x) * 2 + chunk * 16, 16);
                else
                    std::memset(place, 0, 16);
            }
        b->bytes -= from.rows * 128;
        emulator::end_phase_if_complete(*b);
    });
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}
inline void wait_for_inputs() {}
inline void let_next_start() {}

inline float of_halves(uint32_t operand, int row, int column) {
    const uint32_t address = (operand << 4) + row * 128 + column * 2;
    return from_bfloat16(*reinterpret_cast<const uint16_t*>(at(address ^ (address >> 7 & 7) << 4)));
}

template <bool kAdds, int kCount>
void multiply(float (&d)[kCount], uint32_t a, uint32_t b) {
    const int lane = machine.lane(), g = lane / 4, t = lane % 4, warp = machine.current->thread / 32 % 4;
    for (int i = 0; i < kCount; ++i) {
        if (!kAdds) d[i] = 0;
        for (int k = 0; k < 16; ++k)
            d[i] += of_halves(a, 16 * warp + g + 8 * (i / 2 % 2), k) * of_halves(b, 8 * (i / 4) + 2 * t + i % 2, k);
    }
}
template <bool kAdds>
void multiply_64x256(float (&d)[128], uint32_t a, uint32_t b) { multiply<kAdds>(d, a, b); }
template <bool kAdds>
void multiply_64x16(float (&d)[8], uint32_t a, uint32_t b) { multiply<kAdds>(d, a, b); }

// The lanes of a quad show each other their parts of its rows.
inline void multiply_transposed_64x64(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
    auto& words = emulator::warp().words;
    const int lane = machine.lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) words[lane][i] = a[i];
    emulator::meet_warp();
    for (int i = 0; i < 32; ++i)
        for (int k = 0; k < 16; ++k) {
            const uint32_t both = words[4 * g + k % 8 / 2][i / 2 % 2 + k / 8 * 2];
            d[i] += from_bfloat16(uint16_t(k % 2 ? both >> 16 : both)) * of_halves(b, k, 8 * (i / 4) + 2 * t + i % 2);
        }
    emulator::meet_warp();
}

}  // namespace bldm::cuda
