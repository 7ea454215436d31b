// The order of torch.utils.data._utils.collate.collate: exact type in the map, isinstance in the map's order,
// then Mapping, named tuple, Sequence; a dataclass is our extension, asked for last.
#include "python/collate/dispatch.h"

#include <torch/csrc/autograd/python_variable.h>

namespace py = pybind11;

namespace mbperf {
namespace {

// isinstance against these classes depends on the type alone; an abstract base class or a metaclass with its
// own __instancecheck__ may look at the value, or change its mind when a class is registered.
bool plain_class(PyObject* key) {
  if (PyTuple_Check(key)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(key); ++i)
      if (!plain_class(PyTuple_GET_ITEM(key, i))) return false;
    return true;
  }
  static PyObject* const tensor_meta = reinterpret_cast<PyObject*>(Py_TYPE(THPVariableClass));
  return PyType_CheckExact(key) || reinterpret_cast<PyObject*>(Py_TYPE(key)) == tensor_meta;
}

}  // namespace

Dispatcher::Dispatcher(py::module_ rules) : rules_(std::move(rules)), map_(rules_.attr("FUNCTIONS")) {
  const std::pair<const char*, Kind> names[] = {
      {"collate_tensor_fn", Kind::tensor},      {"collate_numpy_array_fn", Kind::array},
      {"collate_float_fn", Kind::float_number}, {"collate_numpy_scalar_fn", Kind::array_scalar},
      {"collate_int_fn", Kind::int_number},     {"collate_str_fn", Kind::text},
  };
  const auto torch_collate = py::module_::import("torch.utils.data._utils.collate");
  for (const auto& [name, kind] : names) native_.emplace_back(torch_collate.attr(name), kind);
}

bool Dispatcher::unchanged() const {
  if (static_cast<size_t>(PyDict_GET_SIZE(map_.ptr())) != seen_.size()) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
  for (const auto& [seen_key, seen_value] : seen_) {
    if (!PyDict_Next(map_.ptr(), &at, &key, &value)) return false;
    if (key != seen_key.ptr() || value != seen_value.ptr()) return false;
  }
  return true;
}

void Dispatcher::refresh() {
  if (unchanged()) return;
  known_.clear();
  seen_.clear();
  plain_keys_ = true;
  for (const auto& [key, value] : map_) {
    seen_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    plain_keys_ = plain_keys_ && plain_class(key.ptr());
  }
}

Rule Dispatcher::rule_of_entry(py::handle function) const {
  for (const auto& [own, kind] : native_)
    if (own.is(function)) return {kind, function};
  return {Kind::function, function};
}

Rule Dispatcher::rule_of_tensors() const {
  PyObject* const function = PyDict_GetItemWithError(map_.ptr(), THPVariableClass);
  if (PyErr_Occurred()) throw py::error_already_set();
  return function ? rule_of_entry(function) : Rule{Kind::function, {}};
}

Rule Dispatcher::search(py::handle sample) const {
  for (const auto& [key, function] : seen_) {
    const int is = PyObject_IsInstance(sample.ptr(), key.ptr());
    if (is < 0) throw py::error_already_set();
    if (is) return rule_of_entry(function);
  }
  if (PyDict_CheckExact(sample.ptr())) return {Kind::mapping, {}};
  if (PyTuple_CheckExact(sample.ptr()) || PyList_CheckExact(sample.ptr())) return {Kind::sequence, {}};
  return {static_cast<Kind>(rules_.attr("container")(sample).cast<int>()), {}};
}

Rule Dispatcher::rule_of(py::handle sample) {
  PyTypeObject* const type = Py_TYPE(sample.ptr());
  PyObject* const exact = PyDict_GetItemWithError(map_.ptr(), reinterpret_cast<PyObject*>(type));
  if (exact) return rule_of_entry(exact);
  if (PyErr_Occurred()) throw py::error_already_set();
  const bool cacheable = plain_keys_ && !(type->tp_flags & Py_TPFLAGS_HEAPTYPE);
  if (!cacheable) return search(sample);
  const auto known = known_.find(type);
  if (known != known_.end()) return known->second;
  return known_[type] = search(sample);
}

}  // namespace mbperf
