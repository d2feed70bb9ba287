// hamming_distance, and hamming_topk's distances for few queries.
#include "cuda/samples.cuh"

namespace bldm::cuda {
namespace {

// Differing bits of two rows: the lanes of a warp take 16 bytes in turn (kVector: whole and aligned), every lane gets
// the sum.
template <bool kVector>
__device__ __forceinline__ int row_distance(const uint8_t* __restrict__ a, const uint8_t* __restrict__ b,
                                            uint32_t bytes, int lane) {
    int distance = 0;
    if constexpr (kVector) {
#pragma unroll 4
        for (uint32_t i = lane; i < bytes / 16; i += 32) {
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(a) + i),
                        y = __ldg(reinterpret_cast<const uint4*>(b) + i);
            distance += __popc(x.x ^ y.x) + __popc(x.y ^ y.y) + __popc(x.z ^ y.z) + __popc(x.w ^ y.w);
        }
    } else {
        for (uint32_t i = lane; i < (bytes + 3) / 4; i += 32)
            distance += __popc(load_chunk<false>(a, i, bytes) ^ load_chunk<false>(b, i, bytes));
    }
    return __reduce_add_sync(~0u, distance);
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    distance_kernel(const uint8_t* __restrict__ a, const uint8_t* __restrict__ b, int64_t b_stride, int64_t batch,
                    uint32_t bytes, int32_t* __restrict__ out) {
    const int lane = threadIdx.x % 32;
    const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    if (row >= batch) return;
    const int distance = row_distance<kVector>(a + row * bytes, b + row * b_stride, bytes, lane);
    if (lane == 0) out[row] = distance;
}

// One warp a sample of the database, which it compares with all of them while it is in the cache.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    few_queries(const uint8_t* __restrict__ queries, const uint8_t* __restrict__ database, int num_queries,
                int64_t num_samples, uint32_t bytes, int64_t* __restrict__ keys) {
    const int lane = threadIdx.x % 32;
    const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    if (row >= num_samples) return;
    for (int q = 0; q < num_queries; ++q) {
        const int64_t distance =
            row_distance<kVector>(database + row * bytes, queries + int64_t(q) * bytes, bytes, lane);
        if (lane == 0) keys[q * num_samples + row] = distance << 32 | row;
    }
}

}  // namespace

void hamming_distance(const uint8_t* a, const uint8_t* b, int64_t batch, int64_t b_samples, int64_t bytes, int32_t* out,
                      int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    const auto kernel =
        bytes % 16 == 0 && aligned(a, 16) && aligned(b, 16) ? distance_kernel<true> : distance_kernel<false>;
    kernel<<<unsigned(ceil_div<int64_t>(batch, kThreads / 32)), kThreads, 0, stream>>>(a, b, b_samples > 1 ? bytes : 0,
                                                                                       batch, uint32_t(bytes), out);
    check(cudaGetLastError(), "hamming_distance");
}

void hamming_keys(const uint8_t* queries, const uint8_t* database, int64_t num_queries, int64_t num_samples,
                  int64_t bytes, int64_t* keys, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    if (num_samples >= int64_t(1) << 32) throw std::invalid_argument("hamming_topk: expected less than 2^32 samples");
    const auto kernel =
        bytes % 16 == 0 && aligned(queries, 16) && aligned(database, 16) ? few_queries<true> : few_queries<false>;
    kernel<<<unsigned(ceil_div<int64_t>(num_samples, kThreads / 32)), kThreads, 0, stream>>>(
        queries, database, int(num_queries), num_samples, uint32_t(bytes), keys);
    check(cudaGetLastError(), "hamming_topk");
}

}  // namespace bldm::cuda
