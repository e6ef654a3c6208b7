// Python's torch tensors, read without torch's headers, so that one build serves every torch version.
//
// torch 2.14 and newer export C functions with a stable ABI for it (torch/csrc/stable/c/shim.h). Where Python has found
// them, they are called; for older versions, the methods of torch.Tensor are.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gradsel {

// A Python exception has been set.
struct PythonError {};

// An owned reference.
class Owned {
 public:
  Owned() = default;
  explicit Owned(PyObject* stolen) : object_(stolen) {}
  static Owned borrowed(PyObject* object) {
    Py_XINCREF(object);
    return Owned(object);
  }
  Owned(const Owned& other) : object_(other.object_) { Py_XINCREF(object_); }
  Owned(Owned&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Owned& operator=(Owned other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// Where a tensor lies, and how. The device is left out: an address is on one, and a gradient is where its parameter is.
struct Form {
  int64_t address = 0;
  int64_t dtype = 0;  // torch's number, or the address of the dtype object
  std::vector<int64_t> shape, strides;
};

// Looks torch's functions up. Called once, when the extension is taken into use.
//
// tensor_type: torch.Tensor. increment_version: torch's function of that name. functions: addresses of torch's C
// functions by name, none or all of those in kShims.
void use_torch(PyObject* tensor_type, PyObject* increment_version,
               const std::unordered_map<std::string, int64_t>& functions);

// Names of the C functions.
std::vector<std::string> shims();

// All throw PythonError where the tensor has no such property.

bool is_tensor(PyObject* object);

// A new reference to .grad, None included.
Owned grad_of(PyObject* tensor);

int64_t version_of(PyObject* tensor);

// A strided tensor's form; false for other layouts.
bool read_form(PyObject* tensor, Form& form);

// Whether a tensor is strided and has the dtype, shape and strides of a form, and where it lies.
bool has_form(PyObject* tensor, const Form& form, int64_t& address);

// Address and number of entries of a tensor, read again and again. It holds a reference of C++, so not to parameters:
// torch.utils.swap_tensors, by which models may be converted, refuses tensors that have any.
class Memory {
 public:
  explicit Memory(PyObject* tensor);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  PyObject* object() const { return object_.get(); }
  void read(int64_t& address, int64_t& numel) const;

 private:
  Owned object_;
  void* handle_ = nullptr;
};

// Tells autograd that tensors (a tuple of them) have been written.
void increment_versions(PyObject* tensors);

}  // namespace gradsel
