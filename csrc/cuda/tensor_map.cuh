// Host side of copies of boxes: the map of a tensor.
#pragma once

#include <cudaTypedefs.h>

#include "cuda/warpgroup.cuh"

namespace bldm::cuda {

// The driver's function, without linking to the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Of a contiguous tensor (samples, rows, columns) in bfloat16, or of bytes; boxes of 128 bytes of box_rows rows.
inline TensorMap map_of(const void* tensor, bool bytes, int64_t samples, int64_t rows, int64_t columns, int box_rows) {
    static const auto encode = tensor_map_encoder();
    const int size = bytes ? 1 : 2;
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(samples)};
    const cuuint64_t strides[] = {cuuint64_t(size * columns), cuuint64_t(size * columns * rows)};  // bytes, of rows and samples
    const cuuint32_t box[] = {cuuint32_t(128 / size), cuuint32_t(box_rows), 1}, steps[] = {1, 1, 1};
    TensorMap map;
    const CUresult result =
        encode(&map, bytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(tensor), sizes,
               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: " + std::to_string(int(result)));
    return map;
}

}  // namespace bldm::cuda
