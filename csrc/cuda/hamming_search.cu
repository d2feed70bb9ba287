// The search of hamming_topk for many queries, database rows a part at a time: hamming_candidates compares all queries
// with a part on the tensor cores and keeps the pairs that are nearer than the k-th best so far, hamming_select reduces
// what was kept to the k best. popc(a ^ b) = popc(a) + popc(b) - 2 popc(a & b), and popc(a & b) is the tensor cores'
// binary product; the rows' own popc(b) is their product with ones.
#include "cuda/launch.cuh"

namespace bldm::cuda {
namespace {

constexpr int kStepBytes = 128;                   // of a row, loaded at a time
constexpr int kChunks = kStepBytes / 16;          // 16 bytes each, what one copy moves
constexpr int kWarpQueries = 64, kWarpRows = 64;  // a warp's part of the block's tile

struct Part {
    const uint8_t *queries, *rows;          // 16-byte aligned
    const uint32_t* query_bits;             // set bits of each
    uint32_t num_queries, num_rows, bytes;  // bytes a row: a multiple of 16
    int64_t first_row;                      // index of the part's first row in the database
    int64_t* keys;                          // (queries, capacity): distance << 32 | index, in any order
    int64_t capacity;
    uint32_t* counts;                    // keys of each query
    const uint32_t* limits;              // the distance from which on a row is of no interest
    uint32_t query_tiles, tiles, steps;  // tiles of all queries with some rows, tiles in all, steps a tile
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// c += popc(a & b) of 16 x 8 pairs of 256 bits. Thread 4 g + t has of A rows g and g + 8, of B row g, of each the words
// t and t + 4; of c rows g and g + 8, columns 2 t and 2 t + 1.
__device__ __forceinline__ void binary_mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
        "%1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Chunk c of row r of a stage: the eight rows that a matrix load reads at once lie in different banks.
__device__ __forceinline__ uint32_t place(int row, int chunk) { return row * kStepBytes + ((chunk ^ (row & 7)) << 4); }

// A block's tile: the queries first, then the rows of the database.
template <int kQueryWarps, int kRowWarps, int kStages_>
struct Tile {
    static constexpr int kQueries = kQueryWarps * kWarpQueries, kRows = kRowWarps * kWarpRows, kStages = kStages_;
    static constexpr int kThreads = 32 * kQueryWarps * kRowWarps, kStageBytes = (kQueries + kRows) * kStepBytes;
    // The warps of the same rows share out the counting of their set bits: so many of four groups of 16 rows each.
    static constexpr int kQueryWarpCount = kQueryWarps, kOwnGroups = 4 / kQueryWarps;
};

template <class T>
__global__ void __launch_bounds__(T::kThreads) candidates_kernel(const __grid_constant__ Part p) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint32_t row_bits[T::kRows];
    const uint32_t buffer = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_query = warp % T::kQueryWarpCount * kWarpQueries, warp_row = warp / T::kQueryWarpCount * kWarpRows;
    // Groups of 16 rows are in turned order, so that each warp's own come first.
    const auto group = [&](int i) { return warp_row + 16 * ((warp % T::kQueryWarpCount * T::kOwnGroups + i) % 4); };

