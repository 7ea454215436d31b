// Numbers in half precision as kernels without torch see them: their bits alone.
#pragma once

#include <cstdint>

namespace mbperf {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace mbperf
