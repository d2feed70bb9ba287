// hamming_distance and hamming_topk.
#include <vector>

#include "cpu/groups.h"

namespace bldm::BLDM_ISA {

namespace {

BLDM_INLINE int32_t distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
    int64_t total = 0, i = 0;
    for (; i + 8 <= bytes; i += 8)
        total += __builtin_popcountll(load_as<uint64_t>(a + i) ^ load_as<uint64_t>(b + i));
    for (; i < bytes; ++i) total += __builtin_popcount(uint32_t(a[i] ^ b[i]));
    return int32_t(total);
}

// The k smallest of all distances by counting sort: stable, so equal ones come in order of index.
void nearest(const std::vector<int32_t>& all, int64_t bytes, int64_t k, int32_t* distances, int64_t* indices) {
    std::vector<int64_t> position(size_t(8 * bytes + 2), 0);  // position[d]: where the next sample at distance d goes
    for (const int32_t d : all) ++position[size_t(d) + 1];
    for (size_t d = 1; d < position.size(); ++d) position[d] += position[d - 1];
    for (size_t i = 0; i < all.size(); ++i) {
        const int64_t p = position[size_t(all[i])];
        if (p >= k) continue;
        ++position[size_t(all[i])];
        distances[p] = all[i];
        indices[p] = int64_t(i);
    }
}

}  // namespace

void hamming_distance(const uint8_t* a, const uint8_t* b, int64_t batch, int64_t b_samples, int64_t bytes, int32_t* out,
                      int threads) {
#pragma omp parallel for num_threads(threads) if (batch * bytes > 8 * kSerialBytes)
    for (int64_t i = 0; i < batch; ++i) out[i] = distance(a + i * bytes, b + (b_samples > 1 ? i * bytes : 0), bytes);
}

void hamming_topk(const uint8_t* queries, const uint8_t* database, int64_t num_queries, int64_t num_samples, int64_t bytes,
                  int64_t k, int32_t* distances, int64_t* indices, int threads) {
    const bool many = num_queries >= threads;  // a query for each thread, or all threads on one query
#pragma omp parallel num_threads(threads) if (many)
    {
        std::vector<int32_t> all(static_cast<size_t>(num_samples));
#pragma omp for
        for (int64_t q = 0; q < num_queries; ++q) {
            hamming_distance(database, queries + q * bytes, num_samples, 1, bytes, all.data(), many ? 1 : threads);
            nearest(all, bytes, k, distances + q * k, indices + q * k);
        }
    }
}

}  // namespace bldm::BLDM_ISA
