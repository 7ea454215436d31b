// Samples whose first dimension differs: padded to the longest, or packed end to end with cu_seqlens.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <pybind11/complex.h>

#include <algorithm>
#include <limits>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

template <typename T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  const auto* data = reinterpret_cast<const char*>(values.data());
  return {data, data + values.size() * sizeof(T)};
}

bool packs(const py::object& pad) { return py::isinstance<py::str>(pad); }

at::Scalar scalar_of(const py::object& pad) {
  if (PyLong_Check(pad.ptr())) return pad.cast<int64_t>();
  if (PyComplex_Check(pad.ptr())) return c10::complex<double>(pad.cast<std::complex<double>>());
  return pad.cast<double>();
}

// lengths (n,) -> (n, longest): true where a row has an element.
Field mask_of(const std::vector<int64_t>& lengths, int64_t longest) {
  Field mask;
  mask.dtype = at::kBool;
  mask.sizes = {static_cast<int64_t>(lengths.size()), longest};
  mask.values.resize(lengths.size() * static_cast<size_t>(longest));
  for (size_t k = 0; k < lengths.size(); ++k)
    std::fill_n(mask.values.begin() + static_cast<int64_t>(k) * longest, lengths[k], 1);
  return mask;
}

}  // namespace

py::object Planner::pad_here() const {
  return PyCallable_Check(settings_.pad.ptr()) ? settings_.pad(path()) : settings_.pad;
}

// The padding value as it lies in memory; refused where an integer dtype cannot hold it.
std::vector<char> Planner::fill_of(const py::object& pad, at::ScalarType dtype, const Samples& samples) {
  try {
    const at::Tensor element = at::full({1}, scalar_of(pad), at::TensorOptions(dtype));
    if (at::isIntegralType(dtype, true) && element.item().toDouble() != scalar_of(pad).toDouble())
      fail("pad", samples, 0);
    const auto* data = static_cast<const char*>(element.const_data_ptr());
    return {data, data + element.itemsize()};
  } catch (const c10::Error&) {
    fail("pad", samples, 0);
  }
}

at::ScalarType Planner::check_ragged(const Samples& samples) {
  const at::Tensor& first = THPVariable_Unpack(samples[0].ptr());
  at::ScalarType dtype = first.scalar_type();
  for (size_t k = 0; k < samples.size(); ++k) {
    const at::Tensor& tensor = THPVariable_Unpack(samples[k].ptr());
    if (!is_plain(tensor)) fail("ragged_kind", samples, k);
    if (tensor.dim() != first.dim() || tensor.sizes().slice(1) != first.sizes().slice(1))
      fail("ragged_shape", samples, k);
    if (tensor.scalar_type() == first.scalar_type()) continue;
    dtype = promoted(dtype, tensor.scalar_type(), samples, k);
  }
  return dtype;
}

Field Planner::ragged_field(const Samples& samples, const py::object& pad, at::ScalarType dtype,
                            const std::vector<int64_t>& lengths, int64_t longest) {
  const at::NoGradGuard no_grad;
  const at::IntArrayRef item = THPVariable_Unpack(samples[0].ptr()).sizes().slice(1);
  const int64_t item_bytes = c10::multiply_integers(item) * static_cast<int64_t>(c10::elementSize(dtype));
  Field field;
  field.dtype = dtype;
  field.sizes = c10::DimVector(item);
  int64_t total = 0;
  for (size_t k = 0; k < samples.size(); ++k) {
    field.kept.push_back(THPVariable_Unpack(samples[k].ptr()).to(dtype).contiguous());
    field.rows.push_back(static_cast<const char*>(field.kept.back().const_data_ptr()));
    field.row_sizes.push_back(lengths[k] * item_bytes);
    if (packs(pad)) field.starts.push_back(total * item_bytes);
    total += lengths[k];
  }
  if (packs(pad)) {
    field.starts.push_back(total * item_bytes);
    field.sizes.insert(field.sizes.begin(), total);
  } else {
    field.fill = fill_of(pad, dtype, samples);
    field.sizes.insert(field.sizes.begin(), {static_cast<int64_t>(samples.size()), longest});
  }
  return field;
}

Node Planner::plan_packed(Node values, const std::vector<int64_t>& lengths, int64_t longest,
                          const Samples& samples) {
  std::vector<int32_t> starts{0};
  int64_t total = 0;
  for (const int64_t length : lengths) {
    total += length;
    if (total > std::numeric_limits<int32_t>::max()) fail("packed_size", samples, 0);
    starts.push_back(static_cast<int32_t>(total));
  }
  Node node;
  node.shape = Node::Shape::named_tuple;
  node.object = rules_.attr("Packed");
  node.children.push_back(std::move(values));
  node.children.push_back(number_field(at::kInt, bytes_of(starts), starts.size()));
  node.children.push_back(Node::of(py::int_(longest)));
  return node;
}

Node Planner::plan_padded(Node values, const std::vector<int64_t>& lengths, int64_t longest) {
  if (!settings_.lengths && !settings_.mask) return values;
  Node node;
  node.shape = Node::Shape::named_tuple;
  node.object = rules_.attr("Padded");
  node.children.push_back(std::move(values));
  const Node none = Node::of(py::none());
  node.children.push_back(settings_.lengths ? number_field(at::kLong, bytes_of(lengths), lengths.size())
                                            : none);
  node.children.push_back(settings_.mask ? add(mask_of(lengths, longest)) : none);
  return node;
}

Node Planner::plan_ragged(Samples samples, const py::object& pad, bool grad) {
  const at::ScalarType dtype = check_ragged(samples);
  std::vector<int64_t> lengths;
  for (const py::object& sample : samples) lengths.push_back(THPVariable_Unpack(sample.ptr()).size(0));
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  // With a graph to keep, torch's own cat and pad_sequence write the values.
  Node values = grad ? node_of(rules_.attr("join")(as_list(samples), pad, path(), worker_))
                     : add(ragged_field(samples, pad, dtype, lengths, longest));
  return packs(pad) ? plan_packed(std::move(values), lengths, longest, samples)
                    : plan_padded(std::move(values), lengths, longest);
}

}  // namespace mbperf
