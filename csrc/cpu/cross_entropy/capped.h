// A call of cross entropy on soft-capped logits, y = cap tanh(x / cap). Chunk by chunk these are written to
// scratch memory that stays in a cache, in the type that sums are in; the row kernels of that type work
// there, and their gradient becomes that of x on its way out. So no row kernel knows of a cap.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu/cross_entropy/threads.h"
#include "cpu/memory.h"
#include "cpu/softcap/softcap.h"

namespace mbperf {

// Whether the positions of a tensor are beside each other in memory, and so in the scratch for it.
inline bool has_adjacent_positions(const Strides& s) { return s.inner == 1 && s.classes != 1; }

// Those of scratch memory for as many positions, laid out as the tensor of these strides, without gaps.
inline Strides scratch_strides(const Strides& of, int64_t inner, int64_t classes) {
  if (has_adjacent_positions(of)) return {inner * classes, 1, inner};
  return {inner * classes, classes, classes == 1 ? 0 : 1};
}

template <class Acc>
int64_t place_of(const Problem<Acc>& p, const Strides& strides, int64_t position, int64_t c) {
  return position / p.inner * strides.outer + position % p.inner * strides.inner + c * strides.classes;
}

// Positions [begin, begin + n), of one outer index or of several whole ones, as a problem of their own. Its
// logits and its gradient are set by the caller.
template <class Acc>
Problem<Acc> part_of(const Problem<Acc>& p, int64_t begin, int64_t n) {
  Problem<Acc> part = p;
  part.positions = n;
  part.inner = std::min(n, p.inner);
  const auto move = [&](auto*& rows) {
    if (rows) rows += begin;
  };
  move(part.target);
  move(part.row_scale);
  move(part.loss);
  move(part.row_max);
  move(part.row_sum);
  move(part.entropy_scale);
  move(part.entropy);
  move(part.row_moment);
  move(part.predicted);
  move(part.probability);
  if (p.soft_target)
    part.soft_target = static_cast<const Acc*>(p.soft_target) + place_of(p, p.soft_strides, begin, 0);
  return part;
}

template <class Acc>
class Capped {
 public:
  // `problem` has logits and a gradient of itemsize bytes each, and soft targets of the type Acc.
  Capped(const Problem<Acc>& problem, int64_t itemsize, Acc cap, const SoftcapDtype<Acc>& softcap,
         const DtypeKernels<Acc>& kernels)
      : problem_(problem), itemsize_(itemsize), cap_(cap), softcap_(softcap), kernels_(kernels) {}

  // The problem that a path is chosen for.
  Problem<Acc> in_scratch() const { return laid_out(problem_); }

  double run(const Shape& shape, Path path) const {
    if (path == Path::kColumns) return run_over_long_rows();
    const auto kernel = kernel_of(path, kernels_);
    const int64_t least = path == Path::kTiles ? kLeastLanes : 1;
    const int64_t most = (Chunks(shape, least).largest() * problem_.classes + 15) / 16 * 16;
    const bool nested = at::in_parallel_region();  // and so serial
    const at::Tensor scratch = scratch_of(nested ? 1 : at::get_num_threads(), most);
    return sum_over_chunks(shape, least, [&](int64_t begin, int64_t end) {
      Acc* const y =
          scratch.template mutable_data_ptr<Acc>() + 2 * most * (nested ? 0 : at::get_thread_num());
      const Problem<Acc> part = placed(laid_out(part_of(problem_, begin, end - begin)), y, y + most);
      cap(part, begin);
      const double loss = kernel(part, 0, part.positions);
      if (part.predicted) kernels_.predict(part, 0, part.positions);
      if (part.grad) differentiate(part, begin);
      return loss;
    });
  }

 private:
  static at::Tensor scratch_of(int64_t threads, int64_t elements) {
    return empty_recycled({threads, 2, elements}, c10::CppTypeToScalarType<Acc>::value);
  }

  static Problem<Acc> laid_out(Problem<Acc> p) {
    p.input_strides = scratch_strides(p.input_strides, p.inner, p.classes);
    p.grad_strides = scratch_strides(p.grad_strides, p.inner, p.classes);
    return p;
  }

  static Problem<Acc> placed(Problem<Acc> p, Acc* y, Acc* dy) {
    p.input = y;
    if (p.grad) p.grad = dy;
    p.streaming_stores = false;
    return p;
  }

