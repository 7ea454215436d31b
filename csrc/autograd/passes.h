// The passes over the logits that the differentiable cross entropy is made of, called through the dispatcher.
#pragma once

#include "autograd/fallback.h"

namespace mbperf {

using ForwardSignature = Tensor(const Tensor&, const Tensor&, int64_t, c10::SymInt, double, OptionalDtype,
                                double, const OptionalTensor&);
using ForwardGradientSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t,
                                                            c10::SymInt, double, OptionalDtype, double,
                                                            const OptionalTensor&);
using ForwardStatsSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, int64_t, c10::SymInt, double, OptionalDtype, double, double, bool,
    const OptionalTensor&);
using ForwardSoftcapSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                           int64_t, c10::SymInt, double,
                                                                           OptionalDtype, double, double,
                                                                           bool, const OptionalTensor&);
using BackwardSoftcapSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const Tensor&, int64_t, c10::SymInt, double, double, double,
                                        const OptionalTensor&);
using ForwardInPlaceSignature = Tensor(Tensor&, const Tensor&, int64_t, c10::SymInt, double, OptionalDtype,
                                       double, const OptionalTensor&);
using ForwardSoftmaxSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, int64_t,
                                                                   c10::SymInt, double, OptionalDtype, double,
                                                                   const OptionalTensor&);
using BackwardSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 int64_t, c10::SymInt, double, double, const OptionalTensor&);
using ScaleSignature = void(Tensor&, const Tensor&, const Tensor&, c10::SymInt);
using RescaleSignature = void(Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt,
                              double, double, const OptionalTensor&);

template <class Signature, class Input>
auto call_pass(const c10::TypedOperatorHandle<Signature>& op, Input& input, const Tensor& target,
               const OptionalTensor& weight, const Settings& s) {
  return op.call(input, target, s.reduction, s.ignore_index, s.label_smoothing, s.out_dtype, s.z_loss,
                 weight);
}

inline Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                      const Settings& s) {
  static const auto op = operator_named<ForwardSignature>("mbperf::cross_entropy_forward");
  return call_pass(op, input, target, weight, s);
}

inline std::tuple<Tensor, Tensor> forward_gradient(const Tensor& input, const Tensor& target,
                                                   const OptionalTensor& weight, const Settings& s) {
  static const auto op = operator_named<ForwardGradientSignature>("mbperf::cross_entropy_forward_gradient");
  return call_pass(op, input, target, weight, s);
}

inline std::tuple<Tensor, Tensor, Tensor> forward_softmax(const Tensor& input, const Tensor& target,
                                                          const OptionalTensor& weight, const Settings& s) {
  static const auto op = operator_named<ForwardSoftmaxSignature>("mbperf::cross_entropy_forward_softmax");
  return call_pass(op, input, target, weight, s);
}

inline auto forward_stats(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                          const Settings& s, bool wants_gradient) {
  static const auto op = operator_named<ForwardStatsSignature>("mbperf::cross_entropy_forward_stats");
  return op.call(input, target, s.reduction, s.ignore_index, s.label_smoothing, s.out_dtype, s.z_loss,
                 s.softcap, wants_gradient, weight);
}

inline auto forward_softcap(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                            const Settings& s, bool wants_gradient) {
  static const auto op = operator_named<ForwardSoftcapSignature>("mbperf::cross_entropy_forward_softcap");
  return op.call(input, target, s.reduction, s.ignore_index, s.label_smoothing, s.out_dtype, s.z_loss,
                 s.softcap, wants_gradient, weight);
}

inline Tensor backward_softcap(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                               const OptionalTensor& weight, const Tensor& row_max, const Tensor& row_sum,
                               const Settings& s) {
  static const auto op = operator_named<BackwardSoftcapSignature>("mbperf::cross_entropy_backward_softcap");
  return op.call(grad_loss, input, target, row_max, row_sum, s.reduction, s.ignore_index, s.label_smoothing,
                 s.z_loss, s.softcap, weight);
}

inline Tensor forward_in_place(Tensor& input, const Tensor& target, const OptionalTensor& weight,
                               const Settings& s) {
  static const auto op = operator_named<ForwardInPlaceSignature>("mbperf::cross_entropy_forward_gradient_");
  return call_pass(op, input, target, weight, s);
}

inline Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                       const OptionalTensor& weight, const Tensor& row_max, const Tensor& row_sum,
                       const Settings& s) {
  static const auto op = operator_named<BackwardSignature>("mbperf::cross_entropy_backward");
  return op.call(grad_loss, input, target, row_max, row_sum, s.reduction, s.ignore_index, s.label_smoothing,
                 s.z_loss, weight);
}

inline void scale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& target,
                            const Settings& s) {
  static const auto op = operator_named<ScaleSignature>("mbperf::cross_entropy_scale_gradient_");
  op.call(grad_input, grad_loss, target, s.ignore_index);
}

inline void rescale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& input,
                              const Tensor& target, const OptionalTensor& weight, const Settings& s) {
  static const auto op = operator_named<RescaleSignature>("mbperf::cross_entropy_rescale_gradient_");
  op.call(grad_input, grad_loss, input, target, s.reduction, s.ignore_index, s.label_smoothing, s.z_loss,
          weight);
}

}  // namespace mbperf
