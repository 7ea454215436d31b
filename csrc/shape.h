// The positions and classes of an operator's tensors, and where their elements lie.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "strides.h"

namespace mbperf {

// The arguments that the operators of library.cpp have in common.
struct CrossEntropyArguments {
  const at::Tensor& input;
  const at::Tensor& target;
  const std::optional<at::Tensor>& weight;
  int64_t reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
};

// The share of each target that is spread over all classes. To share one out among one class changes nothing:
// exactly, without 1 - s + s.
inline double smoothing_of(const CrossEntropyArguments& a, int64_t classes) {
  return classes == 1 && !is_soft(a.input, a.target) ? 0 : a.label_smoothing;
}

inline at::ScalarType accumulate_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// (C) and (N, C) as one outer index with N inner positions; (N, C, d1, ...) as N times d1 d2 ...
struct Shape {
  int64_t outer, inner, classes;
  int64_t positions() const { return outer * inner; }

  explicit Shape(const at::Tensor& input) {
    classes = input.size(input.dim() == 1 ? 0 : 1);
    const int64_t batch = input.dim() == 1 ? 1 : input.size(0);
    int64_t inside = 1;
    for (int64_t d = 2; d < input.dim(); ++d) inside *= input.size(d);
    outer = inside == 1 ? 1 : batch;
    inner = inside == 1 ? batch : inside;
  }
};

// The one stride that walks over all dimensions from the third on, or -1 if there is none.
inline int64_t inner_stride(const at::Tensor& t) {
  int64_t stride = -1, expected = -1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (stride == -1) {
      stride = expected = t.stride(d);
    } else if (t.stride(d) != expected) {
      return -1;
    }
    expected *= t.size(d);
  }
  return stride;
}

inline std::optional<Strides> strides_of(const at::Tensor& t, const Shape& shape) {
  if (t.dim() == 1) return Strides{0, shape.classes, t.stride(0)};
  const int64_t class_stride = shape.classes == 1 ? 1 : t.stride(1);
  if (shape.outer == 1 && shape.inner == t.size(0)) return Strides{0, t.stride(0), class_stride};
  const int64_t inner = inner_stride(t);
  if (inner == -1) return std::nullopt;
  return Strides{t.stride(0), inner, class_stride};
}

// A view of t that a single inner stride describes: t itself wherever possible.
inline at::Tensor with_one_inner_stride(const at::Tensor& t, const Shape& shape) {
  return strides_of(t, shape) ? t : t.contiguous();
}

}  // namespace mbperf
