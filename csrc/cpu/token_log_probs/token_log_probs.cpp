// Log-probabilities of targets and entropies of rows on the CPU, by the row kernels of cross entropy.
#include "token_log_probs.h"

#include <torch/library.h>

#include "cpu/cross_entropy/call.h"
#include "cpu/memory.h"

namespace mbperf {
namespace {

struct Cpu {
  template <class Acc>
  using Call = mbperf::Call<Acc>;

  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };

  static at::Tensor empty_gradient(const at::Tensor& logits) {
    return empty_recycled(logits.sizes(), logits.scalar_type());
  }

  template <class Acc>
  static void set_upstream(Problem<Acc>& problem, const Acc* of_positions, bool in_place) {
    problem.scale = 0;
    problem.row_scale = of_positions;
    // Logits read while their place is written: past the caches would be a detour.
    if (in_place) problem.streaming_stores = false;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("token_log_probs_forward", TokenPasses<Cpu>::forward);
  m.impl("token_log_probs_backward", TokenPasses<Cpu>::backward);
  m.impl("token_log_probs_backward_", TokenPasses<Cpu>::backward_);
}

}  // namespace mbperf
