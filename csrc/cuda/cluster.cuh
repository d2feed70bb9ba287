// What kernels for compute capability 9.0 share: barriers in shared memory, bulk copies, clusters, products of warpgroups.
// Every wait is bounded: a lost arrival ends in an error of the launch, not in a hang.
//
// Kernels on top of these functions have no assembler of their own: tests/emulator/cuda/cluster.cuh has the same functions for
// the CPU, where such kernels are tested.
#pragma once

#include "cuda/mma.cuh"

namespace bldm::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Ends the launch with an error when a wait has gone on for seconds.
__device__ __forceinline__ void check_patience(long long started) {
    if (clock64() - started > 8'000'000'000) __trap();
}

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Behind all that one thread has initialised, before the rest of the cluster uses it.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // of all memory it would wait for what other blocks write
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the same barrier of another block of the cluster. Only for what this block has read: a release would wait for all its
// writes to reach global memory.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Whether the phase of this parity has ended, perhaps after a short wait. In cluster scope (what other blocks did before they
// arrived is there) it costs the L1 cache.
template <bool kOfCluster = false>
__device__ __forceinline__ bool has_ended(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    if constexpr (kOfCluster)
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\tselp.b32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    else
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.b32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    return done;
}

// Until it has.
template <bool kOfCluster = false>
__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
    for (long long started = 0; !has_ended<kOfCluster>(barrier, parity);) {
        if (!started) started = clock64();
        check_patience(started);
    }
}

// Arrives, and makes the barrier's phase last until as many bytes have been copied.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// `bytes` from global to shared memory, both at multiples of 16; the barrier expects them.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The same to the same place of every block of the cluster whose bit is set, and to its barrier.
__device__ __forceinline__ void copy_bulk_to(uint16_t blocks, void* to, const void* from, uint32_t bytes,
                                             uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// From this block's shared memory to another's, and to the same barrier there, which expects the bytes.
__device__ __forceinline__ void copy_to_block(uint32_t rank, const void* to, const void* from, uint32_t bytes,
                                              uint64_t* barrier) {
    asm volatile(
        "{\n\t.reg .b32 to, barrier;\n\tmapa.shared::cluster.u32 to, %0, %4;\n\t"
        "mapa.shared::cluster.u32 barrier, %3, %4;\n\t"
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%1], %2, [barrier];\n\t}" ::"r"(
            shared_address(to)),
        "r"(shared_address(from)), "r"(bytes), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
}

// The first kThreads threads of the block.
template <int kThreads>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// All threads of the cluster.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same, which orders nothing but barriers that were published: it does not wait for what was written.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// Order ordinary accesses to memory that this thread knows of, and bulk copies and warpgroup products that it starts: to global
// memory; to this block's shared memory. (To all memory at once, it would wait for every write of the block.)
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Adds one to a counter, behind all that the block wrote before its last barrier. Waits for these writes.
__device__ __forceinline__ void signal(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait_for_count(const uint32_t* counter, uint32_t count) {
    const long long started = clock64();
    for (;;) {
        uint32_t value;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
        if (value >= count) return;
        check_patience(started);
    }
}

// An address that is computed before what follows, a wait, and not where it is used, behind it.
template <class T>
__device__ __forceinline__ void compute_here(T*& address) {
    asm volatile("" : "+l"(address));
}

// A value that is the same in all lanes, and known to be.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// Rows of 128 bytes whose 16-byte chunks are in the order of the 128-byte swizzle (chunk c of row r is at c ^ r % 8), 8 rows to
// 1024 aligned bytes: an operand of a warpgroup, k along the row.
// Its descriptor's low word; the high one is the same for all: 1024 bytes to the next group, the swizzle.
__device__ __forceinline__ uint32_t operand(const void* p) { return (shared_address(p) & 0x3FFFFu) >> 4 | 1u << 16; }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// d += a b^T for 32 of k, in e4m3: a of 64 rows, b of 56. Thread 4 g + t of warp w has rows 16 w + g + 8 (i / 2 % 2) and
// columns 8 (i / 4) + 2 t + i % 2.
__device__ __forceinline__ void multiply_64x56(float (&d)[28], uint32_t a, uint32_t b) {
    asm volatile(
        "{\n\t.reg .b64 a, b;\n\tmov.b64 a, {%28, 0x40000040};\n\tmov.b64 b, {%29, 0x40000040};\n\t"
        "wgmma.mma_async.sync.aligned.m64n56k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27}, a, b, 1, 1, 1;\n\t}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
        : "r"(a), "r"(b));
}

// Four matrices of 8 x 8 halves; lane i has the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// A matrix of 8 x 8 halves, of which thread 4 g + t has two of row g: the same of the transposed one.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// The other way: matrices of halves whose columns become rows in memory; lane i has the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ uint4 load_chunk(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
__device__ __forceinline__ uint2 load_pair(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_word(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_half(uint32_t address, uint16_t x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}
__device__ __forceinline__ float4 load_four(uint32_t address) {
    const uint4 x = load_chunk(address);
    return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
}

// From constant memory, where the compiler leaves it: long before it is used.
__device__ __forceinline__ float load_early(const float* from) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}
__device__ __forceinline__ float4 load_four_early(const float* from) {
    float4 x;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
    return x;
}

// As the device has it in hardware: a relative error of 2^-11.
__device__ __forceinline__ float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ __half2 tanh_fast(__half2 x) {
    __half2 y;
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(reinterpret_cast<uint32_t&>(y)) : "r"(reinterpret_cast<const uint32_t&>(x)));
    return y;
}

// Two values as halves, those beyond their range at its end.
__device__ __forceinline__ __half2 finite_halves(float x, float y) {
    __half2 both;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(reinterpret_cast<uint32_t&>(both)) : "f"(y), "f"(x));
    return both;
}

// What other blocks have written, from the cache that they share; the load starts here.
__device__ __forceinline__ float4 load_four_shared(const void* from) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

// Four values in e4m3, those beyond its range at its end.
__device__ __forceinline__ uint32_t e4m3_of(float x, float y, float z, float w) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(y), "f"(x));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(w), "f"(z));
    return low | uint32_t(high) << 16;
}

// The same of four halves.
__device__ __forceinline__ uint32_t e4m3_of_halves(uint32_t first, uint32_t second) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(low) : "r"(first));
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(high) : "r"(second));
    return low | uint32_t(high) << 16;
}

// The launch's shared memory, from the first multiple of 1024 on, which is the same in all blocks of a cluster.
__device__ __forceinline__ uint8_t* aligned_shared() {
    extern __shared__ __align__(1024) uint8_t raw[];
    return raw + (1024 - shared_address(raw) % 1024) % 1024;
}

}  // namespace bldm::cuda
