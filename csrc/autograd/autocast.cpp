// Cross entropy under autocast.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "autograd/fallback.h"

namespace mbperf {
namespace {

// F.cross_entropy runs in float32 under autocast. The kernels accumulate in float32 whatever they read, so
// plain half-precision logits stay as they are and only the loss is handed out in float32.
void to_autocast(Tensor& input, Tensor& target, OptionalTensor& weight, OptionalDtype& out_dtype) {
  const auto device = input.device().type();
  const bool has_weight = weight && weight->defined();
  if (!has_weight && !target.is_floating_point()) {
    const bool half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
    if (half && !out_dtype) out_dtype = at::kFloat;
    return;
  }
  input = at::autocast::cached_cast(at::kFloat, input, device);
  if (target.is_floating_point()) target = at::autocast::cached_cast(at::kFloat, target, device);
  if (has_weight) weight = at::autocast::cached_cast(at::kFloat, *weight, device);
}

template <c10::DispatchKey kKey>
struct Autocast {
  static LossAndLse run(Tensor input, Tensor target, OptionalTensor weight, Settings s, bool wants_lse) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    to_autocast(input, target, weight, s.out_dtype);
    static const auto plain = operator_named<decltype(cross_entropy)>("mbperf::cross_entropy");
    static const auto with_lse =
        operator_named<decltype(cross_entropy_with_lse)>("mbperf::cross_entropy_with_lse");
    if (!wants_lse) return {call_forward(plain, input, target, weight, s), Tensor()};
    auto [loss, lse] = call_forward(with_lse, input, target, weight, s);
    return {loss, lse};
  }

  static Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                              OptionalDtype out_dtype, double z_loss, std::optional<double> softcap) {
    return run(input, target, weight,
               {reduction, std::move(ignore_index), label_smoothing, out_dtype, z_loss,
                checked_softcap(softcap)},
               false)
        .loss;
  }
  static std::tuple<Tensor, Tensor> cross_entropy_with_lse(const Tensor& input, const Tensor& target,
                                                           const OptionalTensor& weight, int64_t reduction,
                                                           c10::SymInt ignore_index, double label_smoothing,
                                                           OptionalDtype out_dtype, double z_loss,
                                                           std::optional<double> softcap) {
    LossAndLse r = run(
        input, target, weight,
        {reduction, std::move(ignore_index), label_smoothing, out_dtype, z_loss, checked_softcap(softcap)},
        true);
    return {r.loss, r.lse};
  }
  static std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_stats(
      const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
      c10::SymInt ignore_index, double label_smoothing, OptionalDtype out_dtype, double z_loss,
      std::optional<double> softcap) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    Tensor logits = input, y = target;
    OptionalTensor w = weight;
    to_autocast(logits, y, w, out_dtype);
    static const auto op =
        operator_named<decltype(cross_entropy_with_stats)>("mbperf::cross_entropy_with_stats");
    return call_forward(
        op, logits, y, w,
        {reduction, std::move(ignore_index), label_smoothing, out_dtype, z_loss, checked_softcap(softcap)});
  }
  // The cast copy of the logits could not be overwritten to any use.
  static Tensor cross_entropy_in_place(Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                       int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                       OptionalDtype out_dtype, double z_loss,
                                       std::optional<double> softcap) {
    return cross_entropy(input, target, weight, reduction, std::move(ignore_index), label_smoothing,
                         out_dtype, z_loss, softcap);
  }
  static void register_in(torch::Library& m) {
    m.impl("cross_entropy", cross_entropy);
    m.impl("cross_entropy_with_lse", cross_entropy_with_lse);
    m.impl("cross_entropy_with_stats", cross_entropy_with_stats);
    m.impl("cross_entropy_", cross_entropy_in_place);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, AutocastCPU, m) { Autocast<c10::DispatchKey::AutocastCPU>::register_in(m); }
TORCH_LIBRARY_IMPL(mbperf, AutocastCUDA, m) { Autocast<c10::DispatchKey::AutocastCUDA>::register_in(m); }

}  // namespace mbperf
