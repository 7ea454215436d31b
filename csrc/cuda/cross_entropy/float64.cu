// Every kernel of cross entropy for float64 logits.
#include "cuda/cross_entropy/launch.cuh"

namespace mbperf::cuda {

template int launch_rows<double>(const Problem<double>&, const Device&, Stream);
template int launch_scaling<double>(const Scaling&, const Device&, Stream);

}  // namespace mbperf::cuda
