// For kernels whose warpgroups have roles of their own, for compute capability 9.0: copies of boxes of a tensor, products,
// registers that move between warpgroups. tests/emulator/cuda/warpgroup.cuh has the same functions for the CPU.
#pragma once

#include <cuda.h>

#include "cuda/cluster.cuh"

namespace bldm::cuda {

using TensorMap = CUtensorMap;

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// How long what is copied should stay in the cache that all blocks share, beside what else is there: as its policies are encoded.
enum Keep : uint64_t { kBriefly = 0x12F0000000000000, kAsUsual = 0x1000000000000000, kLong = 0x14F0000000000000 };

// The map's box from (x, y, z) on into shared memory, in the map's swizzle; zeros where the tensor ends. The barrier expects all
// bytes of the box, these too.
template <Keep kKeep = kAsUsual>
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], "
        "[%5], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "l"(kKeep)
        : "memory");
}

// The same to the same place of every block of the cluster whose bit is set, and to its barrier.
template <Keep kKeep = kAsUsual>
__device__ __forceinline__ void copy_box_to(uint16_t blocks, void* to, const TensorMap* map, int x, int y, int z,
                                            uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
        "[%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "h"(blocks), "l"(kKeep)
        : "memory");
}

// Bytes on their way into the cache that all blocks share, in multiples of 16.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Where `there` says so, without a branch: those would keep instructions on both sides of them apart.
__device__ __forceinline__ void store_if(bool there, void* to, uint4 x) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %0, 0;\n\t@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n\t}" ::"r"(
                     uint32_t(there)),
                 "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ void store_if(bool there, void* to, uint2 x) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %0, 0;\n\t@p st.global.v2.u32 [%1], {%2, %3};\n\t}" ::"r"(uint32_t(there)),
                 "l"(to), "r"(x.x), "r"(x.y)
                 : "memory");
}

// Sums that are computed before what follows, and not at the end, with all that they are of in registers that a kernel has not got.
__device__ __forceinline__ void added_up_here(float (&sums)[2]) { asm volatile("" : "+f"(sums[0]), "+f"(sums[1])); }

// From shared memory each time that it is called: the compiler might keep what it has loaded before, in registers that a kernel
// has not got.
__device__ __forceinline__ float4 load_four_again(const float* from) {
    float4 x;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(shared_address(from)));
    return x;
}