    // The copies run ahead, from one tile into the next. Rows that do not exist are copies of the last one.
    uint32_t next_tile = blockIdx.x, next_step = 0;
    int next_stage = 0;
    const auto load_next = [&] {
        if (next_tile < p.tiles) {
            const uint32_t first_query = next_tile % p.query_tiles * T::kQueries,
                           first_row = next_tile / p.query_tiles * T::kRows;
            const int chunk = threadIdx.x % kChunks;
            const uint32_t byte = next_step * kStepBytes + chunk * 16, to = buffer + next_stage * T::kStageBytes;
            const bool beyond = byte >= p.bytes;
            const uint32_t from = beyond ? 0 : byte;
#pragma unroll
            for (int r = threadIdx.x / kChunks; r < T::kQueries; r += T::kThreads / kChunks)
                copy_async(to + place(r, chunk),
                           p.queries + int64_t(min(first_query + r, p.num_queries - 1)) * p.bytes + from, beyond);
#pragma unroll
            for (int r = threadIdx.x / kChunks; r < T::kRows; r += T::kThreads / kChunks)
                copy_async(to + place(T::kQueries + r, chunk),
                           p.rows + int64_t(min(first_row + r, p.num_rows - 1)) * p.bytes + from, beyond);
            if (++next_step == p.steps) next_step = 0, next_tile += gridDim.x;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        next_stage = next_stage + 1 == T::kStages ? 0 : next_stage + 1;
    };
    for (int s = 0; s < T::kStages - 1; ++s) load_next();

    int stage = 0;
    for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        int32_t common[4][8][4] = {};            // set bits in both: 16 queries x 8 rows each
        int32_t own[2 * T::kOwnGroups][4] = {};  // the rows' own: 16 times the same x 8 rows
        for (uint32_t step = 0; step < p.steps; ++step) {
            asm volatile("cp.async.wait_group %0;" ::"n"(T::kStages - 2) : "memory");
            __syncthreads();
            load_next();
            const uint32_t from = buffer + stage * T::kStageBytes;
#pragma unroll
            for (int k = 0; k < kStepBytes / 32; ++k) {
                uint32_t a[4][4], b[4][4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    load_matrices(a[i], from + place(warp_query + 16 * i + lane % 16, 2 * k + lane / 16));
                    load_matrices(b[i], from + place(T::kQueries + group(i) + lane % 8 + lane / 16 * 8,
                                                     2 * k + lane / 8 % 2));
                }
#pragma unroll
                for (int j = 0; j < 2 * T::kOwnGroups; ++j) {
                    constexpr uint32_t kOnes[4] = {~0u, ~0u, ~0u, ~0u};
                    binary_mma(own[j], kOnes, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j)
                        binary_mma(common[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
            stage = stage + 1 == T::kStages ? 0 : stage + 1;
        }

        const int row_in_group = lane % 4 * 2;  // rows row_in_group, + 1, + 8, + 9 of each
        if (lane < 4)
#pragma unroll
            for (int j = 0; j < 2 * T::kOwnGroups; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) row_bits[group(j / 2) + row_in_group + j % 2 * 8 + c] = own[j][c];
        __syncthreads();
        const uint32_t query = tile % p.query_tiles * T::kQueries + warp_query + lane / 4;
        const uint32_t first_row = tile / p.query_tiles * T::kRows;
        uint32_t bits_of[8][2];
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) bits_of[j][c] = row_bits[group(j / 2) + row_in_group + j % 2 * 8 + c];
        const auto row = [&](int j, int c) { return first_row + group(j / 2) + row_in_group + j % 2 * 8 + c; };
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t q = query + 8 * i;
            const uint32_t limit = q < p.num_queries ? p.limits[q] : 0, bits = limit ? p.query_bits[q] : 0;
            uint32_t near = 0;  // bit 2 j + c
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    if (bits + bits_of[j][c] - 2 * common[i / 2][j][i % 2 * 2 + c] < limit &&
                        row(j, c) < p.num_rows)
                        near |= 1u << (2 * j + c);
            if (!__any_sync(~0u, near)) continue;
            // The four threads of a query take their places together.
            const uint32_t count = __popc(near);
            uint32_t end = count;  // inclusive sum over the four
            for (int step = 1; step < 4; step *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, end, step, 4);
                if (lane % 4 >= step) end += other;
            }
            uint32_t first = 0;
            if (lane % 4 == 3 && end) first = atomicAdd(p.counts + q, end);
            first = __shfl_sync(~0u, first, 3, 4) + end - count;
            int64_t* to = p.keys + int64_t(q) * p.capacity + first;
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    if (near >> (2 * j + c) & 1) {
                        const uint32_t distance = bits + bits_of[j][c] - 2 * common[i / 2][j][i % 2 * 2 + c];
                        *to++ = int64_t(distance) << 32 | (p.first_row + row(j, c));
                    }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// A block a query. Finds the k-th smallest key eight bits at a time, from the top, and keeps what is not above it.
constexpr int kSelectThreads = 256;

__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(int64_t* __restrict__ all_keys, int64_t capacity, uint32_t k, int first_shift, uint32_t* counts,
                  uint32_t* limits) {
    __shared__ uint32_t histogram[256], digit, rank_left, written;
    int64_t* keys = all_keys + blockIdx.x * capacity;
    const uint32_t count = counts[blockIdx.x];
    if (count <= k) return;
    uint64_t found = 0, mask = ~uint64_t(0) << first_shift << 8;  // the digits known so far
    uint32_t rank = k;             // of the key sought among those that share them, from 1
    for (int shift = first_shift; shift >= 0; shift -= 8) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += kSelectThreads) {
            const uint64_t key = keys[i];
            if ((key & mask) == found) atomicAdd(histogram + (key >> shift & 255), 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) {  // A lane sums eight of the counts; the one whose sum reaches the rank looks closer
            uint32_t end = 0;
            for (int d = 0; d < 8; ++d) end += histogram[8 * threadIdx.x + d];
            const uint32_t own = end;
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, end, step);
                if (threadIdx.x >= step) end += other;
            }
            if (end >= rank && end - own < rank) {
                uint32_t d = 8 * threadIdx.x, left = rank - (end - own);
                while (histogram[d] < left) left -= histogram[d++];
                digit = d, rank_left = left;
            }
        }
        __syncthreads();
        found |= uint64_t(digit) << shift, mask |= uint64_t(255) << shift, rank = rank_left;
        const bool all = histogram[digit] == rank;
        __syncthreads();
        if (all) break;
    }
    // Whatever digits are left: all keys that share those known are wanted.
    const uint64_t last = found | ~mask;
    if (threadIdx.x == 0) written = 0;
    for (uint32_t first = 0; first < count; first += kSelectThreads) {
        const uint32_t i = first + threadIdx.x;
        const uint64_t key = i < count ? keys[i] : ~uint64_t(0);
        __syncthreads();  // everything up to here is read: the places before first + kSelectThreads are free
        if (key <= last) keys[atomicAdd(&written, 1)] = key;
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = k, limits[blockIdx.x] = uint32_t(last >> 32);
}

// Small enough for any GPU with these instructions; larger tiles are no faster on an H200.
using ManyQueries = Tile<2, 2, 3>;
using FewQueries = Tile<1, 4, 2>;

template <class T>
void launch(Part p, int device, cudaStream_t stream) {
    constexpr int kShared = T::kStages * T::kStageBytes;
    p.query_tiles = ceil_div<uint32_t>(p.num_queries, T::kQueries);
    p.tiles = p.query_tiles * ceil_div<uint32_t>(p.num_rows, T::kRows);
    p.steps = ceil_div<uint32_t>(p.bytes, kStepBytes);
    const auto kernel = candidates_kernel<T>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "hamming_topk");
    int processors = 0, blocks = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "hamming_topk");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, T::kThreads, kShared), "hamming_topk");
    kernel<<<std::min(p.tiles, uint32_t(processors * blocks)), T::kThreads, kShared, stream>>>(p);
}

}  // namespace

