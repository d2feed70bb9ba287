// The functions of csrc/cuda/cluster.cuh and what else kernels use of CUDA, on the machine of machine.h.
#pragma once

#include "floats.h"
#include "machine.h"

#define __device__
#define __global__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

// Read like the members of CUDA's variables.
struct ThreadNumber { operator int() const { return emulator::machine.current->thread; } };
struct BlockNumber { operator int() const { return emulator::machine.current->block; } };
struct BlockCount { operator int() const { return int(emulator::machine.blocks.size()); } };
static struct { ThreadNumber x; } threadIdx;
static struct { BlockNumber x; } blockIdx;
static struct { BlockCount x; } gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
inline long long clock64() { return 0; }
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* to, uint32_t x) {
    ++emulator::machine.progress;
    return (*to += x) - x;
}

inline void __syncwarp() { emulator::meet_warp(); }
inline uint32_t of_lane(uint32_t mine, int lane) {
    auto& words = emulator::warp().words;
    words[emulator::machine.lane()][0] = mine;
    emulator::meet_warp();
    const uint32_t other = words[lane][0];
    emulator::meet_warp();
    return other;
}
inline uint32_t __shfl_sync(unsigned, uint32_t x, int lane) { return of_lane(x, lane); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
    return __uint_as_float(of_lane(__float_as_uint(x), emulator::machine.lane() ^ mask));
}

namespace bldm::cuda {

using emulator::machine;

constexpr uint32_t kFirstAddress = 1024;  // of shared memory
inline uint32_t shared_address(const void* p) { return uint32_t(machine.offset(p)) + kFirstAddress; }
inline uint8_t* at(uint32_t address) { return machine.block().shared + (address - kFirstAddress); }
inline uint8_t* aligned_shared() { return machine.block().shared; }

inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
    machine.block().barriers[machine.offset(barrier)] = {int(arrivals), int(arrivals)};
}
inline void publish_barriers() {}
inline void arrive(uint64_t* barrier) { emulator::arrive(machine.current->block, machine.offset(barrier)); }
inline void arrive_at(uint64_t* barrier, uint32_t rank) { emulator::arrive(machine.neighbour(rank), machine.offset(barrier)); }
template <bool kOfCluster = false>
bool has_ended(uint64_t* barrier, uint32_t parity) {
    return emulator::barrier(machine.current->block, machine.offset(barrier)).phase != parity;
}
template <bool kOfCluster = false>
void wait_for(uint64_t* barrier, uint32_t parity) {
    emulator::wait_while(&emulator::barrier(machine.current->block, machine.offset(barrier)).phase, parity);
}
inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
    emulator::barrier(machine.current->block, machine.offset(barrier)).bytes += bytes;
    arrive(barrier);
}

inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    emulator::copy(static_cast<uint8_t*>(to), from, bytes, machine.current->block, machine.offset(barrier));
}
inline void copy_to_block(uint32_t rank, const void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    const int block = machine.neighbour(rank);
    emulator::copy(machine.blocks[block].shared + machine.offset(to), from, bytes, block, machine.offset(barrier));
}
inline void copy_bulk_to(uint16_t blocks, void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    for (int rank = 0; rank < machine.cluster; ++rank)
        if (blocks >> rank & 1) copy_to_block(rank, to, from, bytes, barrier);
}

inline void copy_async(uint4* to, const void* from, int bytes) {
    emulator::expect(uint64_t(to) % 16 == 0 && uint64_t(from) % 16 == 0, "a copy of 16 bytes at no multiple of them");
    machine.current->copies.start([=] { std::memset(to, 0, 16), std::memcpy(to, from, bytes); });
}
inline void commit_async() { machine.current->copies.close(); }
template <int kLeft>
void wait_async() {
    machine.current->copies.wait(kLeft);
}

