// The Python module mbperf._C_cuda: empty, as importing it registers the CUDA kernels of mbperf's operators.
#include <torch/csrc/utils/pybind.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}