void hamming_candidates(const uint8_t* queries, const uint8_t* rows, const uint32_t* query_bits,
                        int64_t num_queries, int64_t num_rows, int64_t bytes, int64_t first_row, int64_t* keys,
                        int64_t capacity, uint32_t* counts, const uint32_t* limits, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    if (first_row + num_rows > int64_t(1) << 32)
        throw std::invalid_argument("hamming_topk: expected at most 2^32 samples");
    if (bytes % 16 || !aligned(queries, 16) || !aligned(rows, 16))
        throw std::invalid_argument("hamming_topk: rows are not aligned to 16 bytes");
    const Part p{queries,   rows, query_bits, uint32_t(num_queries), uint32_t(num_rows), uint32_t(bytes),
                 first_row, keys, capacity,   counts,                limits,             0,
                 0,         0};
    if (num_queries > FewQueries::kQueries)
        launch<ManyQueries>(p, device, stream);
    else
        launch<FewQueries>(p, device, stream);
    check(cudaGetLastError(), "hamming_topk");
}

void hamming_select(int64_t* keys, int64_t num_queries, int64_t capacity, int64_t k, int64_t max_distance,
                    uint32_t* counts, uint32_t* limits, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    int first_shift = 32;  // the highest digit that is not 0 everywhere
    while (max_distance >> (first_shift - 24)) first_shift += 8;
    select_kernel<<<unsigned(num_queries), kSelectThreads, 0, stream>>>(keys, capacity, uint32_t(k), first_shift,
                                                                        counts, limits);
    check(cudaGetLastError(), "hamming_topk");
}

}  // namespace bldm::cuda
