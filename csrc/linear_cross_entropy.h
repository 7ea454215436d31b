// The parts of linear + cross entropy that both backends share. With X (N, H), W (V, H), b (V):
//   Z = X W^T + b,  G = d loss / d Z = (softmax(Z) sum t - t) scale
//   dX = G W,  dW = G^T X,  db = sum of the rows of G
// for a chunk of rows of X at a time, so that Z and G, one buffer, are never larger than a chunk.
// With a K-dimensional loss W is (V, d1, ..., H); its rows are then V d1 ... columns of Z.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh_backward.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "shape.h"

namespace mbperf {

// The arguments that the operators of library.cpp have in common; input is (N, H).
struct LinearArguments {
  const at::Tensor& input;
  const at::Tensor& linear_weight;
  const at::Tensor& target;
  const std::optional<at::Tensor>& linear_bias;
  const std::optional<at::Tensor>& weight;
  int64_t reduction, ignore_index;
  double label_smoothing, z_loss;
  double softcap;         // 0: none
  int64_t chunk_rows;     // 0: by memory_budget
  int64_t memory_budget;  // bytes of a chunk of logits; -1: the default of the backend
};

// Which gradients are wanted: of input, linear_weight, linear_bias.
using Wanted = std::array<bool, 3>;

struct LinearGradients {
  at::Tensor input, linear_weight, linear_bias;
};

inline at::Tensor rows_of(const at::Tensor& t, int64_t begin, int64_t n) {
  return begin == 0 && n == t.size(0) ? t : t.narrow(0, begin, n);
}

// W and b as a matrix (V d1 ..., H) and a vector (V d1 ...), undefined where there is no b.
inline at::Tensor matrix_of(const LinearArguments& a) {
  return a.linear_weight.dim() == 2 ? a.linear_weight : a.linear_weight.reshape({-1, a.input.size(1)});
}
inline at::Tensor vector_of_bias(const LinearArguments& a) {
  return a.linear_bias && a.linear_bias->defined() ? a.linear_bias->reshape({-1}) : at::Tensor();
}

// An operator returns no undefined tensor.
inline at::Tensor or_empty(const at::Tensor& t, const at::Tensor& like) {
  return t.defined() ? t : at::empty({0}, like.options());
}

inline int64_t columns_of(const at::Tensor& linear_weight) {
  return c10::multiply_integers(linear_weight.sizes().slice(0, linear_weight.dim() - 1));
}

// (n, V, d1, ...) of a chunk (n, V d1 ...).
inline at::Tensor with_classes(const at::Tensor& chunk, const at::Tensor& linear_weight) {
  if (linear_weight.dim() == 2) return chunk;
  std::vector<int64_t> sizes = linear_weight.sizes().vec();
  sizes.pop_back();
  sizes.insert(sizes.begin(), chunk.size(0));
  return chunk.view(sizes);
}

// The shape of class indices: (N, d1, ...).
inline std::vector<int64_t> position_sizes(const LinearArguments& a) {
  std::vector<int64_t> sizes = a.linear_weight.sizes().vec();
  sizes.pop_back();
  sizes.front() = a.input.size(0);
  return sizes;
}

inline bool is_soft(const LinearArguments& a) { return a.target.dim() == a.linear_weight.dim(); }

// How large a chunk of logits is to be.
struct ChunkLimits {
  int64_t rows;           // 0: by bytes
  int64_t memory_budget;  // bytes; -1: the larger of the defaults of the backend
  int64_t default_rows, default_bytes;
};

// Rows a chunk: as many chunks as must be, all of about one size, and whole tiles of the products.
inline int64_t chunk_rows(const ChunkLimits& limits, int64_t rows, size_t row_bytes) {
  int64_t most = limits.rows;
  if (most <= 0)
    most = limits.memory_budget >= 0
               ? limits.memory_budget / int64_t(row_bytes)
               : std::max(limits.default_rows, limits.default_bytes / int64_t(row_bytes));
  most = std::max<int64_t>(most, 1);
  if (most >= rows || limits.rows > 0) return std::min(most, std::max<int64_t>(rows, 1));
  constexpr int64_t kTile = 32;
  const int64_t chunks = (rows + most - 1) / most, even = (rows + chunks - 1) / chunks;
  return std::min(most, (even + kTile - 1) / kTile * kTile);
}

// A chunk on a device. From the arithmetic of an H100 (800 TFLOP/s, 3 TB/s), not yet from a measurement: a
// chunk updates a float32 sum of the weight's gradient, 8 bytes a weight, beside 6 operations a weight and
// row, so that 4,096 rows keep it near 10% and 1 GB of logits is 4,096 rows of 128,256 in bfloat16.
inline ChunkLimits device_chunk(int64_t rows, int64_t memory_budget) {
  return {rows, memory_budget, 4096, int64_t{1} << 30};
}

// The operators of cross_entropy on a chunk, through the dispatcher.
struct ChunkRows {
  const LinearArguments& a;
  double z_loss;
  at::ScalarType accumulate;

