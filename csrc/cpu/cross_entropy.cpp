// Cross entropy on the CPU: from tensors to positions and classes.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/cross_entropy_threads.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "shape.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Arguments = CrossEntropyArguments;

// Tiles load vectors along positions or along classes.
bool fits_tiles(const Strides& s) { return s.inner == 1 || s.classes == 1; }

// From here on a gradient goes past the caches: with logits as large it would not stay there anyway. With
// 32 MiB of last-level cache that is 0.8 to 0.9 times as fast at 8 MB, 1.2 times at 16 MB fresh from memory.
// Sooner where its classes are far apart: with a gradient of 4 to 9 MB 1.3 to 2 times as fast, of 2.4 MB 0.8
// times; yet at 2 MB already where they are a multiple of 1 KiB apart, since their lines then compete for the
// same few places in the cache.
constexpr int64_t kStreamingBytes = int64_t{12} << 20;
constexpr int64_t kStreamingApartBytes = int64_t{4} << 20;
constexpr int64_t kStreamingCompetingBytes = int64_t{2} << 20;

int64_t streaming_bytes(const Tensor& grad, const Strides& strides) {
  if (strides.classes <= 1) return kStreamingBytes;
  const bool compete = strides.classes * grad.element_size() % 1024 == 0;
  return compete ? kStreamingCompetingBytes : kStreamingApartBytes;
}

// The strides of a tensor that a single inner stride describes. One class has no stride: 0 rather than 1 says
// that vectors run along positions.
Strides tile_strides(const Tensor& t, const Shape& shape) {
  Strides strides = *strides_of(t, shape);
  if (shape.classes == 1) strides.classes = 0;
  return strides;
}

// Beside each other in memory, fewer positions than this are packed row by row instead: 1.4 to 4 times as
// fast up to 5 of them, alike at 8.
constexpr int64_t kFewLanes = 8;

template <class Acc>
const DtypeKernels<Acc>& kernels_of(at::ScalarType dtype) {
  const RowKernels& all = row_kernels();
  if constexpr (std::is_same_v<Acc, double>) {
    return all.float64;
  } else {
    return dtype == at::kFloat ? all.float32 : dtype == at::kBFloat16 ? all.bfloat16 : all.float16;
  }
}

// A weight a class, in the type that is accumulated in. For a few, `to` would cost as much as a small loss.
Tensor accumulated(const Tensor& weight, at::ScalarType dtype) {
  if (weight.scalar_type() == dtype || weight.numel() > 64 || !weight.is_contiguous())
    return weight.to(dtype).contiguous();
  Tensor result = at::detail::empty_cpu(weight.sizes(), dtype, /*pin_memory=*/false, std::nullopt);
  AT_DISPATCH_REDUCED_FLOATING_TYPES(weight.scalar_type(), "cross_entropy", [&] {
    const scalar_t* from = weight.const_data_ptr<scalar_t>();
    std::copy(from, from + weight.numel(), result.mutable_data_ptr<float>());
  });
  return result;
}

Tensor index_target(const Tensor& target) { return target.to(at::kLong).contiguous(); }

// Of a range of targets: how many are not ignored, and where the first out of bounds is, or -1.
struct Scan {
  int64_t live = 0, bad = -1;

  friend Scan operator+(Scan a, Scan b) { return {a.live + b.live, a.bad >= 0 ? a.bad : b.bad}; }
};

// Raises for a target out of bounds; returns how many are not ignored.
int64_t count_targets(const Tensor& index, int64_t classes, int64_t ignore_index) {
  const int64_t* target = index.const_data_ptr<int64_t>();
  const Scan all = over_targets<Scan>(index.numel(), [&](int64_t begin, int64_t end) {
    Scan scan;
    const int64_t bad =
        row_kernels().scan_targets(target + begin, end - begin, classes, ignore_index, &scan.live);
    if (bad >= 0) scan.bad = begin + bad;
    return scan;
  });
  TORCH_CHECK_INDEX(all.bad < 0, "Target ", target[all.bad], " is out of bounds.");
  return all.live;
}

template <class Acc>
double weight_of_targets(const Task<Acc>& task) {
  return over_targets<double>(task.positions, [&](int64_t begin, int64_t end) {
    return sum_of(begin, end, [&](int64_t p) {
      const int64_t y = task.target[p];
      return y == task.ignore_index ? 0.0 : double(task.weight[y]);
    });
  });
}

