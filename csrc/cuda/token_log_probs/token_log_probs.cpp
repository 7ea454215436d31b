// Log-probabilities of targets and entropies of rows on CUDA, by the row kernels of cross entropy. Everything
// is queued on the current stream and nothing waits for the device.
#include "token_log_probs.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/cross_entropy/call.h"

namespace mbperf {
namespace {

struct Cuda {
  template <class Acc>
  using Call = cuda::Call<Acc>;

  struct Guard : c10::cuda::CUDAGuard {
    explicit Guard(const at::Tensor& logits) : CUDAGuard(logits.device()) {}
  };

  static at::Tensor empty_gradient(const at::Tensor& logits) {
    return at::empty(logits.sizes(), logits.options());
  }

  template <class Acc>
  static void set_upstream(cuda::Problem<Acc>& problem, const Acc* of_positions, bool) {
    problem.scale = of_positions ? 1 : 0;
    problem.upstream = of_positions;
    problem.upstream_per_position = true;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) {
  m.impl("token_log_probs_forward", TokenPasses<Cuda>::forward);
  m.impl("token_log_probs_backward", TokenPasses<Cuda>::backward);
  m.impl("token_log_probs_backward_", TokenPasses<Cuda>::backward_);
}

}  // namespace mbperf
