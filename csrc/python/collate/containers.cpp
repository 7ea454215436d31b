// The walk: one node for the same place in every sample, and how dicts, tuples and the like are taken apart.
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

// Samples may contain themselves; Python's own recursion limit ends that.
struct Recursion {
  Recursion() {
    if (Py_EnterRecursiveCall(" in mbperf.collate")) throw py::error_already_set();
  }
  ~Recursion() { Py_LeaveRecursiveCall(); }
};

bool iterates_as(PyObject* object, const PyTypeObject& base) {
  return PyType_IsSubtype(Py_TYPE(object), const_cast<PyTypeObject*>(&base)) &&
         Py_TYPE(object)->tp_iter == base.tp_iter &&
         Py_TYPE(object)->tp_as_sequence->sq_length == base.tp_as_sequence->sq_length;
}

py::object owned(PyObject* borrowed) { return py::reinterpret_borrow<py::object>(borrowed); }

}  // namespace

py::list as_list(const Samples& samples) {
  py::list list(samples.size());
  for (size_t k = 0; k < samples.size(); ++k)
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(k), samples[k].inc_ref().ptr());
  return list;
}

Planner::Planner(py::module_ rules, Dispatcher& dispatcher, const CollateSettings& settings, bool worker)
    : rules_(std::move(rules)),
      dispatcher_(dispatcher),
      settings_(settings),
      worker_(worker),
      direct_(!at::impl::torch_function_mode_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set()) {
}

py::list Planner::path() const {
  py::list path;
  for (const Step& step : path_) path.append(py::make_tuple(step.attribute, step.name));
  return path;
}

void Planner::fail(const char* reason, const Samples& samples, size_t k) {
  rules_.attr("fail")(reason, path(), as_list(samples), k);
  throw std::logic_error("mbperf.ops.collate_rules.fail returned");
}

void Planner::check_same_type(const Samples& samples) {
  for (size_t k = 1; k < samples.size(); ++k)
    if (Py_TYPE(samples[k].ptr()) != Py_TYPE(samples[0].ptr())) fail("type", samples, k);
}

Node Planner::plan(py::object batch, Samples samples, Holder holder) {
  const Recursion recursion;
  const Rule rule = dispatcher_.rule_of(samples[0]);
  if (settings_.strict && rule.kind != Kind::function && rule.kind != Kind::tensor) check_same_type(samples);
  switch (rule.kind) {
    case Kind::tensor:
      return plan_tensors(std::move(samples));
    case Kind::array:
      return plan_arrays(std::move(samples));
    case Kind::array_scalar:
      return plan_array_scalars(batch, samples, holder, rule);
    case Kind::float_number:
      return plan_doubles(batch, samples, holder, rule, at::kDouble);
    case Kind::int_number:
      return plan_ints(batch, samples, holder, rule);
    case Kind::text:
      return Node::of(held(batch, samples, holder));
    case Kind::function:
      return plan_function(std::move(batch), std::move(samples), holder, rule);
    case Kind::mapping:
      return plan_mapping(std::move(samples));
    case Kind::named_tuple:
      return plan_named_tuple(std::move(samples));
    case Kind::sequence:
      return plan_sequence(std::move(samples));
    case Kind::dataclass:
      return plan_dataclass(std::move(samples));
    case Kind::unsupported:
      break;
  }
  fail("unsupported", samples, 0);
}

py::object Planner::held(const py::object& batch, const Samples& samples, Holder holder) {
  if (holder == Holder::batch) return batch;
  py::list list = as_list(samples);
  if (holder == Holder::list) return std::move(list);
  return py::tuple(list);
}

Node Planner::plan_function(py::object batch, Samples samples, Holder holder, const Rule& rule) {
  const auto function = py::reinterpret_borrow<py::object>(rule.function);
  py::object result = function(held(batch, samples, holder), py::arg("collate_fn_map") = dispatcher_.map());
  dispatcher_.refresh();
  return Node::of(std::move(result));
}

Node Planner::by_torch(const py::object& batch, const Samples& samples, Holder holder, const Rule& rule) {
  try {
    // All that torch's function does with numpy's scalars; their mixtures are as fast as torch only without
    // it.
    if (rule.kind == Kind::array_scalar)
      return node_of(rules_.attr("as_tensor")(held(batch, samples, holder)));
    const auto function = py::reinterpret_borrow<py::object>(rule.function);
    return node_of(function(held(batch, samples, holder), py::arg("collate_fn_map") = dispatcher_.map()));
  } catch (py::error_already_set& error) {
    rules_.attr("fail_torch")(path(), as_list(samples), error.value());
    throw;
  }
}

py::object Planner::value_of(const Samples& samples, size_t k, py::handle key) {
  PyObject* const sample = samples[k].ptr();
  const bool dict_like = PyDict_Check(sample) && Py_TYPE(sample)->tp_as_mapping->mp_subscript ==
                                                     PyDict_Type.tp_as_mapping->mp_subscript;
  PyObject* const value = dict_like ? PyDict_GetItemWithError(sample, key.ptr()) : nullptr;
  if (value) return owned(value);
  if (PyErr_Occurred()) throw py::error_already_set();
  try {
    return dict_like ? rules_.attr("default_item")(samples[k], key) : py::object(samples[k][key]);
  } catch (py::error_already_set& error) {
    rules_.attr("fail_key")(path(), as_list(samples), k, key, error.value());
    throw;
  }
}

