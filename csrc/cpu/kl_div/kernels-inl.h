// The kernels of kl_div of one instruction set, from what its file in cpu/simd defines: VFloat and VDouble.
// Included inside an anonymous namespace, after that file.
#include "cpu/cross_entropy/terms-inl.h"
#include "cpu/simd/ordered_halves-inl.h"

#include "cpu/cross_entropy/blocks-inl.h"

#include "cpu/simd/tile-inl.h"

#include "cpu/kl_div/pairs-inl.h"

#include "cpu/kl_div/rows-inl.h"

#include "cpu/kl_div/tiles-inl.h"

template <class V, class S>
constexpr KlDivDtype<typename V::Scalar> kl_div_dtype() {
  using Rows = KlDivRows<V, S>;
  using Acc = typename V::Scalar;
  return {Rows::run, KlDivTiles<V, S>::run, Rows::block_sums, Rows::merge_blocks,
          [](const KlDivProblem<Acc>& problem, int64_t row, int64_t block, const PairSums<Acc>& merged) {
            Rows::block_gradient(problem, row, block, merged);
            V::fence();
          }};
}

constexpr KlDivKernels kl_div_table() {
  return {kl_div_dtype<VFloat, float>(), kl_div_dtype<VFloat, BFloat16>(), kl_div_dtype<VFloat, Float16>(),
          kl_div_dtype<VDouble, double>()};
}
