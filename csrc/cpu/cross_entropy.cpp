// Cross entropy on the CPU: from tensors to positions and classes, work shared over rows, or over the
// columns of few long rows. Sums are taken over chunks that do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "shape.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Arguments = CrossEntropyArguments;

// Tiles load vectors along positions or along classes; any other layout is packed row by row.
bool fits_tiles(const Strides& s) { return s.inner == 1 || s.classes == 1; }

// Elements a chunk: small enough to balance two threads, large enough to hide what a chunk costs.
constexpr int64_t kChunk = 16384;
// A parallel region costs about 5 us here, as much as 32,768 exponentials on one core.
constexpr int64_t kParallel = 32768;
// From here on a gradient goes past the caches: with logits as large it would not stay there anyway. With
// 32 MiB of last-level cache that is 0.8 to 0.9 times as fast at 8 MB, 1.2 times at 16 MB fresh from memory.
// Sooner where its classes are far apart: at a stride of a power of two their lines would all compete for the
// same few places in the cache.
constexpr int64_t kStreamingBytes = int64_t{12} << 20;
constexpr int64_t kStreamingStridedBytes = int64_t{2} << 20;

int64_t chunk_size(const Shape& shape) {
  const int64_t rows = kChunk / shape.classes;
  return rows >= 64 ? rows / 64 * 64 : std::max<int64_t>(rows, 1);
}