// A call's task together with the tensors that own what its pointers point to.
template <class Acc>
struct Job {
  Shape shape;
  Tensor input, target, weight;
  Task<Acc> task{};
  int64_t live = 0;        // positions that count
  double denominator = 1;  // of the mean

  explicit Job(const Arguments& a) : shape(a.input), input(with_one_inner_stride(a.input, shape)) {
    // To share a target out among one class changes nothing: exactly, without 1 - s + s.
    const double smoothing = shape.classes == 1 && !is_soft(a.input, a.target) ? 0 : a.label_smoothing;
    task.input = input.const_data_ptr();
    task.input_strides = tile_strides(input, shape);
    task.positions = shape.positions();
    task.inner = shape.inner;
    task.classes = shape.classes;
    task.ignore_index = a.ignore_index;
    task.hard_share = Acc(1 - smoothing);
    task.smooth_share = Acc(smoothing / double(shape.classes));
    task.weight_sum = Acc(shape.classes);
    task.z_loss = Acc(a.z_loss);
    task.scale = 1;
    if (a.weight && a.weight->defined()) {
      weight = accumulated(*a.weight, accumulate_type(input));
      task.weight = weight.const_data_ptr<Acc>();
      if (smoothing != 0)
        task.weight_sum = Acc(sum_of(0, shape.classes, [&](int64_t c) { return double(task.weight[c]); }));
    }
    set_target(a);
    if (a.reduction == kMean) set_mean();
  }

  void set_target(const Arguments& a) {
    if (is_soft(a.input, a.target)) {
      target = with_one_inner_stride(a.target, shape);
      task.soft_target = target.const_data_ptr();
      task.soft_strides = tile_strides(target, shape);
      live = task.positions;
    } else {
      target = index_target(a.target);
      live = count_targets(target, shape.classes, a.ignore_index);
      task.target = target.const_data_ptr<int64_t>();
    }
  }

  void set_mean() {
    denominator = double(live);
    if (task.weight && task.target) {
      denominator = weight_of_targets(task);
      // The z loss is averaged over positions, the loss over weights: this denominator must do for both.
      task.z_loss *= Acc(denominator / double(live));
    }
    task.scale = Acc(1 / denominator);
  }

  void set_gradient(Tensor& grad) {
    task.grad = grad.mutable_data_ptr();
    task.grad_strides = tile_strides(grad, shape);
    task.streaming_stores = int64_t(grad.nbytes()) >= streaming_bytes(grad, task.grad_strides);
  }

  bool uses_tiles() const {
    if (shape.classes <= kTileClasses) return true;
    const bool rows_adjacent =
        task.input_strides.classes == 1 && (!task.grad || task.grad_strides.classes == 1);
    return !rows_adjacent && task.inner >= kFewLanes && fits_tiles(task.input_strides) &&
           (!task.grad || fits_tiles(task.grad_strides)) &&
           (!task.soft_target || fits_tiles(task.soft_strides));
  }

  double run() {
    const auto& kernels = kernels_of<Acc>(input.scalar_type());
    const bool tiles = uses_tiles();
    return splits_columns(task, tiles) ? run_over_columns(task, kernels)
                                       : run_over_rows(task, kernels, shape, tiles);
  }
};

// Calls body(Job<Acc>&) with the accumulation type of the logits.
template <class Body>
auto with_job(const Arguments& a, const Body& body) {
  if (a.input.scalar_type() == at::kDouble) {
    Job<double> job(a);
    return body(job);
  }
  Job<float> job(a);
  return body(job);
}

Tensor scalar(double value, at::ScalarType dtype) {
  Tensor result = at::empty({}, at::TensorOptions().dtype(dtype));
  // fill_ would cost more than 64 rows of 10 logits.
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "cross_entropy", [&] {
    *result.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(value);
  });
  return result;
}

// Runs the job and returns the loss, per position in the shape of a hard target or reduced.
template <class Acc>
Tensor loss_of(Job<Acc>& job, const Arguments& a, std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType dtype = out_dtype.value_or(a.input.scalar_type());
  if (a.reduction != kNone) {
    const double total = job.run();
    return scalar(a.reduction == kMean ? total / job.denominator : total, dtype);
  }
  std::vector<int64_t> sizes = a.input.sizes().vec();
  sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
  Tensor rows = at::empty(sizes, a.input.options().dtype(accumulate_type(a.input)));
  job.task.loss = rows.mutable_data_ptr<Acc>();
  job.run();
  return rows.to(dtype);
}

