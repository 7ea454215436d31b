// The rows of a linear layer that count: those whose target is ignored are left out before its products.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

namespace mbperf {

// Calls body(y) for every target y that is not ignored; raises for one out of bounds.
template <class Body>
void over_live_targets(const at::Tensor& target, int64_t classes, int64_t ignore_index, const Body& body) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i) {
    if (y[i] == ignore_index) continue;
    TORCH_CHECK_INDEX(y[i] >= 0 && y[i] < classes, "Target ", y[i], " is out of bounds.");
    body(y[i]);
  }
}

struct LiveRows {
  at::Tensor input, target;
  at::Tensor index;  // of the live rows among all, or undefined where all are

  void leave_out(int64_t ignore_index) {
    index = (target != ignore_index).nonzero().view(-1);
    input = input.index_select(0, index);
    target = target.index_select(0, index);
  }

  // The live rows of a tensor that has all.
  at::Tensor of(const at::Tensor& t, int64_t dim = 0) const {
    return index.defined() && t.defined() ? t.index_select(dim, index) : t;
  }

  // A tensor of the live rows among zeros for all.
  at::Tensor among_all(const at::Tensor& t, int64_t rows, int64_t dim = 0) const {
    if (!index.defined() || !t.defined()) return t;
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes[dim] = rows;
    return at::zeros(sizes, t.options()).index_copy_(dim, index, t);
  }
};

}  // namespace mbperf
