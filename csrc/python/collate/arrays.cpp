// numpy's arrays and scalars become fields; those that torch lacks or converts go to torch.
#include <pybind11/numpy.h>
#include <torch/csrc/utils/tensor_numpy.h>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

// The dtype of an array that can be copied as it lies, or nullopt.
std::optional<at::ScalarType> dtype_of_array(const py::detail::PyArray_Proxy* array) {
  const auto* descr = py::detail::array_descriptor_proxy(array->descr);
  if (descr->byteorder != '=' && descr->byteorder != '|') return std::nullopt;
  try {
    return torch::utils::numpy_dtype_to_aten(descr->type_num);
  } catch (const std::exception&) {  // no such dtype in torch
    return std::nullopt;
  }
}

bool same_layout(const py::detail::PyArray_Proxy* array, const py::detail::PyArray_Proxy* first) {
  return (array->descr == first->descr || dtype_of_array(array) == dtype_of_array(first)) &&
         array->nd == first->nd &&
         std::equal(array->dimensions, array->dimensions + array->nd, first->dimensions) &&
         (array->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_);
}

}  // namespace

Node Planner::plan_arrays(Samples samples) {
  const Rule tensor_rule = dispatcher_.rule_of_tensors();
  Node node;
  if (direct_ && tensor_rule.kind == Kind::tensor && pad_here().is_none() && plan_plain_arrays(samples, node))
    return node;
  const py::list tensors = rules_.attr("as_tensors")(as_list(samples), path());
  Samples converted;
  for (const py::handle tensor : tensors) converted.push_back(py::reinterpret_borrow<py::object>(tensor));
  return plan(tensors, std::move(converted), Holder::batch);
}

bool Planner::plan_plain_arrays(Samples& samples, Node& node) {
  const auto& numpy = py::detail::npy_api::get();
  const auto* first = py::detail::array_proxy(samples[0].ptr());
  const auto dtype = dtype_of_array(first);
  if (!dtype) return false;
  Field field;
  field.dtype = *dtype;
  field.rows.resize(samples.size());
  for (size_t k = 0; k < samples.size(); ++k) {
    if (!numpy.PyArray_Check_(samples[k].ptr())) return false;
    const auto* array = py::detail::array_proxy(samples[k].ptr());
    if (!same_layout(array, first)) return false;
    field.rows[k] = array->data;
  }
  const c10::DimVector sizes(first->dimensions, first->dimensions + first->nd);
  field.sizes = with_batch(samples.size(), sizes);
  field.owners = std::move(samples);
  node = add(std::move(field));
  return true;
}

Node Planner::plan_array_scalars(const py::object& batch, const Samples& samples, Holder holder,
                                 const Rule& rule) {
  PyTypeObject* const type = Py_TYPE(samples[0].ptr());
  for (const py::object& sample : samples)
    if (Py_TYPE(sample.ptr()) != type || !direct_) return by_torch(batch, samples, holder, rule);
  const auto& numpy = py::detail::npy_api::get();
  const auto descr = py::reinterpret_steal<py::object>(numpy.PyArray_DescrFromScalar_(samples[0].ptr()));
  if (!descr) throw py::error_already_set();
  at::ScalarType dtype = at::kFloat;
  try {
    dtype = torch::utils::numpy_dtype_to_aten(py::detail::array_descriptor_proxy(descr.ptr())->type_num);
  } catch (const std::exception&) {  // longdouble and others that torch lacks
    return by_torch(batch, samples, holder, rule);
  }
  // torch.as_tensor takes no list of these, or only of some: whether it does is torch's to say.
  if (c10::isBarebonesUnsignedType(dtype)) return by_torch(batch, samples, holder, rule);
  const size_t bytes = c10::elementSize(dtype);
  std::vector<char> values(samples.size() * bytes);
  for (size_t k = 0; k < samples.size(); ++k)
    numpy.PyArray_ScalarAsCtype_(samples[k].ptr(), values.data() + k * bytes);
  return number_field(dtype, std::move(values), samples.size());
}

}  // namespace mbperf
