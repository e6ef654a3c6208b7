// The Python module gradsel_emulated: the product's host functions over emulated kernels, and the emulator's controls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"
#include "cuda/launch.h"

namespace py = pybind11;

// Kernels without host functions of their own get by with this one.
__attribute__((weak)) void bind_cuda(py::module_&) {}

namespace {

// Any kernel whose parameters are pointers and integers; on a little-endian machine the latter may be of any size.
void launch(const std::string& kernel, unsigned grid, unsigned block, unsigned shared_bytes,
            std::vector<int64_t> arguments) {
  std::vector<void*> params;
  for (int64_t& argument : arguments) params.push_back(&argument);
  py::gil_scoped_release unlocked;
  gradsel::cuda_launch({kernel.c_str(), grid, block, shared_bytes, 0, 0}, params.data());
}

void set_schedule(int schedule, uint64_t seed) {
  if (schedule < 0 || schedule > 2) throw std::invalid_argument("schedules are 0, 1 and 2");
  emulation::set_schedule(static_cast<emulation::Schedule>(schedule), seed);
}

int64_t guarded(size_t bytes) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(emulation::guarded(bytes))); }

void release(int64_t address) { emulation::release(reinterpret_cast<void*>(static_cast<intptr_t>(address))); }

}  // namespace

PYBIND11_MODULE(gradsel_emulated, m) {
  bind_cuda(m);
  m.def("launch", &launch);
  m.def("set_schedule", &set_schedule, py::arg("schedule"), py::arg("seed") = 0);
  m.def("set_multiprocessors", &emulation::set_multiprocessors);
  m.def("guarded", &guarded);
  m.def("release", &release);
}
