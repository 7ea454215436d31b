// Runs the kernels of one instruction set without torch, natively or under an emulator: kernel_runner NAME
// reads cases from stdin and writes results to stdout, kernel_runner alone lists the names. Numbers are int64
// and double, arrays their length in bytes and the bytes; tests/helpers/bare_kernels.py is the other side.
// Every array ends where memory ends, so that to read or write past it is a fault.
#include <fenv.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/cross_entropy/path.h"
#include "cpu/simd/isa.h"

namespace {

using namespace mbperf;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "kernel_runner: %s\n", what);
  std::exit(1);
}

template <class T>
T get() {
  T value;
  if (std::fread(&value, sizeof(T), 1, stdin) != 1) fail("the case ends too early");
  return value;
}

template <class T>
void put(T value) {
  if (std::fwrite(&value, sizeof(T), 1, stdout) != 1) fail("cannot write");
}

// An array in front of a page that cannot be touched, behind bytes that must not change.
class Array {
 public:
  explicit Array(int64_t bytes) : bytes_(size_t(bytes)) {
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    usable_ = (bytes_ + page - 1) / page * page;
    void* memory = mmap(nullptr, usable_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    base_ = static_cast<char*>(memory);
    if (mprotect(base_ + usable_, page, PROT_NONE) != 0) fail("cannot protect a page");
    std::memset(base_, kUntouched, usable_);
    mapped_ = usable_ + page;
  }
  Array(const Array&) = delete;
  ~Array() {
    for (const char* p = base_; p < data(); ++p)
      if (*p != kUntouched) fail("an array was written before its beginning");
    munmap(base_, mapped_);
  }

  // Absent where it has no bytes.
  template <class T = void>
  T* as() const {
    return bytes_ ? reinterpret_cast<T*>(data()) : nullptr;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr char kUntouched = -1;  // every byte of it is a NaN
  char* data() const { return base_ + usable_ - bytes_; }

  size_t bytes_, usable_, mapped_;
  char* base_;
};

struct Input : Array {
  Input() : Array(get<int64_t>()) {
    if (bytes() && std::fread(as<char>(), bytes(), 1, stdin) != 1) fail("an array ends too early");
  }
};

struct Output : Array {
  using Array::Array;
  void write() const {
    put(int64_t(bytes()));
    if (bytes() && std::fwrite(as<char>(), bytes(), 1, stdout) != 1) fail("cannot write");
  }
};

// Whether body() lets a number underflow.
template <class Body>
int64_t underflows(const Body& body) {
  feclearexcept(FE_UNDERFLOW);
  body();
  return fetestexcept(FE_UNDERFLOW) != 0;
}

enum Dtype : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int64_t kItemsize[] = {4, 8, 2, 2};

Strides get_strides() {
  const auto outer = get<int64_t>(), inner = get<int64_t>(), classes = get<int64_t>();
  return {outer, inner, classes};
}

// As run_over_columns of cpu/cross_entropy/threads.h, on one thread.
template <class Acc>
double run_columns(const Problem<Acc>& problem, const DtypeKernels<Acc>& kernels) {
  const int64_t blocks = block_count(problem.classes);
  double total = 0;
  for (int64_t p = 0; p < problem.positions; ++p) {
    std::vector<Softmax<Acc>> statistics(blocks);
    Softmax<Acc> row;
    for (int64_t b = 0; b < blocks && !problem.known_softmax; ++b)
      statistics[b] = kernels.block_statistics(problem, p, b);
    total += kernels.merge_blocks(problem, p, statistics.data(), &row);
    for (int64_t b = 0; b < blocks && problem.grad; ++b) kernels.block_gradient(problem, p, b, row);
  }
  return total;
}

template <class Acc>
double run_path(Path path, const Problem<Acc>& problem, const DtypeKernels<Acc>& kernels) {
  if (path == Path::kColumns) return run_columns(problem, kernels);
  return kernel_of(path, kernels)(problem, 0, problem.positions);
}

// The loss, with its gradient or with the statistics from which a second pass takes it, along every path that
// serves the problem.
template <class Acc>
void cross_entropy(const DtypeKernels<Acc>& kernels, int64_t itemsize) {
  Problem<Acc> problem{};
  problem.positions = get<int64_t>();
  problem.inner = get<int64_t>();
  problem.classes = get<int64_t>();
  problem.ignore_index = get<int64_t>();
  const bool two_passes = get<int64_t>();
  const bool predicts = kernels.predict;
  problem.streaming_stores = get<int64_t>();
  const auto grad_elements = get<int64_t>();
  problem.input_strides = get_strides();
  problem.grad_strides = get_strides();
  problem.soft_strides = get_strides();
  problem.target_coeff = Acc(get<double>());
  problem.prob_coeff = Acc(get<double>());
  problem.weight_sum = Acc(get<double>());
  problem.z_loss = Acc(get<double>());
  problem.scale = Acc(get<double>());
  problem.inverse_temperature = Acc(get<double>());
  const Input input, target, soft_target, weight, row_scale, entropy_scale;
  problem.input = input.as();
  problem.target = target.as<int64_t>();
  problem.soft_target = soft_target.as();
  problem.weight = weight.as<Acc>();
  for (const Path path : {Path::kRows, Path::kGroups, Path::kTiles, Path::kColumns}) {
    const int64_t each = problem.positions * int64_t(sizeof(Acc));
    const Output loss(each), row_max(each), row_sum(each), entropy(each), moment(each);
    const Output grad(grad_elements * itemsize);
    const Output predicted(predicts ? problem.positions * int64_t(sizeof(int64_t)) : 0);
    const Output probability(predicts ? each : 0);
    Problem<Acc> first = problem;
    first.loss = loss.as<Acc>();
    first.row_max = row_max.as<Acc>();
    first.row_sum = row_sum.as<Acc>();
    if (problem.inverse_temperature != 0 || predicts) {
      first.entropy = entropy.as<Acc>();
      first.row_moment = moment.as<Acc>();
    }
    first.predicted = predicted.as<int64_t>();
    first.probability = probability.as<Acc>();
    Problem<Acc> second = first;
    (two_passes ? second : first).grad = grad.as();
    second.known_softmax = true;
    for (Problem<Acc>* p : {&first, &second})
      if (p->grad) {
        p->row_scale = row_scale.as<Acc>();
        p->entropy_scale = entropy_scale.as<Acc>();
      }
    if (!serves(path, two_passes ? second : first, kernels.vector)) continue;
    double total = 0;
    put(int64_t(path));
    put(underflows([&] { total = run_path(path, first, kernels); }));
    if (predicts) kernels.predict(first, 0, first.positions);
    if (two_passes) run_path(path, second, kernels);
    put(total);
    for (const Output* output :
         {&loss, &row_max, &row_sum, &entropy, &moment, &grad, &predicted, &probability})
      output->write();
  }
  put(int64_t{-1});
}

template <class Acc>
double run_blocks(const KlDivProblem<Acc>& problem, const KlDivDtype<Acc>& kernels) {
  const int64_t blocks = pair_block_count(problem.classes);
  double total = 0;
  for (int64_t r = 0; r < problem.rows; ++r) {
    std::vector<PairSums<Acc>> sums(blocks);
    PairSums<Acc> merged;
    for (int64_t b = 0; b < blocks; ++b) sums[b] = kernels.block_sums(problem, r, b);
    total += kernels.merge_blocks(problem, r, sums.data(), &merged);
    for (int64_t b = 0; b < blocks && problem.grad; ++b) kernels.block_gradient(problem, r, b, merged);
  }
  return total;
}

template <class Acc>
void kl_div(const KlDivDtype<Acc>& kernels, int64_t itemsize) {
  KlDivProblem<Acc> problem{};
  problem.rows = get<int64_t>();
  problem.classes = get<int64_t>();
  problem.student_stride = get<int64_t>();
  problem.teacher_stride = get<int64_t>();
  problem.streaming_stores = get<int64_t>();
  const bool wants_gradient = get<int64_t>();
  problem.inverse_temperature = Acc(get<double>());
  problem.scale = Acc(get<double>());
  const Input student, teacher, row_scale;
  problem.student = student.as();
  problem.teacher = teacher.as();
  problem.row_scale = row_scale.as<Acc>();
  for (const Path path : {Path::kRows, Path::kTiles, Path::kColumns}) {
    if (path == Path::kTiles && problem.classes > kTileClasses) continue;
    const Output loss(problem.rows * int64_t(sizeof(Acc)));
    const Output grad(wants_gradient ? problem.rows * problem.classes * itemsize : 0);
    problem.loss = loss.as<Acc>();
    problem.grad = grad.as();
    double total = 0;
    put(int64_t(path));
    put(underflows([&] {
      total = path == Path::kRows    ? kernels.rows(problem, 0, problem.rows)
              : path == Path::kTiles ? kernels.tiles(problem, 0, problem.rows)
                                     : run_blocks(problem, kernels);
    }));
    put(total);
    for (const Output* output : {&loss, &grad}) output->write();
  }
  put(int64_t{-1});
}

// y of a line x, and dx of dy and y; dy lies without gaps.
template <class Acc>
void softcap(const SoftcapDtype<Acc>& kernels, int64_t itemsize) {
  const auto n = get<int64_t>(), stride = get<int64_t>();
  const bool streaming = get<int64_t>();
  const auto cap = Acc(get<double>());
  const Input x, dy;
  const Output y(n * int64_t(sizeof(Acc))), dx(((n - 1) * stride + 1) * itemsize);
  kernels.cap({x.as(), stride}, y.as<Acc>(), n, cap);
  kernels.differentiate(dy.as<Acc>(), {y.as<Acc>(), 1}, {dx.as(), stride}, n, cap, streaming);
  for (const Output* output : {&y, &dx}) output->write();
}

template <class In, class Out>
void convert(ConvertRow<In, Out> kernel) {
  Normalise how{};
  const auto n = get<int64_t>();
  how.channels = get<int64_t>();
  how.run = get<int64_t>();
  const Input in, mean, scale;
  how.mean = mean.as<float>();
  how.scale = scale.as<float>();
  const Output out(n * int64_t(sizeof(Out)));
  kernel(in.as<const In>(), out.as<Out>(), n, how);
  out.write();
}

// Calls body with the kernels of a dtype and its size.
template <class Kernels, class Body>
void with_dtype(const Kernels& kernels, const Body& body) {
  const auto dtype = get<int64_t>();
  if (dtype == kFloat32) return body(kernels.float32, kItemsize[dtype]);
  if (dtype == kFloat64) return body(kernels.float64, kItemsize[dtype]);
  if (dtype == kBFloat16) return body(kernels.bfloat16, kItemsize[dtype]);
  if (dtype == kFloat16) return body(kernels.float16, kItemsize[dtype]);
  fail("unknown dtype");
}

void gather(const ConvertKernels& kernels) {
  const bool from_bytes = get<int64_t>();
  const auto dtype = get<int64_t>();
  if (dtype == kFloat32) return from_bytes ? convert(kernels.u8_f32) : convert(kernels.f32_f32);
  if (dtype == kBFloat16) return from_bytes ? convert(kernels.u8_bf16) : convert(kernels.f32_bf16);
  if (dtype == kFloat16) return from_bytes ? convert(kernels.u8_fp16) : convert(kernels.f32_fp16);
  fail("unknown dtype");
}

void scan_targets(const RowKernels& kernels) {
  const auto classes = get<int64_t>(), ignore_index = get<int64_t>();
  const Input target;
  int64_t live = 0;
  put(kernels.scan_targets(target.as<int64_t>(), int64_t(target.bytes() / sizeof(int64_t)), classes,
                           ignore_index, &live));
  put(live);
}

enum Operator : int64_t { kEnd, kCrossEntropy, kKlDiv, kGather, kScanTargets, kStats, kSoftcap };

void run(const InstructionSet& set) {
  for (;;) switch (get<int64_t>()) {
      case kEnd:
        return;
      case kCrossEntropy:
        with_dtype(set.rows, [](const auto& kernels, int64_t itemsize) { cross_entropy(kernels, itemsize); });
        break;
      case kStats:
        with_dtype(set.stats,
                   [](const auto& kernels, int64_t itemsize) { cross_entropy(kernels, itemsize); });
        break;
      case kSoftcap:
        with_dtype(set.softcap, [](const auto& kernels, int64_t itemsize) { softcap(kernels, itemsize); });
        break;
      case kKlDiv:
        with_dtype(set.kl_div, [](const auto& kernels, int64_t itemsize) { kl_div(kernels, itemsize); });
        break;
      case kGather:
        gather(set.convert);
        break;
      case kScanTargets:
        scan_targets(set.rows);
        break;
      default:
        fail("unknown operator");
    }
}

}  // namespace

int main(int argc, char** argv) {
  for (const InstructionSet& set : kInstructionSets) {
    if (argc < 2)
      std::puts(set.name);
    else if (!std::strcmp(argv[1], set.name))
      return run(set), 0;
  }
  if (argc >= 2) fail("unknown instruction set");
}
