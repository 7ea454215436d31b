// The passes of token_log_probs that all backends with row kernels share: calls of cross entropy with
// t_y = -1, so that its loss is log p_y. At temperature 1 without an entropy there is nothing else to do.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "checks.h"
#include "shape.h"

namespace mbperf {

// The rows of row_statistics.
enum RowStatistics : int64_t { kRowMax, kRowSum, kRowMoment };

// Call<Acc>: the backend's call of cross entropy.
template <template <class> class Call, class Acc>
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

// A backend has Call<Acc>; Guard, made of the logits for the time of a pass; empty_gradient(logits); and
// set_upstream(problem, d(result)/d(log p) per position or nullptr, whether the gradient is written over the
// logits).
template <class Backend>
struct TokenPasses {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                                    double temperature, int64_t ignore_index,
                                                    std::optional<at::ScalarType> out_dtype,
                                                    bool wants_entropy) {
    return with_call(
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

  static Tensor backward(const Tensor& logits, const Tensor& target, const Tensor& row_statistics,
                         double temperature, int64_t ignore_index, const OptionalTensor& grad_log_probs,
                         const OptionalTensor& grad_entropy) {
    Tensor grad = Backend::empty_gradient(logits);
    write_gradient(grad, logits, target, row_statistics, temperature, ignore_index, grad_log_probs,
                   grad_entropy);
    return grad;
  }

  // Every kernel reads a logit before the same thread writes its gradient.
  static void backward_(Tensor& logits, const Tensor& target, const Tensor& row_statistics,
                        double temperature, int64_t ignore_index, const OptionalTensor& grad_log_probs,
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

 private:
  template <class Body>
  static auto with_call(const Tensor& logits, const Tensor& target, double temperature, int64_t ignore_index,
                        bool entropy, const Body& body) {
    const typename Backend::Guard guard(logits);
    const OptionalTensor no_weight;
    const CrossEntropyArguments a{logits, target, no_weight, kNone, ignore_index, 0, 0};
    if (logits.scalar_type() == at::kDouble) {
      TokenCall<Backend::template Call, double> call(a, temperature, entropy);
      return body(call, double{});
    }
    TokenCall<Backend::template Call, float> call(a, temperature, entropy);
    return body(call, float{});
  }

  static void write_gradient(Tensor& grad, const Tensor& logits, const Tensor& target,
                             const Tensor& row_statistics, double temperature, int64_t ignore_index,
                             const OptionalTensor& grad_log_probs, const OptionalTensor& grad_entropy) {
    const auto widened = [&](const OptionalTensor& t) {
      return t && t->defined() ? t->to(accumulate_type(logits)).contiguous() : Tensor();
    };
    const Tensor through_log_probs = widened(grad_log_probs), through_entropy = widened(grad_entropy);
    with_call(logits, target, temperature, ignore_index, through_entropy.defined(),
              [&](auto& call, auto accumulated) {
                using Acc = decltype(accumulated);
                const auto pointer = [](const Tensor& t) {
                  return t.defined() ? t.template const_data_ptr<Acc>() : nullptr;
                };
                call.set_gradient(grad);
                Backend::set_upstream(call.problem, pointer(through_log_probs), grad.is_same(logits));
                call.problem.entropy_scale = pointer(through_entropy);
                call.problem.known_softmax = true;
                // Inputs only here: the kernels do not write statistics that are already known.
                call.set_statistics(const_cast<Acc*>(pointer(row_statistics)), row_statistics.size(0));
                call.run();
              });
  }
};

}  // namespace mbperf
