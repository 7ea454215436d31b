// A call of cross entropy, or of what its kernels compute besides, on the CPU: from tensors to positions and
// classes, and to the kernel that serves them.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "cpu/cross_entropy/capped.h"
#include "cpu/cross_entropy/threads.h"
#include "cpu/simd/isa.h"
#include "shape.h"

namespace mbperf {

// The strides of a tensor that a single inner stride describes. One class has no stride: 0 rather than 1 says
// that vectors run along positions.
inline Strides tile_strides(const at::Tensor& t, const Shape& shape) {
  Strides strides = *strides_of(t, shape);
  if (shape.classes == 1) strides.classes = 0;
  return strides;
}

// Overrides choose() for this process, or nothing.
inline std::atomic<const Path*> forced_path{nullptr};

// Of a table with one member a dtype.
template <class Acc, class Table>
const auto& kernels_of(at::ScalarType dtype, const Table& all) {
  if constexpr (std::is_same_v<Acc, double>) {
    return all.float64;
  } else {
    return dtype == at::kFloat ? all.float32 : dtype == at::kBFloat16 ? all.bfloat16 : all.float16;
  }
}

// A weight a class, in the type that is accumulated in. For a few, `to` would cost as much as a small loss.
inline at::Tensor accumulated(const at::Tensor& weight, at::ScalarType dtype) {
  if (weight.scalar_type() == dtype || weight.numel() > 64 || !weight.is_contiguous())
    return weight.to(dtype).contiguous();
  at::Tensor result = at::detail::empty_cpu(weight.sizes(), dtype, /*pin_memory=*/false, std::nullopt);
  AT_DISPATCH_REDUCED_FLOATING_TYPES(weight.scalar_type(), "cross_entropy", [&] {
    const scalar_t* from = weight.const_data_ptr<scalar_t>();
    std::copy(from, from + weight.numel(), result.mutable_data_ptr<float>());
  });
  return result;
}

inline at::Tensor index_target(const at::Tensor& target) { return target.to(at::kLong).contiguous(); }

// How many of a range of targets are not ignored, and where the first out of bounds is, or -1.
struct Scan {
  int64_t live = 0, bad = -1;

  friend Scan operator+(Scan a, Scan b) { return {a.live + b.live, a.bad >= 0 ? a.bad : b.bad}; }
};

// Raises for a target out of bounds; returns how many are not ignored.
inline int64_t count_targets(const at::Tensor& index, int64_t classes, int64_t ignore_index) {
  const int64_t* target = index.const_data_ptr<int64_t>();
  const Scan all = over_targets<Scan>(index.numel(), [&](int64_t begin, int64_t end) {
    Scan scan;
    const int64_t bad =
        instruction_set().rows.scan_targets(target + begin, end - begin, classes, ignore_index, &scan.live);
    if (bad >= 0) scan.bad = begin + bad;
    return scan;
  });
  TORCH_CHECK_INDEX(all.bad < 0, "Target ", target[all.bad], " is out of bounds.");
  return all.live;
}

template <class Acc>
double weight_of_targets(const Problem<Acc>& problem) {
  return over_targets<double>(problem.positions, [&](int64_t begin, int64_t end) {
    return sum_of(begin, end, [&](int64_t p) {
      const int64_t y = problem.target[p];
      return y == problem.ignore_index ? 0.0 : double(problem.weight[y]);
    });
  });
}

// A call's problem together with the tensors that own what its pointers point to.
template <class Acc>
struct Call {
  Shape shape;
  at::Tensor input, target, weight;
  Problem<Acc> problem{};
  int64_t live = 0;        // positions that count
  double denominator = 1;  // of the mean
  double softcap = 0;      // 0: none

