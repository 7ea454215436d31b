// The launches of cross entropy as C functions, for tests to call through ctypes.
#include "cuda/cross_entropy/problem.h"

#include "cuda/host_shim/threads.h"

using namespace mbperf;
using namespace mbperf::cuda;

template <class S>
static int rows(const void* problem, const Device& device) {
  return launch_rows<S>(*static_cast<const Problem<AccumulateType<S>>*>(problem), device, nullptr);
}

extern "C" {

size_t mbperf_sizeof_problem(int is_double) {
  return is_double ? sizeof(Problem<double>) : sizeof(Problem<float>);
}

void mbperf_set_order(int order) { mbperf::host_shim::set_order(order); }

const char* mbperf_last_error() { return mbperf::host_shim::last_error(); }

int mbperf_rows(int dtype, const void* problem, const Device* device) {
  switch (Dtype(dtype)) {
    case Dtype::kFloat32:
      return rows<float>(problem, *device);
    case Dtype::kFloat64:
      return rows<double>(problem, *device);
    case Dtype::kBFloat16:
      return rows<BFloat16>(problem, *device);
    default:
      return rows<Float16>(problem, *device);
  }
}

int mbperf_scaling(int dtype, const Scaling* scaling, const Device* device) {
  switch (Dtype(dtype)) {
    case Dtype::kFloat32:
      return launch_scaling<float>(*scaling, *device, nullptr);
    case Dtype::kFloat64:
      return launch_scaling<double>(*scaling, *device, nullptr);
    case Dtype::kBFloat16:
      return launch_scaling<BFloat16>(*scaling, *device, nullptr);
    default:
      return launch_scaling<Float16>(*scaling, *device, nullptr);
  }
}

int mbperf_totals(int is_double, const void* problem, Totals* totals, double* scratch) {
  return is_double ? launch_totals(*static_cast<const Problem<double>*>(problem), totals, scratch, nullptr)
                   : launch_totals(*static_cast<const Problem<float>*>(problem), totals, scratch, nullptr);
}

int mbperf_loss(int is_double, const void* losses, const LossSum* sum, double* scratch) {
  return is_double ? launch_loss(static_cast<const double*>(losses), *sum, scratch, nullptr)
                   : launch_loss(static_cast<const float*>(losses), *sum, scratch, nullptr);
}
}
