// The leaves of the walk: tensors, arrays and numbers become fields; what is out of the ordinary goes to
// torch.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/numpy.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/tensor_numpy.h>

#include <cstring>

#include "python/collate_plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

const at::Tensor& tensor_of(const py::object& sample) { return THPVariable_Unpack(sample.ptr()); }

// What const_data_ptr gives, without its checks: the tensor is plain, so it has a storage of its own dtype.
const char* data_of(const at::Tensor& tensor) {
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  const auto* data = static_cast<const char*>(impl->unsafe_storage().data());
  return data + impl->storage_offset() * static_cast<int64_t>(impl->dtype().itemsize());
}

at::MemoryFormat common_format(const Samples& samples) {
  const at::MemoryFormat format = tensor_of(samples[0]).suggest_memory_format();
  if (format == at::MemoryFormat::Contiguous) return format;
  for (const py::object& sample : samples)
    if (tensor_of(sample).suggest_memory_format() != format) return at::MemoryFormat::Contiguous;
  return format;
}

// torch.stack is cat along dimension 0 and a view: the strides are those of (n * sizes[0], sizes[1:]).
c10::DimVector stacked_strides(at::IntArrayRef sizes, int64_t n, at::MemoryFormat format) {
  if (format == at::MemoryFormat::Contiguous) return {};
  c10::DimVector joined(sizes.begin(), sizes.end());
  joined[0] *= n;
  const auto strides = format == at::MemoryFormat::ChannelsLast ? c10::get_channels_last_strides_2d(joined)
                                                                : c10::get_channels_last_strides_3d(joined);
  c10::DimVector batch(strides.begin(), strides.end());
  batch.insert(batch.begin(), sizes[0] * strides[0]);
  return batch;
}

// cat keeps the odd strides that dimensions of size 1 may have, where it has one tensor: it is asked itself.
c10::DimVector stacked_strides_of_one(const at::Tensor& sample) {
  const auto meta = sample.options().device(at::kMeta);
  const at::Tensor stacked = at::stack({at::empty_strided(sample.sizes(), sample.strides(), meta)});
  return c10::DimVector(stacked.strides());
}

c10::DimVector with_batch(size_t n, at::IntArrayRef sizes) {
  c10::DimVector batch(sizes.begin(), sizes.end());
  batch.insert(batch.begin(), static_cast<int64_t>(n));
  return batch;
}

template <typename T>
void put(std::vector<char>& values, size_t k, T value) {
  std::memcpy(values.data() + k * sizeof(T), &value, sizeof(T));
}

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

