// The extension bldm_kernels._native: submodules cpu and cuda, whichever were built; build_info says why one was not.
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py

#if BLDM_WITH_CPU
void register_cpu(pybind11::module_& m);
#endif
#if BLDM_WITH_CUDA
void register_cuda(pybind11::module_& m);
#endif

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of bldm_kernels: addresses, sizes and a stream; no PyTorch inside.";
    pybind11::dict info;
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
#if BLDM_WITH_CPU
    pybind11::module_ cpu = m.def_submodule("cpu", "C++ kernels");
    register_cpu(cpu);
#else
    info["no_cpu"] = BLDM_NO_CPU;
#endif
#if BLDM_WITH_CUDA
    pybind11::module_ cuda = m.def_submodule("cuda", "CUDA kernels");
    register_cuda(cuda);
    info["cuda_archs"] = BLDM_CUDA_ARCHS;
#else
    info["no_cuda"] = BLDM_NO_CUDA;
#endif
    m.attr("build_info") = info;
}
