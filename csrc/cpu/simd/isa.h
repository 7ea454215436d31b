// The instruction sets that kernels are compiled for, and the one in use: that of torch itself
// (ATEN_CPU_CAPABILITY moves both), unless overridden.
#pragma once

#include <string>
#include <vector>

#include "cpu/cross_entropy/problem.h"
#include "cpu/gather/rows.h"
#include "cpu/kl_div/problem.h"
#include "cpu/softcap/softcap.h"

namespace mbperf {

struct InstructionSet {
  const char* name;
  const char* torch_level;  // at::get_cpu_capability() from which on torch allows it; nullptr: always
  const RowKernels &rows, &stats;
  const ConvertKernels& convert;
  const KlDivKernels& kl_div;
  const SoftcapKernels& softcap;
};

const InstructionSet& instruction_set();

// Names of the instruction sets that this processor runs and torch allows, best first.
std::vector<std::string> instruction_sets();

// Overrides the choice for this process; throws ValueError for a name not among instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace mbperf
