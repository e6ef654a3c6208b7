#include "python/tensors.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "common/pointer.h"

namespace gradsel {
namespace {

using Handle = void*;
using Error = int32_t;

struct Shims {
  Error (*from_python)(void*, Handle*) = nullptr;
  Error (*remove)(Handle) = nullptr;
  Error (*data_ptr)(Handle, void**) = nullptr;
  Error (*numel)(Handle, int64_t*) = nullptr;
  Error (*dim)(Handle, int64_t*) = nullptr;
  Error (*sizes)(Handle, int64_t**) = nullptr;
  Error (*strides)(Handle, int64_t**) = nullptr;
  Error (*dtype)(Handle, int32_t*) = nullptr;
  Error (*layout)(Handle, int32_t*) = nullptr;
};

Shims shim;
int32_t strided_layout = 0;

#define GRADSEL_SHIMS(X)                            \
  X(from_python, "torch_tensor_from_pyobject")      \
  X(remove, "aoti_torch_delete_tensor_object")      \
  X(data_ptr, "aoti_torch_get_data_ptr")            \
  X(numel, "aoti_torch_get_numel")                  \
  X(dim, "aoti_torch_get_dim")                      \
  X(sizes, "aoti_torch_get_sizes")                  \
  X(strides, "aoti_torch_get_strides")              \
  X(dtype, "aoti_torch_get_dtype")                  \
  X(layout, "aoti_torch_get_layout")

constexpr const char* kStridedLayout = "aoti_torch_layout_strided";

// Python's objects, held for as long as the process lives.
PyTypeObject* tensor_type = nullptr;
PyGetSetDescrObject *grad_getter = nullptr, *version_getter = nullptr;
PyObject* incrementer = nullptr;
PyObject *data_ptr_name, *numel_name, *shape_name, *stride_name, *dtype_name, *layout_name;
PyObject* strided = nullptr;

Owned required(PyObject* made) {
  if (!made) throw PythonError{};
  return Owned(made);
}

[[noreturn]] void refused(const char* what) {
  PyErr_Format(PyExc_RuntimeError, "torch cannot tell %s", what);
  throw PythonError{};
}

void expect(Error error, const char* what) {
  if (error) refused(what);
}

// A handle of torch's on a Python tensor.
class Opened {
 public:
  explicit Opened(PyObject* tensor) { expect(shim.from_python(tensor, &handle_), "what a tensor is"); }
  ~Opened() { shim.remove(handle_); }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;
  Handle get() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};

PyGetSetDescrObject* getter(PyTypeObject* type, const char* name) {
  for (PyTypeObject* base = type; base; base = base->tp_base) {
    Owned dict = required(PyObject_GetAttrString(reinterpret_cast<PyObject*>(base), "__dict__"));
    Owned found(PyMapping_GetItemString(dict.get(), name));
    if (!found) {
      PyErr_Clear();
      continue;
    }
    if (!PyObject_TypeCheck(found.get(), &PyGetSetDescr_Type)) break;
    Py_INCREF(found.get());
    return reinterpret_cast<PyGetSetDescrObject*>(found.get());
  }
  PyErr_Format(PyExc_RuntimeError, "torch.Tensor.%s is no getter of C++", name);
  throw PythonError{};
}

Owned got(PyGetSetDescrObject* from, PyObject* tensor) {
  return required(from->d_getset->get(tensor, from->d_getset->closure));
}

int64_t as_integer(const Owned& number) {
  const int64_t value = PyLong_AsLongLong(number.get());
  if (value == -1 && PyErr_Occurred()) throw PythonError{};
  return value;
}

Owned called(PyObject* tensor, PyObject* name) { return required(PyObject_CallMethodNoArgs(tensor, name)); }

Owned attribute(PyObject* tensor, PyObject* name) { return required(PyObject_GetAttr(tensor, name)); }

std::vector<int64_t> as_integers(const Owned& sequence) {
  Owned fast = required(PySequence_Fast(sequence.get(), "sizes are a sequence"));
  std::vector<int64_t> numbers;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.get()); ++i)
    numbers.push_back(as_integer(Owned::borrowed(PySequence_Fast_GET_ITEM(fast.get(), i))));
  return numbers;
}

bool read_form_by_methods(PyObject* tensor, Form& form) {
  if (attribute(tensor, layout_name).get() != strided) return false;
  form.address = as_integer(called(tensor, data_ptr_name));
  form.dtype = reinterpret_cast<intptr_t>(attribute(tensor, dtype_name).get());  // dtypes live for ever
  form.shape = as_integers(attribute(tensor, shape_name));
  form.strides = as_integers(called(tensor, stride_name));
  return true;
}

