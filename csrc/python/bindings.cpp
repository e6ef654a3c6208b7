#include "python/bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <unordered_map>

#include "python/tensors.h"
#include "python/watch.h"

namespace py = pybind11;

namespace {

using gradsel::Watch;

template <class Function>
auto raising(Function function) {
  try {
    return function();
  } catch (const gradsel::PythonError&) {
    throw py::error_already_set();
  }
}

bool is_constructed(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!is_constructed(self)) return 0;
  return py::cast<Watch*>(py::handle(self))->traverse(visit, arg);
}

int clear(PyObject* self) {
  if (is_constructed(self)) py::cast<Watch*>(py::handle(self))->clear();
  return 0;
}

void collected(PyHeapTypeObject* type) {
  type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->ht_type.tp_traverse = traverse;
  type->ht_type.tp_clear = clear;
}

}  // namespace

void bind_python(py::module_& m) {
  m.def("shims", &gradsel::shims);
  m.def("use_torch", [](py::object tensor_type, py::object increment_version,
                        const std::unordered_map<std::string, int64_t>& functions) {
    raising([&] { gradsel::use_torch(tensor_type.ptr(), increment_version.ptr(), functions); });
  });
  py::class_<Watch>(m, "Watch", py::custom_type_setup(collected))
      .def(py::init<>())
      .def("link", [](Watch& w, py::object dict, py::object key,
                      py::object object) { raising([&] { w.link(dict.ptr(), key.ptr(), object.ptr()); }); })
      .def("list", [](Watch& w, py::object list) { raising([&] { w.list(list.ptr()); }); })
      .def("parameter", [](Watch& w, py::object tensor) { raising([&] { w.parameter(tensor.ptr()); }); })
      .def("state", [](Watch& w, py::object tensor) { raising([&] { w.state(tensor.ptr()); }); })
      .def("without_grad", [](Watch& w, py::object parameter) { raising([&] { w.without_grad(parameter.ptr()); }); })
      .def("grad", [](Watch& w, py::object parameter, int64_t word,
                      int64_t offset) { raising([&] { w.grad(parameter.ptr(), word, offset); }); })
      .def("written", [](Watch& w, py::object tensor, py::object noted,
                         int64_t at) { raising([&] { w.written(tensor.ptr(), noted.ptr(), at); }); })
      .def("holds", &Watch::holds)
      .def("done", [](Watch& w) { raising([&] { w.done(); }); });
}
