// Every kernel of cross entropy for bfloat16 logits.
#include "cuda/cross_entropy/launch.cuh"

namespace mbperf::cuda {

template int launch_rows<BFloat16>(const Problem<float>&, const Device&, Stream);
template int launch_scaling<BFloat16>(const Scaling&, const Device&, Stream);

}  // namespace mbperf::cuda
