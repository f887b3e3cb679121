#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fusechat {

// A C-contiguous NumPy array of exactly this dtype: pass with py::arg(...).noconvert(), so that a wrong dtype is an
// error and never a silent copy.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

void bind_align(py::module_ &m);
void bind_merge(py::module_ &m);
void bind_loss(py::module_ &m);

}  // namespace fusechat
