// The Python module vlm_fast._hopper. Tensors are passed as addresses, so that one build works with
// every version of torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "hopper_gemms.h"

namespace py = pybind11;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void check(const char* name, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("vlm_fast ") + name + ": " + error);
}

}  // namespace

PYBIND11_MODULE(_hopper, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "linear_gelu",
      [](uintptr_t x, int64_t x_row, uintptr_t weight, uintptr_t bias, uintptr_t z, uintptr_t h,
         int64_t rows, int64_t hidden, int64_t inner, uintptr_t stream) {
        check("linear_gelu",
              vlm_fast::linear_gelu(pointer(x), x_row, pointer(weight), pointer(bias), pointer(z),
                                    pointer(h), rows, hidden, inner, pointer(stream)));
      },
      py::arg("x_ptr"), py::arg("x_row"), py::arg("weight_ptr"), py::arg("bias_ptr"),
      py::arg("z_ptr"), py::arg("h_ptr"), py::arg("rows"), py::arg("hidden"), py::arg("inner"),
      py::arg("stream"), without_gil);

  m.def(
      "gelu_backward",
      [](uintptr_t dy, int64_t dy_row, uintptr_t weight, uintptr_t z, uintptr_t dz, uintptr_t h,
         uintptr_t bias_sums, int64_t rows, int64_t hidden, int64_t out, uintptr_t stream) {
        check("gelu_backward",
              vlm_fast::gelu_backward(pointer(dy), dy_row, pointer(weight), pointer(z), pointer(dz),
                                      pointer(h), pointer(bias_sums), rows, hidden, out,
                                      pointer(stream)));
      },
      py::arg("dy_ptr"), py::arg("dy_row"), py::arg("weight_ptr"), py::arg("z_ptr"),
      py::arg("dz_ptr"), py::arg("h_ptr"), py::arg("bias_sums_ptr"), py::arg("rows"),
      py::arg("hidden"), py::arg("out"), py::arg("stream"), without_gil);
}
