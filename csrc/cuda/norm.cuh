// LayerNorm behind a product, whose weights' rows add up to 0: what is left of it is one factor a row.
#pragma once

#include "cuda/cluster.cuh"

namespace bldm::cuda {

// The reciprocal deviation of a row of the stream, times the scale of the product: what the row's sums are multiplied by.
__device__ __forceinline__ float scale_behind_norm(float mean, float mean_square, float eps, float of_product) {
    return rsqrtf(fmaxf(mean_square - mean * mean, 0) + eps) * of_product;
}

}  // namespace bldm::cuda
