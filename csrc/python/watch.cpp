#include "python/watch.h"

#include "common/pointer.h"

namespace gradsel {
namespace {

void require_tensor(PyObject* object) {
  if (is_tensor(object)) return;
  PyErr_Format(PyExc_TypeError, "expected a torch.Tensor, got %s", Py_TYPE(object)->tp_name);
  throw PythonError{};
}

void require(bool good, const char* message) {
  if (good) return;
  PyErr_SetString(PyExc_TypeError, message);
  throw PythonError{};
}

void set_version(PyObject* noted, Py_ssize_t at, PyObject* tensor, int64_t version, int64_t address) {
  Owned number(PyLong_FromLongLong(version));
  if (!number) throw PythonError{};
  if (PyList_Check(noted)) {
    if (at >= PyList_GET_SIZE(noted)) return;  // it has been emptied, which the caller notices by a link
    Py_INCREF(number.get());
    if (PyList_SetItem(noted, at, number.get()) < 0) throw PythonError{};
    return;
  }
  Owned both(Py_BuildValue("(OL)", number.get(), static_cast<long long>(address)));
  if (!both || PyDict_SetItem(noted, tensor, both.get()) < 0) throw PythonError{};
}

}  // namespace

void Watch::link(PyObject* dict, PyObject* key, PyObject* object) {
  require(PyDict_Check(dict), "a link is an entry of a dict");
  const Py_hash_t hash = PyObject_Hash(key);
  if (hash == -1) throw PythonError{};
  links_.push_back({Owned::borrowed(dict), Owned::borrowed(key), Owned::borrowed(object), hash});
}

void Watch::list(PyObject* list) {
  require(PyList_Check(list), "expected a list");
  List watched{Owned::borrowed(list), {}};
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i)
    watched.objects.push_back(Owned::borrowed(PyList_GET_ITEM(list, i)));
  lists_.push_back(std::move(watched));
}

void Watch::parameter(PyObject* tensor) {
  require_tensor(tensor);
  Parameter watched{Owned::borrowed(tensor), {}};
  require(read_form(tensor, watched.form), "a parameter is not strided");
  parameters_.push_back(std::move(watched));
}

void Watch::state(PyObject* tensor) {
  require_tensor(tensor);
  State watched{Memory(tensor), 0, 0};
  watched.memory.read(watched.address, watched.numel);
  states_.push_back(std::move(watched));
}

void Watch::without_grad(PyObject* parameter) {
  require_tensor(parameter);
  without_grad_.push_back(Owned::borrowed(parameter));
}

void Watch::grad(PyObject* parameter, int64_t word, int64_t offset) {
  require_tensor(parameter);
  Grad watched;
  watched.parameter = Owned::borrowed(parameter);
  watched.word = word;
  watched.offset = offset;
  Owned grad = grad_of(parameter);
  require(is_tensor(grad.get()) && read_form(grad.get(), watched.form), "a gradient is not strided");
  grads_.push_back(std::move(watched));
}

void Watch::written(PyObject* tensor, PyObject* noted, Py_ssize_t at) {
  require_tensor(tensor);
  require(noted == Py_None || PyList_Check(noted) || PyDict_Check(noted), "versions are noted in a list or dict");
  Written watched;
  watched.tensor = Owned::borrowed(tensor);
  watched.noted = noted == Py_None ? Owned() : Owned::borrowed(noted);
  watched.at = at;
  int64_t numel = 0;
  Memory(tensor).read(watched.address, numel);
  watched.version = version_of(tensor);
  written_.push_back(std::move(watched));
  written_tuple_ = Owned();
}

bool Watch::links_hold() const {
  for (const Link& link : links_) {
    PyObject* found = _PyDict_GetItem_KnownHash(link.dict.get(), link.key.get(), link.hash);  // borrowed
    if (found != link.object.get()) {
      if (!found && PyErr_Occurred()) throw PythonError{};
      return false;
    }
  }
  return true;
}

bool Watch::lists_hold() const {
  for (const List& watched : lists_) {
    PyObject* list = watched.list.get();
    if (PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(watched.objects.size())) return false;
    for (size_t i = 0; i < watched.objects.size(); ++i)
      if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)) != watched.objects[i].get()) return false;
  }
  return true;
}

bool Watch::tensors_hold() {
  int64_t address = 0, numel = 0;
  for (const Parameter& watched : parameters_)
    if (!has_form(watched.tensor.get(), watched.form, address) || address != watched.form.address) return false;
  for (const State& watched : states_) {
    watched.memory.read(address, numel);
    if (address != watched.address || numel != watched.numel) return false;
  }
  for (const Written& watched : written_)
    if (watched.noted && version_of(watched.tensor.get()) != watched.version) return false;
  return true;
}

bool Watch::grads_hold() {
  for (const Owned& parameter : without_grad_)
    if (grad_of(parameter.get()).get() != Py_None) return false;
  for (const Grad& watched : grads_) {
    Owned grad = grad_of(watched.parameter.get());
    if (grad.get() == Py_None || !is_tensor(grad.get())) return false;
    int64_t address = 0;
    if (!has_form(grad.get(), watched.form, address)) return false;
    if (watched.word) *pointer<int64_t>(watched.word) = address + watched.offset;
  }
  return true;
}

bool Watch::holds() {
  try {
    return links_hold() && lists_hold() && tensors_hold() && grads_hold();
  } catch (const PythonError&) {  // a tensor is no longer what it was, such as one without memory
    PyErr_Clear();
    return false;
  }
}

void Watch::done() {
  if (!written_tuple_) {
    Owned made(PyTuple_New(static_cast<Py_ssize_t>(written_.size())));
    if (!made) throw PythonError{};
    for (size_t i = 0; i < written_.size(); ++i) {
      Py_INCREF(written_[i].tensor.get());
      PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), written_[i].tensor.get());
    }
    written_tuple_ = std::move(made);
  }
  increment_versions(written_tuple_.get());
  for (Written& watched : written_)
    if (watched.noted)
      set_version(watched.noted.get(), watched.at, watched.tensor.get(), ++watched.version, watched.address);
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const Link& link : links_) {
    Py_VISIT(link.dict.get());
    Py_VISIT(link.key.get());
    Py_VISIT(link.object.get());
  }
  for (const List& watched : lists_) {
    Py_VISIT(watched.list.get());
    for (const Owned& object : watched.objects) Py_VISIT(object.get());
  }
  for (const Parameter& watched : parameters_) Py_VISIT(watched.tensor.get());
  for (const State& watched : states_) Py_VISIT(watched.memory.object());
  for (const Owned& parameter : without_grad_) Py_VISIT(parameter.get());
  for (const Grad& watched : grads_) Py_VISIT(watched.parameter.get());
  for (const Written& watched : written_) {
    Py_VISIT(watched.tensor.get());
    Py_VISIT(watched.noted.get());
  }
  Py_VISIT(written_tuple_.get());
  return 0;
}

void Watch::clear() { *this = Watch(); }

}  // namespace gradsel
