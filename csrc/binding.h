// Python bindings of plain functions: a pointer parameter arrives as an integer address (0: none), the GIL is released.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace bldm {

// What Python passes for a C++ parameter.
template <class T>
using Wire = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T from_wire(Wire<T> value) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(value);
    else
        return value;
}

template <class Result, class... Args>
void bind(pybind11::module_& m, const char* name, Result (*function)(Args...)) {
    m.def(name, [function](Wire<Args>... args) {
        pybind11::gil_scoped_release unlocked;
        return function(from_wire<Args>(args)...);
    });
}

}  // namespace bldm
