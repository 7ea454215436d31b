// The launch of KL divergence as a C function, for tests to call through ctypes.
#include "cuda/kl_div/problem.h"

#include <cstddef>

using namespace mbperf;
using namespace mbperf::cuda;

template <class S>
static int kl_div(const void* problem) {
  return launch_kl_div<S>(*static_cast<const KlDivProblem<AccumulateType<S>>*>(problem), nullptr);
}

extern "C" {

size_t mbperf_sizeof_kl_div(int is_double) {
  return is_double ? sizeof(KlDivProblem<double>) : sizeof(KlDivProblem<float>);
}

int mbperf_kl_div(int dtype, const void* problem) {
  switch (Dtype(dtype)) {
    case Dtype::kFloat32:
      return kl_div<float>(problem);
    case Dtype::kFloat64:
      return kl_div<double>(problem);
    case Dtype::kBFloat16:
      return kl_div<BFloat16>(problem);
    default:
      return kl_div<Float16>(problem);
  }
}
}
