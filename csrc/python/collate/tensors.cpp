// Tensor samples become a field; what is out of the ordinary goes to torch.
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/stack.h>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

// THPVariable_Check asks the metaclass of a subclass, in Python: 30 ns a sample.
bool is_tensor(PyObject* sample) {
  return PyObject_TypeCheck(sample, reinterpret_cast<PyTypeObject*>(THPVariableClass)) ||
         THPVariable_Check(sample);
}

// The result of const_data_ptr without its checks: the tensor is plain, so it has a storage of its own dtype.
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
c10::DimVector stacked_strides(at::IntArrayRef sizes, size_t n, at::MemoryFormat format) {
  if (format == at::MemoryFormat::Contiguous) return {};
  c10::DimVector joined(sizes.begin(), sizes.end());
  joined[0] *= static_cast<int64_t>(n);
  const auto strides = format == at::MemoryFormat::ChannelsLast ? c10::get_channels_last_strides_2d(joined)
                                                                : c10::get_channels_last_strides_3d(joined);
  const auto viewed = at::detail::computeStride(joined, strides, with_batch(n, sizes));
  return viewed.value();
}

// cat keeps the odd strides that dimensions of size 1 may have, where it has one tensor: it is asked itself.
c10::DimVector stacked_strides_of_one(const at::Tensor& sample) {
  const auto meta = sample.options().device(at::kMeta);
  const at::Tensor stacked = at::stack({at::empty_strided(sample.sizes(), sample.strides(), meta)});
  return c10::DimVector(stacked.strides());
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  static const c10::DispatchKeySet plain =
      c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
      c10::DispatchKeySet({c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return plain.has_all(tensor.key_set());
}

c10::DimVector with_batch(size_t n, at::IntArrayRef sizes) {
  c10::DimVector batch(sizes.begin(), sizes.end());
  batch.insert(batch.begin(), static_cast<int64_t>(n));
  return batch;
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
    if (!is_tensor(samples[k].ptr())) fail("type", samples, k);
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
    field.rows[k] = data_of(tensor);
  }
  field.sizes = with_batch(samples.size(), sizes);
  field.strides = samples.size() == 1 && format != at::MemoryFormat::Contiguous
                      ? stacked_strides_of_one(first)
                      : stacked_strides(sizes, samples.size(), format);
  if (mixed && staged()) return plan_promoted(samples, std::move(field));
  if (!dense) {
    field.rows.clear();
    field.tensors.reserve(samples.size());
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

}  // namespace mbperf
