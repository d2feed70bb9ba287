// Submodule `cpu`: the kernels of the best instruction set this processor has; BLDM_CPU_ISA=portable|avx2|avx512 asks for one.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding.h"
#include "build_info.h"  // written by setup.py
#include "cpu/kernels.h"

namespace {

struct Isa {
    const char* name;
    bool supported;
    const bldm::Kernels* kernels;
};

// From plain to fast.
std::vector<Isa> isas() {
    std::vector<Isa> all = {{"portable", true, &bldm::portable::kernels}};
#if BLDM_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    all.push_back({"avx2", avx2, &bldm::avx2::kernels});
    all.push_back({"avx512", avx512, &bldm::avx512::kernels});
#endif
    return all;
}

Isa choose() {
    const char* wanted = std::getenv("BLDM_CPU_ISA");
    Isa best{};
    for (const Isa& isa : isas()) {
        if (!wanted || !*wanted) {
            if (isa.supported) best = isa;
        } else if (wanted == std::string(isa.name)) {
            if (!isa.supported) throw std::runtime_error("BLDM_CPU_ISA: this processor has no " + std::string(wanted));
            best = isa;
        }
    }
    if (!best.kernels) throw std::runtime_error("BLDM_CPU_ISA: no such kernels: " + std::string(wanted));
    return best;
}

}  // namespace

void register_cpu(pybind11::module_& m) {
    const Isa isa = choose();
    pybind11::list supported;
    for (const Isa& one : isas())
        if (one.supported) supported.append(one.name);
    m.attr("isa") = isa.name;
    m.attr("supported_isas") = supported;
#define BLDM_BIND(name) bldm::bind(m, #name, isa.kernels->name);
    BLDM_KERNELS(BLDM_BIND)
}
