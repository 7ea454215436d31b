// Runs one case of the AVX2 row kernels once, for callgrind to count: counters CASE. Without a case it lists
// them. Inputs are the same every time, so the counts are the same to the instruction.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/cross_entropy/path.h"

namespace {

using mbperf::Path;
using mbperf::Problem;

struct Case {
  const char* name;
  const char* dtype;
  int64_t positions, classes, inner;  // inner > 0: the class dimension is strided by it
  bool gradient;
};

// Every kernel family (tiles, rows, strided tiles) with and without the gradient, each dtype once, an odd
// number of classes, and one longer than a block.
constexpr Case kCases[] = {
    {"64x10 f32 forward", "f32", 64, 10, 0, false},
    {"64x10 f32 fwd+bwd", "f32", 64, 10, 0, true},
    {"1024x32 f32 fwd+bwd", "f32", 1024, 32, 0, true},
    {"64x1000 f32 forward", "f32", 64, 1000, 0, false},
    {"64x1000 f32 fwd+bwd", "f32", 64, 1000, 0, true},
    {"64x1000 f64 fwd+bwd", "f64", 64, 1000, 0, true},
    {"64x1000 bf16 fwd+bwd", "bf16", 64, 1000, 0, true},
    {"64x1000 f16 fwd+bwd", "f16", 64, 1000, 0, true},
    {"8x32000 f32 fwd+bwd", "f32", 8, 32000, 0, true},
    {"4x50257 f32 fwd+bwd", "f32", 4, 50257, 0, true},
    {"4x21x32x32 f32 fwd+bwd", "f32", 4096, 21, 1024, true},
};

// A value in about [-4, 4] from an index: no random numbers whose library may change.
double logit(int64_t i) { return 4 * std::sin(double(i) * 0.7312 + double(i % 97)); }

void put(std::vector<char>& bytes, const char* dtype, int64_t i, double value) {
  const float single = float(value);
  if (!std::strcmp(dtype, "f32")) {
    std::memcpy(&bytes[i * 4], &single, 4);
  } else if (!std::strcmp(dtype, "f64")) {
    std::memcpy(&bytes[i * 8], &value, 8);
  } else if (!std::strcmp(dtype, "bf16")) {
    std::memcpy(&bytes[i * 2], reinterpret_cast<const char*>(&single) + 2, 2);
  } else {
    const uint16_t half = uint16_t(0x3800 + (i * 37) % 0x800);  // 0.5 to 2
    std::memcpy(&bytes[i * 2], &half, 2);
  }
}

int64_t itemsize(const char* dtype) {
  return !std::strcmp(dtype, "f64") ? 8 : !std::strcmp(dtype, "f32") ? 4 : 2;
}

// callgrind's --toggle-collect names this function: nothing outside it is counted.
template <class Acc>
__attribute__((noinline)) double counted(const mbperf::DtypeKernels<Acc>& kernels,
                                         const Problem<Acc>& problem) {
  const Path path = mbperf::choose(problem, kernels.vector, /*threads=*/1);
  return kernel_of(path, kernels)(problem, 0, problem.positions);
}

template <class Acc>
double run(const Case& c, const mbperf::DtypeKernels<Acc>& kernels) {
  const int64_t count = c.positions * c.classes;
  // Aligned as torch aligns; the odd case then has unaligned rows.
  const auto bytes = size_t(count * itemsize(c.dtype) + 64);
  std::vector<char> input(bytes), grad(bytes);
  for (int64_t i = 0; i < count; ++i) put(input, c.dtype, i, logit(i));
  std::vector<int64_t> target(c.positions);
  for (int64_t p = 0; p < c.positions; ++p) target[p] = p * 7 % c.classes;
  Problem<Acc> problem{};
  const bool strided = c.inner > 0;
  problem.input = input.data();
  problem.inner = strided ? c.inner : c.positions;
  problem.input_strides =
      strided ? mbperf::Strides{c.inner * c.classes, 1, c.inner} : mbperf::Strides{0, c.classes, 1};
  problem.grad = c.gradient ? grad.data() : nullptr;
  problem.grad_strides = problem.input_strides;
  problem.target = target.data();
  problem.positions = c.positions;
  problem.classes = c.classes;
  problem.ignore_index = -100;
  problem.target_coeff = 1;
  problem.weight_sum = Acc(c.classes);
  problem.scale = Acc(1) / Acc(c.positions);
  return counted(kernels, problem);
}

double run(const Case& c) {
  const auto& all = mbperf::kRowsAvx2;
  if (!std::strcmp(c.dtype, "f64")) return run(c, all.float64);
  if (!std::strcmp(c.dtype, "bf16")) return run(c, all.bfloat16);
  if (!std::strcmp(c.dtype, "f16")) return run(c, all.float16);
  return run(c, all.float32);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases) {
    if (argc < 2) {
      std::puts(c.name);
    } else if (!std::strcmp(argv[1], c.name)) {
      const double loss = run(c);
      std::printf("%.6f\n", loss);
      return std::isfinite(loss) ? 0 : 1;
    }
  }
  return argc < 2 ? 0 : 2;
}