inline uint32_t cluster_rank() { return machine.rank(); }
template <int kThreads>
void sync_threads() { emulator::meet(machine.block(), kThreads); }
inline void sync_cluster() { emulator::meet(machine.clusters[machine.current->block / machine.cluster], machine.threads * machine.cluster); }
inline void meet_cluster() { sync_cluster(); }
inline void fence_async_global() {}
inline void fence_async_shared() {}
inline void signal(uint32_t* counter) { ++*counter, ++machine.progress; }
inline void wait_for_count(const uint32_t* counter, uint32_t count) {
    emulator::wait_while(counter, count, true);
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float tanh_fast(float x) { return std::tanh(x); }
inline __half2 tanh_fast(__half2 x) { return __floats2half2_rn(std::tanh(from_half(x.x)), std::tanh(from_half(x.y))); }
inline __half2 finite_halves(float x, float y) {
    const auto of = [](float x) { return std::isnan(x) ? x : std::clamp(x, -65504.f, 65504.f); };
    return __floats2half2_rn(of(x), of(y));
}
inline float load_early(const float* from) { return *from; }
inline float4 load_four_early(const float* from) { return {from[0], from[1], from[2], from[3]}; }
inline float4 load_four_shared(const void* from) { return *static_cast<const float4*>(from); }
inline uint4 load_chunk(uint32_t address) {
    emulator::expect(address % 16 == 0, "a load of 16 bytes at no multiple of them");
    return *reinterpret_cast<const uint4*>(at(address));
}
inline uint2 load_pair(uint32_t address) { return *reinterpret_cast<const uint2*>(at(address)); }
inline void store_word(uint32_t address, uint32_t x) { *reinterpret_cast<uint32_t*>(at(address)) = x; }
inline void store_half(uint32_t address, uint16_t x) { *reinterpret_cast<uint16_t*>(at(address)) = x; }
inline float4 load_four(uint32_t address) {
    const uint4 x = load_chunk(address);
    return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}
inline uint32_t e4m3_of(float x, float y, float z, float w) {
    return to_e4m3(x) | to_e4m3(y) << 8 | to_e4m3(z) << 16 | uint32_t(to_e4m3(w)) << 24;
}
inline uint32_t e4m3_of_halves(uint32_t first, uint32_t second) {
    return e4m3_of(from_half(uint16_t(first)), from_half(first >> 16), from_half(uint16_t(second)), from_half(second >> 16));
}

template <class T>
void compute_here(T*&) {}
inline uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// Products of a warpgroup: every thread finds its own results, in operands of 128-byte rows whose address bits 4 to 6 are
// swizzled by bits 7 to 9.
inline uint32_t operand(const void* p) { return (shared_address(p) & 0x3FFFF) >> 4; }
inline void begin_products() {}
inline void commit_products() { machine.current->products.close(); }
template <int kLeft>
void wait_products() {  // some turns, in which others may spoil what is multiplied, and for the whole warp
    for (int turn = 0; turn < 4 && machine.current->products.runs(kLeft); ++turn) emulator::give_way();
    machine.current->products.wait(kLeft);
    emulator::meet_warp();
}
inline void multiply_64x56(float (&d)[28], uint32_t a, uint32_t b) {
    const int lane = machine.lane(), g = lane / 4, t = lane % 4, warp = machine.current->thread / 32 % 4;
    uint8_t* const shared = at(kFirstAddress);
    const auto of_operand = [shared](uint32_t operand, int row, int k) {
        const uint32_t address = (operand << 4) + row * 128 + k;
        return from_e4m3(shared[(address ^ (address >> 7 & 7) << 4) - kFirstAddress]);
    };
    for (int k = 0; k < 32; ++k) {
        float row[2], column[14];
        for (int i = 0; i < 2; ++i) row[i] = of_operand(a, 16 * warp + g + 8 * i, k);
        for (int i = 0; i < 14; ++i) column[i] = of_operand(b, 8 * (i / 2) + 2 * t + i % 2, k);
        for (int i = 0; i < 28; ++i) d[i] += row[i / 2 % 2] * column[2 * (i / 4) + i % 2];
    }
}

// m16n8k16 of a warp, in bfloat16; the fragments are those of mma.cuh.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    auto& words = emulator::warp().words;
    const int lane = machine.lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) words[lane][i] = a[i];
    words[lane][4] = b0, words[lane][5] = b1;
    emulator::meet_warp();
    float out[4];
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        out[i] = c[i];
        for (int k = 0; k < 16; ++k) {
            const uint32_t x = words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], y = words[column * 4 + k % 8 / 2][4 + k / 8];
            out[i] += from_bfloat16(uint16_t(x >> k % 2 * 16)) * from_bfloat16(uint16_t(y >> k % 2 * 16));
        }
    }
    emulator::meet_warp();
    for (int i = 0; i < 4; ++i) d[i] = out[i];
}

// The 8 x 8 matrices of a warp, by the addresses of their rows: element (row, column) of matrix i.
inline uint16_t* element(int i, int row, int column) {
    return reinterpret_cast<uint16_t*>(at(emulator::warp().words[8 * i + row][6])) + column;
}
inline void show_address(uint32_t address) {
    emulator::expect(address % 16 == 0, "a row of a matrix at no multiple of 16 bytes");
    emulator::warp().words[machine.lane()][6] = address;
    emulator::meet_warp();
}
inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
    show_address(address);
    const int row = machine.lane() / 4, column = machine.lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) to[i] = *element(i, row, column) | uint32_t(*element(i, row, column + 1)) << 16;
    emulator::meet_warp();
}
inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
    show_address(address);
    const int row = machine.lane() / 4, column = machine.lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) to[i] = *element(i, column, row) | uint32_t(*element(i, column + 1, row)) << 16;
    emulator::meet_warp();
}
inline uint32_t transposed(uint32_t pair) {
    const int row = machine.lane() / 4, column = machine.lane() % 4 * 2;
    const auto at = [&](int r, int c) { return emulator::warp().words[4 * r + c / 2][0] >> c % 2 * 16 & 0xFFFF; };
    emulator::warp().words[machine.lane()][0] = pair;
    emulator::meet_warp();
    const uint32_t result = at(column, row) | at(column + 1, row) << 16;
    emulator::meet_warp();
    return result;
}
template <class... Words>
void store_transposed(uint32_t address, Words... words) {
    show_address(address);
    const int row = machine.lane() / 4, column = machine.lane() % 4 * 2;
    int i = 0;
    for (const uint32_t word : {uint32_t(words)...}) {
        *element(i, column, row) = uint16_t(word), *element(i, column + 1, row) = uint16_t(word >> 16);
        ++i;
    }
    emulator::meet_warp();
}

}  // namespace bldm::cuda
