// The tensors of a batch that torch makes: stacks with a graph, of other classes or on other devices, what
// functions of default_collate_fn_map return; and, on a GPU, stacks by one kernel of ours.
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/stack.h>

#include <algorithm>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

std::vector<at::Tensor> tensors_of(const Samples& samples) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(samples.size());
  for (const py::object& sample : samples) tensors.push_back(tensor_of(sample));
  return tensors;
}

bool are_no_subclass(const Samples& samples) {
  return std::all_of(samples.begin(), samples.end(),
                     [](const py::object& sample) { return THPVariable_CheckExact(sample.ptr()); });
}

// A graph cannot be sent to another process.
at::Tensor leaf(const at::Tensor& tensor) {
  return tensor.requires_grad() ? tensor.detach().requires_grad_() : tensor;
}

using Stack = at::Tensor(at::TensorList);

const c10::OperatorHandle& stack_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mbperf::stack", "");
  return op;
}

}  // namespace

bool are_plain_cuda(const Samples& samples) {
  static const bool built = stack_op().hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  static const c10::DispatchKeySet plain =
      c10::DispatchKeySet(c10::DispatchKey::CUDA) | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
      c10::DispatchKeySet({c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA});
  return built && std::all_of(samples.begin(), samples.end(), [](const py::object& sample) {
           return THPVariable_CheckExact(sample.ptr()) && plain.has_all(tensor_of(sample).key_set());
         });
}

// A result of torch's own: in a worker, or on its way to a device, its memory will be moved into the batch's;
// else it stays.
Node Planner::node_of(py::object result) {
  Node node;
  const bool is_tensor = THPVariable_Check(result.ptr());
  if (is_tensor && settings_.pin_memory && !worker_) result = result.attr("pin_memory")();
  node.object = result;
  if (!is_tensor || !(worker_ || staged())) return node;
  const at::Tensor& tensor = tensor_of(result);
  const bool packs = is_plain(tensor) && tensor.is_non_overlapping_and_dense() && !tensor.grad_fn();
  if (staged() && !(packs && THPVariable_CheckExact(result.ptr()))) {
    node.object = settings_.staging.attr("move")(result);
    return node;
  }
  if (!packs) return node;
  Field field;
  field.dtype = tensor.scalar_type();
  field.sizes = c10::DimVector(tensor.sizes());
  field.requires_grad = staged() && tensor.requires_grad();
  field.ready = true;
  field.out = tensor;
  const Node moved = add(std::move(field));
  return staged() ? moved : node;  // in a worker it stays the object it is, of whatever class
}

Node Planner::plan_made(const py::list& tensors) {
  Node node;
  node.shape = Node::Shape::list;
  for (const py::handle tensor : tensors)
    node.children.push_back(node_of(py::reinterpret_borrow<py::object>(tensor)));
  return node;
}

// Samples on a GPU: one kernel; for those it does not serve it asks torch.stack, whose error gets its place.
Node Planner::stack_by_table(const Samples& samples) {
  std::vector<at::Tensor> tensors;
  at::ScalarType dtype = tensor_of(samples[0]).scalar_type();
  for (size_t k = 0; k < samples.size(); ++k) {
    tensors.push_back(tensor_of(samples[k]));
    if (tensors[k].sizes() != tensors[0].sizes()) fail("shape", samples, k);
    if (tensors[k].scalar_type() != dtype) dtype = promoted(dtype, tensors[k].scalar_type(), samples, k);
  }
  try {
    return node_of(
        py::reinterpret_steal<py::object>(THPVariable_Wrap(stack_op().typed<Stack>().call(tensors))));
  } catch (const c10::Error&) {
    return stack_by_torch(samples);
  }
}

// torch.stack without its parser; what it refuses is left to it, for the error.
bool Planner::stack_directly(const Samples& samples, Node& node) {
  at::Tensor stacked;
  try {
    const std::vector<at::Tensor> tensors = tensors_of(samples);
    const py::gil_scoped_release no_gil;
    stacked = worker_ ? leaf(at::stack(tensors)) : at::stack(tensors);
  } catch (const c10::Error&) {
    return false;
  }
  node = node_of(py::reinterpret_steal<py::object>(THPVariable_Wrap(stacked)));
  return true;
}

Node Planner::stack_by_torch(const Samples& samples) {
  const at::Tensor& first = tensor_of(samples[0]);
  const bool refused = first.is_nested() || first.is_sparse() || at::sparse_csr::is_sparse_compressed(first);
  Node node;
  if (direct_ && !refused && are_no_subclass(samples) && stack_directly(samples, node)) return node;
  const py::list list = as_list(samples);
  try {
    if (refused) return node_of(rules_.attr("refuse")(list));
    return node_of(rules_.attr(worker_ ? "stack_leaf" : "stack")(list));
  } catch (py::error_already_set& error) {
    rules_.attr("fail_torch")(path(), list, error.value());
    throw;
  }
}

}  // namespace mbperf
