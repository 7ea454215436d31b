// The parts that the differentiable cross entropy and its autocast share: the settings of a call, the same
// function in torch's own operators, and calls of operators through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace mbperf {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

struct Settings {
  int64_t reduction;
  c10::SymInt ignore_index;
  double label_smoothing;
  OptionalDtype out_dtype;
  double z_loss;
  double softcap = 0;  // 0: none
};

struct LossAndLse {
  Tensor loss, lse;
};

// Per position, none of them differentiable: 0, -1 and 0 where ignored.
struct Stats {
  Tensor entropy, predicted, probability;
};

// The softcap of Settings: a number whose inverse is a number too, also as float32, or 0 for none.
double checked_softcap(std::optional<double> softcap);

// softcap tanh(input / softcap), or the input itself where there is none.
Tensor softcapped(const Tensor& input, const Settings& s);

// Differentiable any number of times, in every mode; also every case that the kernels do not serve, and
// torch's own errors. Without lse where it is not wanted.
LossAndLse by_torch(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    const Settings& s, bool wants_lse);

// In torch's operators, which hold three tensors as large as the logits.
Stats stats_by_torch(const Tensor& input, const Tensor& target, const Settings& s);

// In the shape of one class's logits.
Tensor ignored_positions(const Tensor& input, const Tensor& target, const Settings& s);

// In the dtype that losses are accumulated in; what is not floating stays as it is.
Tensor widened(const Tensor& t);

int64_t class_dim(const Tensor& input);

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class Signature>
auto call_forward(const c10::TypedOperatorHandle<Signature>& op, const Tensor& input, const Tensor& target,
                  const OptionalTensor& weight, const Settings& s) {
  return op.call(input, target, weight, s.reduction, s.ignore_index, s.label_smoothing, s.out_dtype, s.z_loss,
                 s.softcap != 0 ? std::optional<double>(s.softcap) : std::nullopt);
}

}  // namespace mbperf