  // Few rows of many classes: all of them at once, each spread over threads.
  double run_over_long_rows() const {
    const int64_t elements = problem_.positions * problem_.classes;
    const at::Tensor scratch = scratch_of(1, elements);
    Acc* const y = scratch.template mutable_data_ptr<Acc>();
    Problem<Acc> rows = placed(problem_, y, y + elements);
    rows.input_strides = rows.grad_strides = {problem_.inner * problem_.classes, problem_.classes, 1};
    const int64_t blocks = block_count(problem_.classes);
    const auto over_blocks = [&](const auto& body) {
      over_range(problem_.positions * blocks, true, [&](int64_t i) {
        const int64_t first = i % blocks * kBlock;
        body(i / blocks, first, std::min(kBlock, problem_.classes - first));
      });
    };
    over_blocks([&](int64_t p, int64_t c, int64_t n) { cap_line(rows, 0, p, c, n, false); });
    const double loss = run_over_columns(rows, kernels_);
    if (rows.grad)
      over_blocks([&](int64_t p, int64_t c, int64_t n) { differentiate_line(rows, 0, p, c, n, false); });
    return loss;
  }

  // Calls body(position, class, n) for the lines of n elements that a part of a tensor is made of: along its
  // positions or its classes, and several lines as one (`joins`) where nothing lies between them.
  template <class Body>
  static void for_lines(const Problem<Acc>& part, const Strides& strides, bool joins, const Body& body) {
    const int64_t classes = part.classes, inner = part.inner;
    if (has_adjacent_positions(strides)) {
      const bool joined = joins && strides.classes == inner;
      for (int64_t p = 0; p < part.positions; p += inner)
        for (int64_t c = 0; c < (joined ? 1 : classes); ++c) body(p, c, joined ? inner * classes : inner);
    } else {
      const bool joined = joins && strides.classes == 1 && strides.inner == classes && classes < kLongRow;
      for (int64_t p = 0; p < part.positions; p += joined ? inner : 1)
        body(p, 0, joined ? inner * classes : classes);
    }
  }
  // Rows from here on are asked one by one whether they are ignored.
  static constexpr int64_t kLongRow = 256;

  void cap(const Problem<Acc>& part, int64_t begin) const {
    const bool along = has_adjacent_positions(problem_.input_strides);
    for_lines(part, problem_.input_strides, true, [&](int64_t p, int64_t c, int64_t n) {
      const bool asked = !along && part.classes >= kLongRow && part.target;
      if (!asked || part.target[p] != part.ignore_index) cap_line(part, begin, p, c, n, along);
    });
  }

  void differentiate(const Problem<Acc>& part, int64_t begin) const {
    const bool along = has_adjacent_positions(problem_.grad_strides);
    const bool alike = along == has_adjacent_positions(problem_.input_strides);
    for_lines(part, problem_.grad_strides, alike,
              [&](int64_t p, int64_t c, int64_t n) { differentiate_line(part, begin, p, c, n, along); });
  }

  // n elements from position p of the part, which begins at `begin`, and class c on.
  void cap_line(const Problem<Acc>& part, int64_t begin, int64_t p, int64_t c, int64_t n, bool along) const {
    const Strides &from = problem_.input_strides, &to = part.input_strides;
    const char* const x = static_cast<const char*>(problem_.input);
    softcap_.cap({x + place_of(problem_, from, begin + p, c) * itemsize_, along ? from.inner : from.classes},
                 static_cast<Acc*>(const_cast<void*>(part.input)) + place_of(part, to, p, c), n, cap_);
  }

  void differentiate_line(const Problem<Acc>& part, int64_t begin, int64_t p, int64_t c, int64_t n,
                          bool along) const {
    const Strides &to = problem_.grad_strides, &of_y = part.input_strides;
    char* const dx = static_cast<char*>(problem_.grad);
    softcap_.differentiate(
        static_cast<const Acc*>(part.grad) + place_of(part, part.grad_strides, p, c),
        {static_cast<const Acc*>(part.input) + place_of(part, of_y, p, c), along ? of_y.inner : of_y.classes},
        {dx + place_of(problem_, to, begin + p, c) * itemsize_, along ? to.inner : to.classes}, n, cap_,
        problem_.streaming_stores);
  }

  const Problem<Acc>& problem_;
  int64_t itemsize_;
  Acc cap_;
  const SoftcapDtype<Acc>& softcap_;
  const DtypeKernels<Acc>& kernels_;
};

}  // namespace mbperf
