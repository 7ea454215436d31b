// The Python module mbperf._C: thin entries in front of the operators, and what walks Python objects.
//
// The files of this folder are compiled here, as one: torch's and pybind11's headers take 10 s to read, the
// files 1 s each.
#include "python/bindings.h"
#include "python/collate/arrays.cpp"
#include "python/collate/build.cpp"
#include "python/collate/by_torch.cpp"
#include "python/collate/collate.cpp"
#include "python/collate/containers.cpp"
#include "python/collate/dispatch.cpp"
#include "python/collate/numbers.cpp"
#include "python/collate/promoted.cpp"
#include "python/collate/ragged.cpp"
#include "python/collate/tensors.cpp"
#include "python/cross_entropy.cpp"
#include "python/gather.cpp"
#include "python/kl_div.cpp"
#include "python/linear_cross_entropy.cpp"
#include "python/memory.cpp"
#include "python/token_log_probs.cpp"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  mbperf::bind_collate(m);
  mbperf::bind_cross_entropy(m);
  mbperf::bind_kl_div(m);
  mbperf::bind_linear_cross_entropy(m);
  mbperf::bind_gather(m);
  mbperf::bind_memory(m);
  mbperf::bind_token_log_probs(m);
}
