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

// Best first: each allows those after it. NEON always is: torch's own kernels take it at the lowest of their
// levels on AArch64, so ATEN_CPU_CAPABILITY, which knows none below, does not choose there.
inline constexpr InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512", "AVX512", kRowsAvx512, kStatsAvx512, kConvertAvx512, kKlDivAvx512, kSoftcapAvx512},
    {"avx2", "AVX2", kRowsAvx2, kStatsAvx2, kConvertAvx2, kKlDivAvx2, kSoftcapAvx2},
#elif defined(__aarch64__)
    {"neon", nullptr, kRowsNeon, kStatsNeon, kConvertNeon, kKlDivNeon, kSoftcapNeon},
#endif
    {"baseline", nullptr, kRowsBaseline, kStatsBaseline, kConvertBaseline, kKlDivBaseline, kSoftcapBaseline},
};

const InstructionSet& instruction_set();

// Names of the instruction sets that this processor runs and torch allows, best first.
std::vector<std::string> instruction_sets();

// Overrides the choice for this process; throws ValueError for a name not among instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace mbperf
