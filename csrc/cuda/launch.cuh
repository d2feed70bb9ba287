// Host side of a launch: errors, the device, the element type, the grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace bldm::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA: " + cudaGetErrorString(error));
}

// A stream belongs to a device: makes that one current while the launch lasts.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : device_(device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (previous_ != device_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int device_, previous_ = 0;
};

inline int processors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Launches a kernel that may start before the one in front of it has ended, so that its own start costs less: it must
// call `wait_for_inputs` before it touches memory. For small kernels, where that is a good part of the time. Devices before
// compute capability 9.0 launch it as any other.
template <class... Parameters, class... Args>
void launch_early(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int device, cudaStream_t stream,
                  const Args&... args) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.stream = stream;
    config.attrs = &early, config.numAttrs = compute_capability(device) >= 90;
    check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
}

__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Calls f with a value of the element type, whose type f reads off.
template <class F>
void with_float_type(int64_t type, F&& f) {
    switch (type) {
        case kFloat32:
            return f(float{});
        case kFloat16:
            return f(__half{});
        case kBFloat16:
            return f(__nv_bfloat16{});
        default:
            throw std::invalid_argument("unknown element type");
    }
}

// Calls f with std::true_type or std::false_type: a run-time flag made a template argument.
template <class F>
void with_flag(bool flag, F&& f) {
    if (flag)
        f(std::true_type{});
    else
        f(std::false_type{});
}

template <class T>
constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Blocks for `count` threads of work in a grid-stride loop.
inline unsigned grid_for(int64_t count, int threads) {
    return unsigned(std::min<int64_t>(ceil_div<int64_t>(count, threads), 1 << 20));
}

}  // namespace bldm::cuda
