// The sums around the rows of cross entropy, for both accumulation types.
#include "cuda/cross_entropy/launch.cuh"

namespace mbperf::cuda {

template int launch_totals<float>(const Problem<float>&, Totals*, double*, Stream);
template int launch_totals<double>(const Problem<double>&, Totals*, double*, Stream);
template int launch_loss<float>(const float*, const LossSum&, double*, Stream);
template int launch_loss<double>(const double*, const LossSum&, double*, Stream);

}  // namespace mbperf::cuda
