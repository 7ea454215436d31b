// The row kernels of the instruction set in use: that of torch itself (ATEN_CPU_CAPABILITY moves both),
// unless overridden.
#pragma once

#include <string>
#include <vector>

#include "cpu/cross_entropy_rows.h"

namespace mbperf {

const RowKernels& row_kernels();

// Names of the instruction sets that this processor runs and torch allows, best first.
std::vector<std::string> instruction_sets();

// Overrides the choice for this process; throws ValueError for a name not among instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace mbperf
