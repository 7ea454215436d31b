// Log-probabilities of targets and entropies of rows on the CPU, by the row kernels of cross entropy: with
// t_y = -1 its loss is log p_y, and at temperature 1 without an entropy there is nothing else to do.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/cross_entropy/call.h"
#include "cpu/memory.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The rows of row_statistics.
enum Statistics : int64_t { kRowMax, kRowSum, kRowMoment };

template <class Acc>
struct TokenCall : Call<Acc> {
  using Call<Acc>::problem;

  TokenCall(const CrossEntropyArguments& a, double temperature, bool entropy) : Call<Acc>(a) {
    problem.target_coeff = -1;
    if (entropy || temperature != 1) problem.inverse_temperature = Acc(1 / temperature);
  }

  void set_statistics(Acc* statistics, int64_t kinds) {
    problem.row_max = statistics + kRowMax * problem.positions;
    problem.row_sum = statistics + kRowSum * problem.positions;
    if (kinds > kRowMoment) problem.row_moment = statistics + kRowMoment * problem.positions;
  }
};

template <class Body>
auto with_token_call(const Tensor& logits, const Tensor& target, double temperature, int64_t ignore_index,
                     bool entropy, const Body& body) {
  const OptionalTensor no_weight;
  const CrossEntropyArguments a{logits, target, no_weight, kNone, ignore_index, 0, 0};
  if (logits.scalar_type() == at::kDouble) {
    TokenCall<double> call(a, temperature, entropy);
    return body(call, double{});
  }
  TokenCall<float> call(a, temperature, entropy);
  return body(call, float{});
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, double temperature,
                                           int64_t ignore_index, std::optional<at::ScalarType> out_dtype,
                                           bool wants_entropy) {
  return with_token_call(
      logits, target, temperature, ignore_index, wants_entropy, [&](auto& call, auto accumulated) {
        using Acc = decltype(accumulated);
        const auto options = logits.options().dtype(accumulate_type(logits));
        const int64_t kinds = wants_entropy ? kRowMoment + 1 : kRowSum + 1;
        Tensor statistics = at::empty({kinds, call.shape.positions()}, options);
        Tensor log_probs = at::empty(target.sizes(), options);
        Tensor entropy = wants_entropy ? at::empty(target.sizes(), options) : at::empty({0}, options);
        call.set_statistics(statistics.mutable_data_ptr<Acc>(), kinds);
        call.problem.loss = log_probs.mutable_data_ptr<Acc>();
        if (wants_entropy) call.problem.entropy = entropy.mutable_data_ptr<Acc>();
        call.run();
        const at::ScalarType dtype = out_dtype.value_or(accumulate_type(logits));
        return std::make_tuple(log_probs.to(dtype), entropy.to(dtype), statistics);
      });
}

// Writes the gradient to `grad`, which may be the logits: every kernel reads a block before it writes it.
void write_gradient(Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& row_statistics,
                    double temperature, int64_t ignore_index, const OptionalTensor& grad_log_probs,
                    const OptionalTensor& grad_entropy) {
  const auto widened = [&](const OptionalTensor& t) {
    return t && t->defined() ? t->to(accumulate_type(logits)).contiguous() : Tensor();
  };
  const Tensor through_log_probs = widened(grad_log_probs), through_entropy = widened(grad_entropy);
  with_token_call(logits, target, temperature, ignore_index, through_entropy.defined(),
                  [&](auto& call, auto accumulated) {
                    using Acc = decltype(accumulated);
                    call.set_gradient(grad);
                    // Logits read while their place is written: past the caches would be a detour.
                    if (grad.is_same(logits)) call.problem.streaming_stores = false;
                    call.problem.scale = 0;
                    if (through_log_probs.defined())
                      call.problem.row_scale = through_log_probs.template const_data_ptr<Acc>();
                    if (through_entropy.defined())
                      call.problem.entropy_scale = through_entropy.template const_data_ptr<Acc>();
                    call.problem.known_softmax = true;
                    // Inputs only here: the kernels do not write statistics that are already known.
                    call.set_statistics(const_cast<Acc*>(row_statistics.template const_data_ptr<Acc>()),
                                        row_statistics.size(0));
                    call.run();
                  });
}

Tensor backward(const Tensor& logits, const Tensor& target, const Tensor& row_statistics, double temperature,
                int64_t ignore_index, const OptionalTensor& grad_log_probs,
                const OptionalTensor& grad_entropy) {
  Tensor grad = empty_recycled(logits.sizes(), logits.scalar_type());
  write_gradient(grad, logits, target, row_statistics, temperature, ignore_index, grad_log_probs,
                 grad_entropy);
  return grad;
}

void backward_(Tensor& logits, const Tensor& target, const Tensor& row_statistics, double temperature,
               int64_t ignore_index, const OptionalTensor& grad_log_probs,
               const OptionalTensor& grad_entropy) {
  // Logits of strides that the kernels would copy first.
  if (!strides_of(logits, Shape(logits))) {
    logits.copy_(
        backward(logits, target, row_statistics, temperature, ignore_index, grad_log_probs, grad_entropy));
    return;
  }
  write_gradient(logits, logits, target, row_statistics, temperature, ignore_index, grad_log_probs,
                 grad_entropy);
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("token_log_probs_forward", forward);
  m.impl("token_log_probs_backward", backward);
  m.impl("token_log_probs_backward_", backward_);
}

}  // namespace mbperf
