// The table of the kernels of one instruction set.
#include <type_traits>

#include "cpu/kernels.h"

namespace bldm::BLDM_ISA {

#define BLDM_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
BLDM_KERNELS(BLDM_DECLARE)

#define BLDM_ENTRY(name) name,
extern const Kernels kernels;
const Kernels kernels = {BLDM_KERNELS(BLDM_ENTRY)};

}  // namespace bldm::BLDM_ISA
