// What the nodes of the differentiable operators have in common.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <type_traits>

namespace mbperf {

// A node in the pointer that this version of torch keeps nodes in: shared up to 2.12, intrusive from 2.13.
template <class Node, class Pointer = decltype(torch::autograd::Edge::function)>
Pointer owned(Node* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(node, [](auto* n) { deleteNode(n); });  // long graphs without recursion
  } else {
    return Pointer::unsafe_steal_from_new(node);
  }
}

// Whether a derivative is wanted that only torch's operators give: under functorch, or in forward mode.
inline bool is_transformed(const at::Tensor& t) {
  if (!t.defined()) return false;
  const auto wrapped = at::kFunctorchWrappedTensors - c10::DispatchKeySet(c10::DispatchKey::Functionalize);
  return t.unsafeGetTensorImpl()->key_set().has_any(wrapped) || torch::autograd::isFwGradDefined(t);
}

}  // namespace mbperf