Samples Planner::values_of(const Samples& samples, py::handle key) {
  Samples values(samples.size());
  for (size_t k = 0; k < samples.size(); ++k) values[k] = value_of(samples, k, key);
  return values;
}

Node Planner::plan_mapping(Samples samples) {
  const py::object first = samples[0];
  Node node;
  node.shape = PyDict_CheckExact(first.ptr()) ? Node::Shape::dict : Node::Shape::mapping;
  node.object = first;
  for (const py::handle key : py::list(first)) node.keys.push_back(py::reinterpret_borrow<py::object>(key));
  if (settings_.strict) {
    for (size_t k = 1; k < samples.size(); ++k)
      if (py::len(samples[k]) != node.keys.size()) fail("keys", samples, k);
  }
  for (const py::object& key : node.keys) {
    Samples values = values_of(samples, key);
    path_.push_back({false, key});
    node.children.push_back(plan({}, std::move(values), Holder::list));
    path_.pop_back();
  }
  return node;
}

// The items of a sample that is no plain list or tuple; it needs a length, as in default_collate.
py::list Planner::items_of(const Samples& samples, size_t k) {
  py::list items;
  const auto iterator = PyObject_Size(samples[k].ptr()) < 0
                            ? py::object()
                            : py::reinterpret_steal<py::object>(PyObject_GetIter(samples[k].ptr()));
  if (!iterator && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    fail("type", samples, k);
  }
  while (PyObject* const item = iterator ? PyIter_Next(iterator.ptr()) : nullptr)
    items.append(py::reinterpret_steal<py::object>(item));
  if (PyErr_Occurred()) throw py::error_already_set();
  return items;
}

// Turned by a quarter: column i holds item i of every sample.
std::vector<Samples> Planner::columns(const Samples& samples) {
  std::vector<Samples> columns(py::len(samples[0]));
  for (Samples& column : columns) column.resize(samples.size());
  for (size_t k = 0; k < samples.size(); ++k) {
    PyObject* const sample = samples[k].ptr();
    const bool is_tuple = iterates_as(sample, PyTuple_Type);
    const py::object items = is_tuple || iterates_as(sample, PyList_Type) ? samples[k] : items_of(samples, k);
    const auto size = static_cast<size_t>(is_tuple ? PyTuple_GET_SIZE(sample) : PyList_GET_SIZE(items.ptr()));
    if (size != columns.size()) fail("length", samples, k);
    for (size_t i = 0; i < size; ++i) {
      const auto at = static_cast<Py_ssize_t>(i);
      columns[i][k] = owned(is_tuple ? PyTuple_GET_ITEM(sample, at) : PyList_GET_ITEM(items.ptr(), at));
    }
  }
  return columns;
}

Node Planner::plan_sequence(Samples samples) {
  Node node;
  // A tuple becomes a list, as in default_collate.
  const bool list = PyTuple_Check(samples[0].ptr()) || PyList_CheckExact(samples[0].ptr());
  node.shape = list ? Node::Shape::list : Node::Shape::sequence;
  node.object = samples[0];
  std::vector<Samples> fields = columns(samples);
  for (size_t i = 0; i < fields.size(); ++i) {
    path_.push_back({false, py::int_(i)});
    node.children.push_back(plan({}, std::move(fields[i]), Holder::tuple));
    path_.pop_back();
  }
  return node;
}

Node Planner::plan_named_tuple(Samples samples) {
  Node node;
  node.shape = Node::Shape::named_tuple;
  node.object = py::type::of(samples[0]);
  const py::tuple names(samples[0].attr("_fields"));
  std::vector<Samples> fields = columns(samples);
  for (size_t i = 0; i < fields.size(); ++i) {
    path_.push_back({true, i < names.size() ? py::object(names[i]) : py::object(py::int_(i))});
    node.children.push_back(plan({}, std::move(fields[i]), Holder::tuple));
    path_.pop_back();
  }
  return node;
}

Node Planner::plan_dataclass(Samples samples) {
  Node node;
  node.shape = Node::Shape::dataclass;
  node.object = samples[0];
  for (const py::handle name : rules_.attr("field_names")(samples[0]))
    node.keys.push_back(py::reinterpret_borrow<py::object>(name));
  for (const py::object& name : node.keys) {
    Samples values(samples.size());
    for (size_t k = 0; k < samples.size(); ++k) {
      if (!py::hasattr(samples[k], name)) fail("type", samples, k);
      values[k] = samples[k].attr(name);
    }
    path_.push_back({true, name});
    node.children.push_back(plan({}, std::move(values), Holder::list));
    path_.pop_back();
  }
  return node;
}

}  // namespace mbperf
