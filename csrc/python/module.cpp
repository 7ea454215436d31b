// The Python module mbperf._C: thin entries in front of the operators, and what walks Python objects.
#include "python/bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  mbperf::bind_collate(m);
  mbperf::bind_cross_entropy(m);
  mbperf::bind_kl_div(m);
  mbperf::bind_linear_cross_entropy(m);
  mbperf::bind_gather(m);
  mbperf::bind_memory(m);
  mbperf::bind_token_log_probs(m);
}
