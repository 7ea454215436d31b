// Batched collate: a list of samples becomes one batch.
#include "python/bindings.h"

namespace mbperf {

void bind_collate(pybind11::module_&) {}

}  // namespace mbperf
