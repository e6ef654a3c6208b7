// What a step of an optimizer was made from, checked before the step is repeated.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "python/tensors.h"

namespace gradsel {

// Everything but gradients has to be as it was, down to the versions of what two owners write. Gradients may be other
// tensors of the same form; their addresses go to the kernel's table.
//
// Objects are held, so that none of them can be another one at the same address. All methods need the GIL.
class Watch {
 public:
  // dict[key] has to be the object. The hash is looked up once: that of a tensor is slow.
  void link(PyObject* dict, PyObject* key, PyObject* object);
  // list has to hold these objects.
  void list(PyObject* list);
  // The parameter has to lie where it lies, in the same form.
  void parameter(PyObject* tensor);
  // The tensor, which belongs to the optimizer, has to lie where it lies, with as many entries.
  void state(PyObject* tensor);
  // parameter.grad has to be None.
  void without_grad(PyObject* parameter);
  // parameter.grad has to have the form it has. The word at `word` gets its address plus `offset` bytes; 0: no word.
  void grad(PyObject* parameter, int64_t word, int64_t offset);
  // Every step writes the tensor, once. Where somebody notes its version, it has to be in the version it is in: in a
  // list, whose entry `at` becomes the new version, or in a dict, whose entry for it becomes (version, address).
  void written(PyObject* tensor, PyObject* noted, Py_ssize_t at);

  // Whether everything is as it has to be. Takes over the addresses of gradients.
  bool holds();
  // To be called when a step has written.
  void done();

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Link {
    Owned dict, key, object;
    Py_hash_t hash;
  };
  struct List {
    Owned list;
    std::vector<Owned> objects;
  };
  struct Parameter {
    Owned tensor;
    Form form;
  };
  struct State {
    Memory memory;
    int64_t address = 0, numel = 0;
  };
  struct Grad {
    Owned parameter;
    Form form;
    int64_t word = 0, offset = 0;
  };
  struct Written {
    Owned tensor, noted;
    Py_ssize_t at = 0;
    int64_t version = 0, address = 0;
  };

  bool links_hold() const;
  bool lists_hold() const;
  bool tensors_hold();
  bool grads_hold();

  std::vector<Link> links_;
  std::vector<List> lists_;
  std::vector<Parameter> parameters_;
  std::vector<State> states_;
  std::vector<Owned> without_grad_;
  std::vector<Grad> grads_;
  std::vector<Written> written_;
  Owned written_tuple_;
};

}  // namespace gradsel