bool is_plain(const at::Tensor& tensor) {
  static const c10::DispatchKeySet plain =
      c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
      c10::DispatchKeySet({c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return plain.has_all(tensor.key_set());
}

int64_t Field::bytes() const {
  if (!starts.empty()) return starts.back();
  return c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
}

Node Planner::add(Field field) {
  fields_.push_back(std::move(field));
  Node node;
  node.shape = Node::Shape::field;
  node.field = fields_.size() - 1;
  return node;
}

// The common case in one pass: plain tensors of one dtype and shape, each of them contiguous.
bool Planner::plan_equal_tensors(Samples& samples, Node& node) {
  const at::Tensor& first = tensor_of(samples[0]);
  const at::IntArrayRef sizes = first.sizes();
  Field field;
  field.rows.resize(samples.size());
  for (size_t k = 0; k < samples.size(); ++k) {
    if (!THPVariable_CheckExact(samples[k].ptr())) return false;
    const at::Tensor& tensor = tensor_of(samples[k]);
    if (!is_plain(tensor) || tensor.requires_grad() || tensor.dtype() != first.dtype() ||
        tensor.sizes() != sizes || !tensor.is_contiguous())
      return false;
    field.rows[k] = data_of(tensor);
  }
  // With one channel or one pixel a tensor is contiguous and channels_last at once; its strides tell.
  if (sizes.size() > 3 && first.numel() && common_format(samples) != at::MemoryFormat::Contiguous)
    return false;
  field.dtype = first.scalar_type();
  field.sizes = with_batch(samples.size(), sizes);
  field.owners = std::move(samples);
  node = add(std::move(field));
  return true;
}

Node Planner::plan_tensors(Samples samples) {
  const py::object pad = pad_here();
  Node node;
  if (direct_ && pad.is_none() && THPVariable_CheckExact(samples[0].ptr()) &&
      plan_equal_tensors(samples, node))
    return node;
  bool plain = direct_;
  bool grad = false;
  for (size_t k = 0; k < samples.size(); ++k) {
    if (!THPVariable_Check(samples[k].ptr())) fail("type", samples, k);
    const at::Tensor& tensor = tensor_of(samples[k]);
    if (settings_.strict && tensor.scalar_type() != tensor_of(samples[0]).scalar_type())
      fail("dtype", samples, k);
    plain = plain && THPVariable_CheckExact(samples[k].ptr()) && is_plain(tensor);
    grad = grad || tensor.requires_grad();
  }
  grad = grad && at::GradMode::is_enabled();
  if (!pad.is_none() && tensor_of(samples[0]).dim() > 0) return plan_ragged(std::move(samples), pad, grad);
  // A worker cannot send a graph to the main process: there the batch is a leaf that requires grad.
  if (plain && (worker_ || !grad)) return plan_plain_tensors(std::move(samples), grad);
  return direct_ && !worker_ && !grad && are_plain_cuda(samples) ? stack_by_table(samples)
                                                                 : stack_by_torch(samples);
}

Node Planner::plan_plain_tensors(Samples samples, bool grad) {
  const at::Tensor& first = tensor_of(samples[0]);
  const at::IntArrayRef sizes = first.sizes();
  const at::MemoryFormat format =
      sizes.size() < 4 || first.numel() == 0 ? at::MemoryFormat::Contiguous : common_format(samples);
  Field field;
  field.dtype = first.scalar_type();
  field.requires_grad = grad;
  field.rows.resize(samples.size());
  bool dense = true, mixed = false;
  for (size_t k = 0; k < samples.size(); ++k) {
    const at::Tensor& tensor = tensor_of(samples[k]);
    if (tensor.sizes() != sizes) fail("shape", samples, k);
    const at::ScalarType dtype = tensor.scalar_type();
    if (dtype != first.scalar_type()) {
      dense = false;
      mixed = true;
      field.dtype = promoted(field.dtype, dtype, samples, k);
    }
    dense = dense && tensor.is_contiguous(format);
    field.rows[k] = static_cast<const char*>(tensor.const_data_ptr());
  }
  field.sizes = with_batch(samples.size(), sizes);
  field.strides = samples.size() == 1 && format != at::MemoryFormat::Contiguous
                      ? stacked_strides_of_one(first)
                      : stacked_strides(sizes, static_cast<int64_t>(samples.size()), format);
  if (mixed && staged()) return plan_promoted(samples, std::move(field));
  if (!dense) {
    field.rows.clear();
    for (const py::object& sample : samples) field.tensors.push_back(tensor_of(sample));
  }
  field.owners = std::move(samples);
  return add(std::move(field));
}

at::ScalarType Planner::promoted(at::ScalarType a, at::ScalarType b, const Samples& samples, size_t k) {
  try {
    return c10::promoteTypes(a, b);
  } catch (const c10::Error&) {  // float8, and uint16 to uint64 beside another integer
    fail("promotion", samples, k);
  }
}

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

Node Planner::number_field(at::ScalarType dtype, std::vector<char> values, size_t n) {
  Field field;
  field.dtype = dtype;
  field.sizes = {static_cast<int64_t>(n)};
  field.values = std::move(values);
  return add(std::move(field));
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

// torch.tensor on a list: bool if all are, int64 with ints, the default dtype with floats.
Node Planner::plan_ints(const py::object& batch, const Samples& samples, Holder holder, const Rule& rule) {
  const size_t n = samples.size();
  std::vector<char> values(n * sizeof(int64_t));
  bool all_bool = true;
  for (size_t k = 0; k < n; ++k) {
    PyObject* const sample = samples[k].ptr();
    if (PyFloat_CheckExact(sample))
      return plan_doubles(batch, samples, holder, rule, c10::get_default_dtype_as_scalartype());
    if (!PyLong_Check(sample) || !direct_) return by_torch(batch, samples, holder, rule);
    all_bool = all_bool && PyBool_Check(sample);
    int overflow = 0;
    put<int64_t>(values, k, PyLong_AsLongLongAndOverflow(sample, &overflow));
    if (overflow) return by_torch(batch, samples, holder, rule);
  }
  if (!all_bool) return number_field(at::kLong, std::move(values), n);
  std::vector<char> bools(n);
  for (size_t k = 0; k < n; ++k) bools[k] = samples[k].ptr() == Py_True;
  return number_field(at::kBool, std::move(bools), n);
}

Node Planner::plan_doubles(const py::object& batch, const Samples& samples, Holder holder, const Rule& rule,
                           at::ScalarType dtype) {
  const size_t n = samples.size();
  const bool known = direct_ && (dtype == at::kDouble || dtype == at::kFloat);
  std::vector<char> values(n * sizeof(double));
  for (size_t k = 0; k < n; ++k) {
    PyObject* const sample = samples[k].ptr();
    const bool exact = PyFloat_Check(sample);
    if (!known || !(exact || PyLong_Check(sample))) return by_torch(batch, samples, holder, rule);
    const double value = exact ? PyFloat_AS_DOUBLE(sample) : PyLong_AsDouble(sample);
    if (value == -1.0 && PyErr_Occurred()) {  // an int beyond double: torch words the error
      PyErr_Clear();
      return by_torch(batch, samples, holder, rule);
    }
    if (dtype == at::kDouble)
      put<double>(values, k, value);
    else
      put<float>(values, k, static_cast<float>(value));
  }
  values.resize(n * c10::elementSize(dtype));
  return number_field(dtype, std::move(values), n);
}

}  // namespace mbperf
