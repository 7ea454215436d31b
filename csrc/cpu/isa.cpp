#include "cpu/isa.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <atomic>

namespace mbperf {
namespace {

// Best first. torch's own choice is an upper bound, so that a comparison with it stays fair.
std::vector<const RowKernels*> usable_kernels() {
  std::vector<const RowKernels*> usable;
#if defined(__x86_64__)
  const std::string torch_level = at::get_cpu_capability();
  if (torch_level == "AVX512") usable.push_back(&kRowsAvx512);
  if (torch_level == "AVX512" || torch_level == "AVX2") usable.push_back(&kRowsAvx2);
#endif
  usable.push_back(&kRowsBaseline);
  return usable;
}

std::atomic<const RowKernels*>& chosen() {
  static std::atomic<const RowKernels*> kernels{usable_kernels().front()};
  return kernels;
}

}  // namespace

const RowKernels& row_kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const RowKernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  for (const RowKernels* kernels : usable_kernels())
    if (name == kernels->name) return chosen().store(kernels);
  TORCH_CHECK_VALUE(false, "set_instruction_set: expected one of ", c10::Join(", ", instruction_sets()),
                    ", got ", name);
}

}  // namespace mbperf