  explicit Call(const CrossEntropyArguments& a)
      : shape(a.input), input(with_one_inner_stride(a.input, shape)) {
    const double smoothing = smoothing_of(a, shape.classes);
    problem.input = input.const_data_ptr();
    problem.input_strides = tile_strides(input, shape);
    problem.positions = shape.positions();
    problem.inner = shape.inner;
    problem.classes = shape.classes;
    problem.ignore_index = a.ignore_index;
    problem.target_coeff = Acc(1 - smoothing);
    problem.prob_coeff = Acc(smoothing / double(shape.classes));
    problem.weight_sum = Acc(shape.classes);
    problem.z_loss = Acc(a.z_loss);
    problem.scale = 1;
    if (a.weight && a.weight->defined()) {
      weight = accumulated(*a.weight, accumulate_type(input));
      problem.weight = weight.const_data_ptr<Acc>();
      if (smoothing != 0)
        problem.weight_sum =
            Acc(sum_of(0, shape.classes, [&](int64_t c) { return double(problem.weight[c]); }));
    }
    set_target(a);
    if (a.reduction == kMean) set_mean();
  }

  void set_target(const CrossEntropyArguments& a) {
    if (is_soft(a.input, a.target)) {
      target = with_one_inner_stride(a.target, shape);
      problem.soft_target = target.const_data_ptr();
      problem.soft_strides = tile_strides(target, shape);
      live = problem.positions;
    } else {
      target = index_target(a.target);
      live = count_targets(target, shape.classes, a.ignore_index);
      problem.target = target.const_data_ptr<int64_t>();
    }
  }

  void set_mean() {
    denominator = double(live);
    if (problem.weight && problem.target) {
      denominator = weight_of_targets(problem);
      // The z loss is averaged over positions, the loss over weights: this denominator must do for both.
      problem.z_loss *= Acc(denominator / double(live));
    }
    problem.scale = Acc(1 / denominator);
  }

  void set_gradient(at::Tensor& grad) {
    problem.grad = grad.mutable_data_ptr();
    problem.grad_strides = tile_strides(grad, shape);
    problem.streaming_stores =
        int64_t(grad.nbytes()) >= streaming_bytes(problem.grad_strides, grad.element_size());
  }

  const RowKernels& tables() const {
    return problem.predicted ? instruction_set().stats : instruction_set().rows;
  }

  const DtypeKernels<Acc>& kernels() const { return kernels_of<Acc>(input.scalar_type(), tables()); }

  Path path() const { return path_of(problem, kernels().vector); }

  static Path path_of(const Problem<Acc>& problem, VectorShape vector) {
    if (const Path* forced = forced_path.load(std::memory_order_relaxed))
      if (serves(*forced, problem, vector)) return *forced;
    return choose(problem, vector, at::in_parallel_region() ? 1 : at::get_num_threads());
  }

  double run() {
    if (softcap != 0) return run_capped();
    const Path chosen = path();
    return chosen == Path::kColumns ? run_over_columns(problem, kernels())
                                    : run_over_rows(problem, kernels(), shape, chosen);
  }

  double run_capped() {
    const at::ScalarType dtype = accumulate_type(input);
    if (problem.soft_target) {  // beside logits in scratch memory, which are of this type
      target = with_one_inner_stride(target.to(dtype), shape);
      problem.soft_target = target.const_data_ptr();
      problem.soft_strides = tile_strides(target, shape);
    }
    const InstructionSet& all = instruction_set();
    const DtypeKernels<Acc>& row_kernels = kernels_of<Acc>(dtype, tables());
    const Capped<Acc> capped(problem, int64_t(input.element_size()), Acc(softcap),
                             kernels_of<Acc>(input.scalar_type(), all.softcap), row_kernels);
    return capped.run(shape, path_of(capped.in_scratch(), row_kernels.vector));
  }
};

// Calls body(Call<Acc>&) with the accumulation type of the logits.
template <class Body>
auto with_call(const CrossEntropyArguments& a, const Body& body) {
  if (a.input.scalar_type() == at::kDouble) {
    Call<double> call(a);
    return body(call);
  }
  Call<float> call(a);
  return body(call);
}

}  // namespace mbperf
