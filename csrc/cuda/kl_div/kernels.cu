// The kernels of KL divergence, for every dtype of logits.
#include "cuda/kl_div/kernels.cuh"

namespace mbperf::cuda {

template int launch_kl_div<float>(const KlDivProblem<float>&, Stream);
template int launch_kl_div<double>(const KlDivProblem<double>&, Stream);
template int launch_kl_div<BFloat16>(const KlDivProblem<float>&, Stream);
template int launch_kl_div<Float16>(const KlDivProblem<float>&, Stream);

}  // namespace mbperf::cuda