// A value of which nothing is computed before, in registers that a kernel has not got.
__device__ __forceinline__ uint32_t from_here_on(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The stream's next kernel may start where there is room; for what this one writes, it waits all the same.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// From here on, a thread of this warpgroup has as many registers; whoever takes more waits for those who give.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The kThreads threads that have this barrier for themselves; 0 and 1 are taken. Of those, some may arrive only, by whole warps;
// the others have it in one place of the code: in two, synccheck finds them divergent.
template <int kThreads>
__device__ __forceinline__ void sync_part(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void arrive_part(int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ uint16_t e4m3_pair(float low, float high) {
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}

// Operands of the products below are rows of 64 values as `operand` has them. A thread has of results what it has in
// `multiply_64x56`. All instructions of a product are in one asm, with the fence in front of them, so that the compiler
// computes none of their registers behind it.
#define BLDM_TEN(p) "%" p "0, %" p "1, %" p "2, %" p "3, %" p "4, %" p "5, %" p "6, %" p "7, %" p "8, %" p "9, "
#define BLDM_HUNDRED                                                                                                           \
    BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") BLDM_TEN("3") BLDM_TEN("4") BLDM_TEN("5") BLDM_TEN("6") BLDM_TEN("7") BLDM_TEN("8") \
    BLDM_TEN("9")
#define BLDM_4(as, d, i) as(d[i]), as(d[i + 1]), as(d[i + 2]), as(d[i + 3])
#define BLDM_16(as, d, i) BLDM_4(as, d, i), BLDM_4(as, d, i + 4), BLDM_4(as, d, i + 8), BLDM_4(as, d, i + 12)
#define BLDM_64(as, d, i) BLDM_16(as, d, i), BLDM_16(as, d, i + 16), BLDM_16(as, d, i + 32), BLDM_16(as, d, i + 48)

// 16 of k: `at` is where they are in the rows, in units of 16 bytes; `add` whether results are added to.
#define BLDM_SCORES_STEP(at, add, rest_shape, rest, a, b)                                                                       \
    "add.u32 x, %" a ", " at ";\n\tadd.u32 y, %" b ", " at ";\n\tadd.u32 z, y, 2048;\n\t"                                       \
    "mov.b64 a, {x, 0x40000040};\n\tmov.b64 b, {y, 0x40000040};\n\tmov.b64 c, {z, 0x40000040};\n\t"                             \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" BLDM_HUNDRED BLDM_TEN("10") BLDM_TEN("11")                        \
    "%120, %121, %122, %123, %124, %125, %126, %127}, a, b, " add ", 1, 1, 0, 0;\n\t"                                           \
    "wgmma.mma_async.sync.aligned." rest_shape ".f32.bf16.bf16 {" rest "}, a, c, " add ", 1, 1, 0, 0;\n\t"
#define BLDM_SCORES(shape, rest, a, b)                                                                                         \
    "{\n\t.reg .b32 x, y, z;\n\t.reg .b64 a, b, c;\n\twgmma.fence.sync.aligned;\n\t"                                           \
    BLDM_SCORES_STEP("0", "0", shape, rest, a, b) BLDM_SCORES_STEP("2", "1", shape, rest, a, b)                                 \
    BLDM_SCORES_STEP("4", "1", shape, rest, a, b) BLDM_SCORES_STEP("6", "1", shape, rest, a, b)                                 \
    "wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n\t}"

// a b^T over 64 of k, a of 64 rows, b of 256 and, right behind them, 8 or 16; waits for the results.
__device__ __forceinline__ void multiply_scores(float (&d)[128], float (&rest)[4], uint32_t a, uint32_t b) {
    asm volatile(BLDM_SCORES("m64n8k16", "%128, %129, %130, %131", "132", "133")
                 : BLDM_64("=f", d, 0), BLDM_64("=f", d, 64), BLDM_4("=f", rest, 0)
                 : "r"(a), "r"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_scores(float (&d)[128], float (&rest)[8], uint32_t a, uint32_t b) {
    asm volatile(BLDM_SCORES("m64n16k16", "%128, %129, %130, %131, %132, %133, %134, %135", "136", "137")
                 : BLDM_64("=f", d, 0), BLDM_64("=f", d, 64), BLDM_4("=f", rest, 0), BLDM_4("=f", rest, 4)
                 : "r"(a), "r"(b)
                 : "memory");
}

// 16 of k of two products: a of 64 rows times b of as many as `shape` says.
#define BLDM_BOTH_STEP(at, add, shape, d, e, a, b, x, y)                                                                        \
    "add.u32 u, %" a ", " at ";\n\tadd.u32 v, %" b ", " at ";\n\tmov.b64 a, {u, 0x40000040};\n\tmov.b64 b, {v, 0x40000040};\n\t" \
    "add.u32 u, %" x ", " at ";\n\tadd.u32 v, %" y ", " at ";\n\tmov.b64 x, {u, 0x40000040};\n\tmov.b64 y, {v, 0x40000040};\n\t" \
    "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" d "}, a, b, " add ", 1, 1, 0, 0;\n\t"                              \
    "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" e "}, x, y, " add ", 1, 1, 0, 0;\n\t"
#define BLDM_BOTH(shape, d, e, a, b, x, y)                                                                                     \
    "{\n\t.reg .b32 u, v;\n\t.reg .b64 a, b, x, y;\n\twgmma.fence.sync.aligned;\n\t"                                          \
    BLDM_BOTH_STEP("0", "0", shape, d, e, a, b, x, y) BLDM_BOTH_STEP("2", "1", shape, d, e, a, b, x, y)                          \
    BLDM_BOTH_STEP("4", "1", shape, d, e, a, b, x, y) BLDM_BOTH_STEP("6", "1", shape, d, e, a, b, x, y)                          \
    "wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n\t}"

// d = a b^T and e = x y^T over 64 of k, a and x of 64 rows, b and y of 64 or 80; waits for these results and all before.
__device__ __forceinline__ void multiply_both(float (&d)[32], float (&e)[32], uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
    asm volatile(BLDM_BOTH("m64n64k16", BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") "%30, %31",
                           "%32, %33, %34, %35, %36, %37, %38, %39, " BLDM_TEN("4") BLDM_TEN("5") "%60, %61, %62, %63", "64", "65", "66",
                           "67")
                 : BLDM_16("=f", d, 0), BLDM_16("=f", d, 16), BLDM_16("=f", e, 0), BLDM_16("=f", e, 16)
                 : "r"(a), "r"(b), "r"(x), "r"(y)
                 : "memory");
}
__device__ __forceinline__ void multiply_both(float (&d)[40], float (&e)[40], uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
    asm volatile(BLDM_BOTH("m64n80k16", BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39",
                           BLDM_TEN("4") BLDM_TEN("5") BLDM_TEN("6") "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79", "80", "81", "82",
                           "83")
                 : BLDM_16("=f", d, 0), BLDM_16("=f", d, 16), BLDM_4("=f", d, 32), BLDM_4("=f", d, 36), BLDM_16("=f", e, 0),
                   BLDM_16("=f", e, 16), BLDM_4("=f", e, 32), BLDM_4("=f", e, 36)
                 : "r"(a), "r"(b), "r"(x), "r"(y)
                 : "memory");
}

// Here rows are k, 16 of them 2048 bytes; the last 1 says so.
#define BLDM_VALUES_STEP(at, weights, b)                                                                                       \
    "add.u32 x, %" b ", " at ";\n\tmov.b64 b, {x, 0x40000040};\n\t"                                                             \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") "%30, %31}, {" weights     \
    "}, b, 1, 1, 1, 1;\n\t"
#define BLDM_VALUES_BEGIN "{\n\t.reg .b32 x;\n\t.reg .b64 b;\n\twgmma.fence.sync.aligned;\n\t"
#define BLDM_VALUES_END "wgmma.commit_group.sync.aligned;\n\t}"

// d += a b: a of 64 rows and 64, 80 or 16 of k in registers, in pairs of neighbours (of 16 of k, rows i % 2 * 8 and k i / 2 * 8 on),
// b of as many rows with 64 columns. It goes on behind the call, until `wait_values`.
__device__ __forceinline__ void multiply_values(float (&d)[32], const uint32_t (&a)[16], uint32_t b) {
    asm volatile(BLDM_VALUES_BEGIN BLDM_VALUES_STEP("0", "%32, %33, %34, %35", "48")
                     BLDM_VALUES_STEP("128", "%36, %37, %38, %39", "48") BLDM_VALUES_STEP("256", "%40, %41, %42, %43", "48")
                         BLDM_VALUES_STEP("384", "%44, %45, %46, %47", "48") BLDM_VALUES_END
                 : BLDM_16("+f", d, 0), BLDM_16("+f", d, 16)
                 : BLDM_16("r", a, 0), "r"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_values(float (&d)[32], const uint32_t (&a)[20], uint32_t b) {
    asm volatile(BLDM_VALUES_BEGIN BLDM_VALUES_STEP("0", "%32, %33, %34, %35", "52")
                     BLDM_VALUES_STEP("128", "%36, %37, %38, %39", "52") BLDM_VALUES_STEP("256", "%40, %41, %42, %43", "52")
                         BLDM_VALUES_STEP("384", "%44, %45, %46, %47", "52") BLDM_VALUES_STEP("512", "%48, %49, %50, %51", "52")
                             BLDM_VALUES_END
                 : BLDM_16("+f", d, 0), BLDM_16("+f", d, 16)
                 : BLDM_16("r", a, 0), BLDM_4("r", a, 16), "r"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_values(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
    asm volatile(BLDM_VALUES_BEGIN BLDM_VALUES_STEP("0", "%32, %33, %34, %35", "36") BLDM_VALUES_END
                 : BLDM_16("+f", d, 0), BLDM_16("+f", d, 16)
                 : BLDM_4("r", a, 0), "r"(b)
                 : "memory");
}
// Until all products have ended, those that lead to d among them.
__device__ __forceinline__ void wait_values(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : BLDM_16("+f", d, 0), BLDM_16("+f", d, 16)::"memory");
}

// 32 bytes of k of a product: `at` is where they are in the rows.
#define BLDM_STAGE_STEP(at, add, shape, orders, d, a, b)                                                                       \
    "add.u32 x, %" a ", " at ";\n\tadd.u32 y, %" b ", " at ";\n\tmov.b64 a, {x, 0x40000040};\n\tmov.b64 b, {y, 0x40000040};\n\t" \
    "wgmma.mma_async.sync.aligned." shape " {" d "}, a, b, " add ", 1, 1" orders ";\n\t"
#define BLDM_STAGE(shape, orders, d, a, b, add)                                                                                \
    "{\n\t.reg .pred p;\n\t.reg .b32 x, y;\n\t.reg .b64 a, b;\n\tsetp.ne.u32 p, %" add ", 0;\n\t"                              \
    BLDM_STAGE_STEP("0", "p", shape, orders, d, a, b) BLDM_STAGE_STEP("2", "1", shape, orders, d, a, b)                          \
    BLDM_STAGE_STEP("4", "1", shape, orders, d, a, b) BLDM_STAGE_STEP("6", "1", shape, orders, d, a, b) "}"
#define BLDM_IN_E4M3(columns) "m64n" columns "k32.f32.e4m3.e4m3", ""
#define BLDM_IN_BFLOAT16(columns) "m64n" columns "k16.f32.bf16.bf16", ", 0, 0"
#define BLDM_EITHER(columns, registers, results)                                                                                \
    if constexpr (kLow)                                                                                                        \
        asm volatile(BLDM_APPLY(BLDM_STAGE, BLDM_IN_E4M3(columns), registers) : results : "r"(a), "r"(b), "r"(added) : "memory"); \
    else                                                                                                                       \
        asm volatile(BLDM_APPLY(BLDM_STAGE, BLDM_IN_BFLOAT16(columns), registers) : results : "r"(a), "r"(b), "r"(added) : "memory")
#define BLDM_APPLY(form, ...) form(__VA_ARGS__)
#define BLDM_LIST(...) __VA_ARGS__

// d = a b^T, or with `added` d += a b^T, over k of 128 bytes, in e4m3 (kLow) or bfloat16: a of 64 rows, b of 8, 64, 128 or 192.
// Between `begin_products` and `commit_products`; results are there behind `wait_products` and `settle`.
template <bool kLow>
__device__ __forceinline__ void multiply_stage(float (&d)[4], uint32_t a, uint32_t b, uint32_t added) {
    BLDM_EITHER("8", BLDM_LIST("%0, %1, %2, %3", "4", "5", "6"), BLDM_LIST(BLDM_4("+f", d, 0)));
}
template <bool kLow>
__device__ __forceinline__ void multiply_stage(float (&d)[32], uint32_t a, uint32_t b, uint32_t added) {
    BLDM_EITHER("64", BLDM_LIST(BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") "%30, %31", "32", "33", "34"),
                BLDM_LIST(BLDM_16("+f", d, 0), BLDM_16("+f", d, 16)));
}
template <bool kLow>
__device__ __forceinline__ void multiply_stage(float (&d)[64], uint32_t a, uint32_t b, uint32_t added) {
    BLDM_EITHER("128",
                BLDM_LIST(BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") BLDM_TEN("3") BLDM_TEN("4") BLDM_TEN("5") "%60, %61, %62, %63",
                          "64", "65", "66"),
                BLDM_LIST(BLDM_64("+f", d, 0)));
}
template <bool kLow>
__device__ __forceinline__ void multiply_stage(float (&d)[96], uint32_t a, uint32_t b, uint32_t added) {
    BLDM_EITHER("192",
                BLDM_LIST(BLDM_TEN("") BLDM_TEN("1") BLDM_TEN("2") BLDM_TEN("3") BLDM_TEN("4") BLDM_TEN("5") BLDM_TEN("6")
                              BLDM_TEN("7") BLDM_TEN("8") "%90, %91, %92, %93, %94, %95",
                          "96", "97", "98"),
                BLDM_LIST(BLDM_64("+f", d, 0), BLDM_16("+f", d, 64), BLDM_16("+f", d, 80)));
}

// Behind `wait_products`, so that the compiler uses no results before.
__device__ __forceinline__ void settle(float (&d)[4]) { asm volatile("" : BLDM_4("+f", d, 0)); }
__device__ __forceinline__ void settle(float (&d)[32]) { asm volatile("" : BLDM_16("+f", d, 0), BLDM_16("+f", d, 16)); }
__device__ __forceinline__ void settle(float (&d)[64]) { asm volatile("" : BLDM_64("+f", d, 0)); }
__device__ __forceinline__ void settle(float (&d)[96]) {
    asm volatile("" : BLDM_64("+f", d, 0), BLDM_16("+f", d, 64), BLDM_16("+f", d, 80));
}

#undef BLDM_TEN
#undef BLDM_HUNDRED
#undef BLDM_4
#undef BLDM_16
#undef BLDM_64
#undef BLDM_SCORES_STEP
#undef BLDM_SCORES
#undef BLDM_BOTH_STEP
#undef BLDM_BOTH
#undef BLDM_VALUES_STEP
#undef BLDM_VALUES_BEGIN
#undef BLDM_VALUES_END
#undef BLDM_STAGE_STEP
#undef BLDM_STAGE
#undef BLDM_IN_E4M3
#undef BLDM_IN_BFLOAT16
#undef BLDM_EITHER
#undef BLDM_APPLY
#undef BLDM_LIST

}  // namespace bldm::cuda
