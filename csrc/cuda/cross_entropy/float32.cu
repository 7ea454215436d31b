// Every kernel of cross entropy for float32 logits.
#include "cuda/cross_entropy/launch.cuh"

namespace mbperf::cuda {

template int launch_rows<float>(const Problem<float>&, const Device&, Stream);
template int launch_scaling<float>(const Scaling&, const Device&, Stream);

}  // namespace mbperf::cuda
