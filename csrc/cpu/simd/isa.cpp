#include "cpu/simd/isa.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <atomic>
#include <iterator>

namespace mbperf {
namespace {

// torch's own choice is an upper bound, so that a comparison with it stays fair.
const InstructionSet* best_usable() {
  const std::string torch_level = at::get_cpu_capability();
  return std::find_if(
      std::begin(kInstructionSets), std::end(kInstructionSets),
      [&](const InstructionSet& set) { return !set.torch_level || set.torch_level == torch_level; });
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{best_usable()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  std::transform(best_usable(), std::end(kInstructionSets), std::back_inserter(names),
                 [](const InstructionSet& set) { return set.name; });
  return names;
}

void set_instruction_set(const std::string& name) {
  const auto found = std::find_if(best_usable(), std::end(kInstructionSets),
                                  [&](const InstructionSet& set) { return set.name == name; });
  TORCH_CHECK_VALUE(found != std::end(kInstructionSets), "set_instruction_set: expected one of ",
                    c10::Join(", ", instruction_sets()), ", got ", name);
  chosen().store(found);
}

}  // namespace mbperf