bool read_form_of(Handle tensor, Form& form) {
  int32_t layout = 0, dtype = 0;
  expect(shim.layout(tensor, &layout), "a tensor's layout");
  if (layout != strided_layout) return false;
  void* data = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  expect(shim.data_ptr(tensor, &data), "where a tensor lies");
  expect(shim.dtype(tensor, &dtype), "a tensor's dtype");
  expect(shim.dim(tensor, &dim), "a tensor's shape");
  expect(shim.sizes(tensor, &sizes), "a tensor's shape");
  expect(shim.strides(tensor, &strides), "a tensor's strides");
  form.address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  form.dtype = dtype;
  form.shape.assign(sizes, sizes + dim);
  form.strides.assign(strides, strides + dim);
  return true;
}

}  // namespace

std::vector<std::string> shims() {
  std::vector<std::string> names;
#define GRADSEL_NAME(field, name) names.push_back(name);
  GRADSEL_SHIMS(GRADSEL_NAME)
#undef GRADSEL_NAME
  names.push_back(kStridedLayout);
  return names;
}

void use_torch(PyObject* type, PyObject* increment_version, const std::unordered_map<std::string, int64_t>& functions) {
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  Py_INCREF(type);
  grad_getter = getter(tensor_type, "grad");
  version_getter = getter(tensor_type, "_version");
  incrementer = increment_version;
  Py_INCREF(incrementer);
  const std::pair<PyObject**, const char*> names[] = {
      {&data_ptr_name, "data_ptr"}, {&numel_name, "numel"},   {&shape_name, "shape"},  {&stride_name, "stride"},
      {&dtype_name, "dtype"},       {&layout_name, "layout"}};
  for (const auto& [to, name] : names) *to = PyUnicode_InternFromString(name);
  Owned torch = required(PyImport_ImportModule("torch"));
  strided = PyObject_GetAttrString(torch.get(), "strided");
  if (!strided) throw PythonError{};
  shim = Shims{};
  if (functions.empty()) return;
#define GRADSEL_TAKE(field, name) shim.field = reinterpret_cast<decltype(shim.field)>(pointer<void>(functions.at(name)));
  GRADSEL_SHIMS(GRADSEL_TAKE)
#undef GRADSEL_TAKE
  strided_layout = reinterpret_cast<int32_t (*)()>(pointer<void>(functions.at(kStridedLayout)))();
}

bool is_tensor(PyObject* object) { return tensor_type && PyObject_TypeCheck(object, tensor_type); }

Owned grad_of(PyObject* tensor) { return got(grad_getter, tensor); }

int64_t version_of(PyObject* tensor) { return as_integer(got(version_getter, tensor)); }

bool read_form(PyObject* tensor, Form& form) {
  return shim.from_python ? read_form_of(Opened(tensor).get(), form) : read_form_by_methods(tensor, form);
}

bool has_form(PyObject* tensor, const Form& form, int64_t& address) {
  if (!shim.from_python) {
    Form now;
    if (!read_form_by_methods(tensor, now)) return false;
    address = now.address;
    return now.dtype == form.dtype && now.shape == form.shape && now.strides == form.strides;
  }
  const Opened opened(tensor);
  const Handle handle = opened.get();
  void* data = nullptr;
  int32_t layout = 0, dtype = 0;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  expect(shim.layout(handle, &layout), "a tensor's layout");
  if (layout != strided_layout) return false;
  expect(shim.data_ptr(handle, &data), "where a tensor lies");
  expect(shim.dtype(handle, &dtype), "a tensor's dtype");
  expect(shim.dim(handle, &dim), "a tensor's shape");
  address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  if (dtype != form.dtype || static_cast<size_t>(dim) != form.shape.size()) return false;
  expect(shim.sizes(handle, &sizes), "a tensor's shape");
  expect(shim.strides(handle, &strides), "a tensor's strides");
  return std::equal(form.shape.begin(), form.shape.end(), sizes) &&
         std::equal(form.strides.begin(), form.strides.end(), strides);
}

Memory::Memory(PyObject* tensor) : object_(Owned::borrowed(tensor)) {
  if (shim.from_python) expect(shim.from_python(tensor, &handle_), "what a tensor is");
}

Memory::Memory(Memory&& other) noexcept : object_(std::move(other.object_)), handle_(other.handle_) {
  other.handle_ = nullptr;
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(object_, other.object_);
  std::swap(handle_, other.handle_);
  return *this;
}

Memory::~Memory() {
  if (handle_) shim.remove(handle_);
}

void Memory::read(int64_t& address, int64_t& numel) const {
  if (!handle_) {
    address = as_integer(called(object(), data_ptr_name));
    numel = as_integer(called(object(), numel_name));
    return;
  }
  void* data = nullptr;
  expect(shim.data_ptr(handle_, &data), "where a tensor lies");
  expect(shim.numel(handle_, &numel), "how large a tensor is");
  address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
}

void increment_versions(PyObject* tensors) { required(PyObject_CallOneArg(incrementer, tensors)); }

}  // namespace gradsel