  // Overwrites the logits by the gradient of the sum of their losses, which it returns.
  at::Tensor gradient_(at::Tensor logits, const at::Tensor& target) const {
    using Signature = at::Tensor(at::Tensor&, const at::Tensor&, int64_t, c10::SymInt, double,
                                 std::optional<at::ScalarType>, double, const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mbperf::cross_entropy_forward_gradient_", "")
                               .typed<Signature>();
    return op.call(logits, target, kSum, a.ignore_index, a.label_smoothing, accumulate, z_loss, a.weight);
  }

  at::Tensor loss(const at::Tensor& logits, const at::Tensor& target, int64_t reduction) const {
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, c10::SymInt, double,
                                 std::optional<at::ScalarType>, double, const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mbperf::cross_entropy_forward", "")
                               .typed<Signature>();
    return op.call(logits, target, reduction, a.ignore_index, a.label_smoothing, accumulate, z_loss,
                   a.weight);
  }

  // Loss and logsumexp, 0 where ignored.
  std::tuple<at::Tensor, at::Tensor> loss_and_lse(const at::Tensor& logits, const at::Tensor& target,
                                                  int64_t reduction) const {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, int64_t, c10::SymInt, double, std::optional<at::ScalarType>,
        double, const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mbperf::cross_entropy_forward_softmax", "")
                               .typed<Signature>();
    auto [loss, max, sum] =
        op.call(logits, target, reduction, a.ignore_index, a.label_smoothing, accumulate, z_loss, a.weight);
    return {loss, max.add_(sum.log_())};
  }

  // The loss of a chunk; writes its logsumexp to `lse`, the rows of this chunk, where that is defined.
  at::Tensor loss_writing_lse(const at::Tensor& logits, const at::Tensor& target, int64_t reduction,
                              const at::Tensor& lse) const {
    if (!lse.defined()) return loss(logits, target, reduction);
    const auto [result, chunk_lse] = loss_and_lse(logits, target, reduction);
    lse.copy_(chunk_lse.view(lse.sizes()));
    return result;
  }
};

// softcap: x = cap tanh(z / cap). Keeps t = tanh(z / cap) for the way back, dz = dx (1 - t^2).
class Softcap {
 public:
  explicit Softcap(double cap) : cap_(cap) {}

  at::Tensor forward(at::Tensor z) {
    if (cap_ == 0) return z;
    tanh_ = z.div_(cap_).tanh_();
    if (!capped_.defined() || capped_.sizes() != z.sizes()) capped_ = at::empty_like(z);
    return at::mul_out(capped_, tanh_, at::scalar_tensor(cap_, z.options()));
  }

  at::Tensor backward(at::Tensor gradient) const {
    if (cap_ == 0) return gradient;
    return at::tanh_backward_out(gradient, gradient, tanh_);
  }

 private:
  double cap_;
  at::Tensor tanh_, capped_;
};

// Turns the gradient of the sum of a chunk's losses into that of the result, in place.
// grad_loss and grad_lse, where defined, are one a position.
inline void apply_upstream_(at::Tensor& gradient, const at::Tensor& grad_loss,
                            const at::Tensor& through_lse) {
  // float16 ends at 65,504, below the usual loss scale: its upstream gradient stays as it is.
  const bool narrow = gradient.scalar_type() == at::kHalf;
  if (grad_loss.defined())
    gradient.mul_((narrow ? grad_loss : grad_loss.to(gradient.scalar_type())).unsqueeze(1));
  if (through_lse.defined()) gradient.add_(through_lse);
}

// Overwrites the logits of a chunk by the gradient of the sum of its losses, or by zeros without a loss.
// Returns softmax(logits) grad_lse, 0 where ignored; undefined where grad_lse, one a row of the chunk, is.
inline at::Tensor gradients_(at::Tensor& logits, const at::Tensor& target, bool has_loss,
                             const at::Tensor& grad_lse, const ChunkRows& rows) {
  at::Tensor through_lse;
  if (grad_lse.defined()) {
    const bool soft = is_soft(rows.a);
    const at::Tensor upstream = soft ? grad_lse : grad_lse.masked_fill(target == rows.a.ignore_index, 0);
    through_lse = at::softmax(logits, 1, rows.accumulate).mul_(upstream.unsqueeze(1));
  }
  if (has_loss) {
    rows.gradient_(logits, target);
  } else {
    logits.zero_();
  }
  return through_lse;
}

}  // namespace mbperf
