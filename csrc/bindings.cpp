// The Python module fusechat._native: one sub-binding per room of csrc/.
#include "bindings.hpp"

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    m.doc() = "fusechat's compiled engine";
    fusechat::bind_align(m);
    fusechat::bind_merge(m);
    fusechat::bind_loss(m);
}
