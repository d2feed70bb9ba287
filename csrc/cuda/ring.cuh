// A ring of stages in shared memory.
#pragma once

#include <cstdint>

namespace bldm::cuda {

// A warp's place in it.
template <int kStages>
struct RingPlace {
    uint32_t slot = 0, parity = 0;

    __device__ void advance() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
};

}  // namespace bldm::cuda