template <class Body>
void over_range(int64_t count, bool parallel, const Body& body) {
  if (!parallel) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

template <class Acc>
double run_over_rows(const Task<Acc>& task, const DtypeKernels<Acc>& kernels, const Shape& shape,
                     bool tiles) {
  const int64_t chunk = chunk_size(shape);
  const int64_t chunks = (task.positions + chunk - 1) / chunk;
  const auto kernel = tiles ? kernels.tiles : kernels.rows;
  if (chunks == 1) return kernel(task, 0, task.positions);
  std::vector<double> partial(chunks);
  over_range(chunks, task.positions * task.classes >= kParallel, [&](int64_t i) {
    partial[i] = kernel(task, i * chunk, std::min(task.positions, (i + 1) * chunk));
  });
  double total = 0;
  for (const double p : partial) total += p;
  return total;
}

template <class Acc>
double run_over_columns(const Task<Acc>& task, const DtypeKernels<Acc>& kernels) {
  const int64_t blocks = block_count(task.classes);
  std::vector<Softmax<Acc>> statistics(task.positions * blocks);
  std::vector<Softmax<Acc>> rows(task.positions);
  if (!task.known_softmax)
    over_range(task.positions * blocks, true,
               [&](int64_t i) { statistics[i] = kernels.block_statistics(task, i / blocks, i % blocks); });
  double total = 0;
  for (int64_t p = 0; p < task.positions; ++p)
    total += kernels.merge_blocks(task, p, &statistics[p * blocks], &rows[p]);
  if (task.grad)
    over_range(task.positions * blocks, true,
               [&](int64_t i) { kernels.block_gradient(task, i / blocks, i % blocks, rows[i / blocks]); });
  return total;
}

// Rows longer than a chunk, too few to keep every thread busy to the end.
template <class Acc>
bool splits_columns(const Task<Acc>& task, bool tiles) {
  return !tiles && task.classes >= kParallel && at::get_num_threads() > 1 && !at::in_parallel_region() &&
         task.positions < 4 * at::get_num_threads();
}

template <class Acc>
const DtypeKernels<Acc>& kernels_of(at::ScalarType dtype) {
  const RowKernels& all = row_kernels();
  if constexpr (std::is_same_v<Acc, double>) {
    return all.float64;
  } else {
    return dtype == at::kFloat ? all.float32 : dtype == at::kBFloat16 ? all.bfloat16 : all.float16;
  }
}

Tensor index_target(const Tensor& target) { return target.to(at::kLong).contiguous(); }

// Raises for a target out of bounds; returns how many are not ignored.
int64_t count_targets(const Tensor& index, int64_t classes, int64_t ignore_index) {
  const int64_t* target = index.const_data_ptr<int64_t>();
  int64_t live = 0;
  const int64_t bad = row_kernels().scan_targets(target, index.numel(), classes, ignore_index, &live);
  TORCH_CHECK_INDEX(bad < 0, "Target ", target[bad], " is out of bounds.");
  return live;
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
    task.input = input.const_data_ptr();
    task.input_strides = *strides_of(input, shape);
    task.positions = shape.positions();
    task.inner = shape.inner;
    task.classes = shape.classes;
    task.ignore_index = a.ignore_index;
    task.hard_share = Acc(1 - a.label_smoothing);
    task.smooth_share = Acc(a.label_smoothing / double(shape.classes));
    task.weight_sum = Acc(shape.classes);
    task.z_loss = Acc(a.z_loss);
    task.scale = 1;
    if (a.weight && a.weight->defined()) {
      weight = a.weight->to(accumulate_type(input)).contiguous();
      task.weight = weight.const_data_ptr<Acc>();
      if (a.label_smoothing != 0) task.weight_sum = Acc(weight.sum(at::kDouble).item<double>());
    }
    set_target(a);
    if (a.reduction == kMean) set_mean();
  }

  void set_target(const Arguments& a) {
    if (is_soft(a.input, a.target)) {
      target = with_one_inner_stride(a.target, shape);
      task.soft_target = target.const_data_ptr();
      task.soft_strides = *strides_of(target, shape);
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
      denominator = 0;
      for (int64_t p = 0; p < task.positions; ++p)
        if (task.target[p] != task.ignore_index) denominator += task.weight[task.target[p]];
      // The z loss is averaged over positions, the loss over weights: this denominator must do for both.
      task.z_loss *= Acc(denominator / double(live));
    }
    task.scale = Acc(1 / denominator);
  }

  void set_gradient(Tensor& grad) {
    task.grad = grad.mutable_data_ptr();
    task.grad_strides = *strides_of(grad, shape);
    task.streaming_stores =
        int64_t(grad.nbytes()) >= (task.grad_strides.classes == 1 ? kStreamingBytes : kStreamingStridedBytes);
  }

  bool uses_tiles() const {
    const bool possible = fits_tiles(task.input_strides) && (!task.grad || fits_tiles(task.grad_strides)) &&
                          (!task.soft_target || fits_tiles(task.soft_strides));
    const bool rows_adjacent =
        task.input_strides.classes == 1 && (!task.grad || task.grad_strides.classes == 1);
    return possible && (shape.classes <= kTileClasses || !rows_adjacent);
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

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
               int64_t ignore_index, double label_smoothing, std::optional<at::ScalarType> out_dtype,
               double z_loss) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) { return loss_of(job, a, out_dtype); });
}

std::tuple<Tensor, Tensor> forward_gradient(const Tensor& input, const Tensor& target,
                                            const OptionalTensor& weight, int64_t reduction,
                                            int64_t ignore_index, double label_smoothing,
                                            std::optional<at::ScalarType> out_dtype, double z_loss) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_job(a, [&](auto& job) {
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    job.set_gradient(grad);
    Tensor loss = loss_of(job, a, out_dtype);
    return std::make_tuple(loss, grad);
  });
}

Tensor forward_gradient_(Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                         int64_t ignore_index, double label_smoothing,
                         std::optional<at::ScalarType> out_dtype, double z_loss) {
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
                                                   const OptionalTensor& weight, int64_t reduction,
                                                   int64_t ignore_index, double label_smoothing,
                                                   std::optional<at::ScalarType> out_dtype, double z_loss) {
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

Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                const OptionalTensor& weight, const Tensor& row_max, const Tensor& row_sum, int64_t reduction,
                int64_t ignore_index, double label_smoothing, double z_loss) {
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
                       const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, double z_loss) {
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
