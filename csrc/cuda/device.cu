// What the GPU is.
#include "cuda/launch.cuh"

namespace bldm::cuda {

int64_t compute_capability(int device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
    return 10 * major + minor;
}

}  // namespace bldm::cuda