Tensor forward(const Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
               double label_smoothing, std::optional<at::ScalarType> out_dtype, double z_loss,
               const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) { return loss_of(job, a, out_dtype); });
}

std::tuple<Tensor, Tensor> forward_gradient(const Tensor& input, const Tensor& target, int64_t reduction,
                                            int64_t ignore_index, double label_smoothing,
                                            std::optional<at::ScalarType> out_dtype, double z_loss,
                                            const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) {
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    job.set_gradient(grad);
    Tensor loss = loss_of(job, a, out_dtype);
    return std::make_tuple(loss, grad);
  });
}

Tensor forward_gradient_(Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
                         double label_smoothing, std::optional<at::ScalarType> out_dtype, double z_loss,
                         const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) {
    const bool overwrites = job.input.is_same(input);
    Tensor grad = overwrites ? input : at::empty_like(job.input);
    job.set_gradient(grad);
    // Logits read while their place is written: past the caches would be a detour.
    job.task.streaming_stores = false;
    Tensor loss = loss_of(job, a, out_dtype);
    if (!overwrites) input.copy_(grad);
    return loss;
  });
}

std::tuple<Tensor, Tensor, Tensor> forward_softmax(const Tensor& input, const Tensor& target,
                                                   int64_t reduction, int64_t ignore_index,
                                                   double label_smoothing,
                                                   std::optional<at::ScalarType> out_dtype, double z_loss,
                                                   const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) {
    const auto options = input.options().dtype(accumulate_type(input));
    Tensor max = at::empty({job.shape.positions()}, options), sum = at::empty_like(max);
    using Acc = std::remove_pointer_t<decltype(job.task.loss)>;
    job.task.row_max = max.template mutable_data_ptr<Acc>();
    job.task.row_sum = sum.template mutable_data_ptr<Acc>();
    Tensor loss = loss_of(job, a, out_dtype);
    return std::make_tuple(loss, max, sum);
  });
}

Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& row_max,
                const Tensor& row_sum, int64_t reduction, int64_t ignore_index, double label_smoothing,
                double z_loss, const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) {
    using Acc = std::remove_pointer_t<decltype(job.task.loss)>;
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    job.set_gradient(grad);
    const Tensor upstream = grad_loss.to(accumulate_type(input)).contiguous();
    if (reduction == kNone) {
      job.task.row_scale = upstream.template const_data_ptr<Acc>();
    } else {
      job.task.scale *= *upstream.template const_data_ptr<Acc>();
    }
    job.task.known_softmax = true;
    // Inputs only here: the kernels do not write statistics that are already known.
    job.task.row_max = const_cast<Acc*>(row_max.template const_data_ptr<Acc>());
    job.task.row_sum = const_cast<Acc*>(row_sum.template const_data_ptr<Acc>());
    job.run();
    return grad;
  });
}

bool is_one(const Tensor& grad_loss) {
  // item would cost half a microsecond.
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_loss.scalar_type(), "cross_entropy",
      [&] { return *grad_loss.const_data_ptr<scalar_t>() == scalar_t(1); });
}

void scale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& target,
                     int64_t ignore_index) {
  if (!is_soft(grad_input, target))
    count_targets(index_target(target), grad_input.size(grad_input.dim() == 1 ? 0 : 1), ignore_index);
  if (!is_one(grad_loss)) grad_input.mul_(grad_loss);
}

void rescale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                       int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
                       const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  if (is_one(grad_loss)) return scale_gradient_(grad_input, grad_loss, target, ignore_index);
  with_job(a, [&](auto& job) {
    using Acc = std::remove_pointer_t<decltype(job.task.loss)>;
    job.set_gradient(grad_input);
    job.task.scale *= Acc(grad_loss.item<double>());
    return job.run();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("cross_entropy_forward", forward);
  m.impl("cross_entropy_forward_gradient", forward_gradient);
  m.impl("cross_entropy_forward_gradient_", forward_gradient_);
  m.impl("cross_entropy_forward_softmax", forward_softmax);
  m.impl("cross_entropy_backward", backward);
  m.impl("cross_entropy_scale_gradient_", scale_gradient_);
  m.impl("cross_entropy_rescale_gradient_", rescale_gradient_);
}

}  // namespace mbperf
