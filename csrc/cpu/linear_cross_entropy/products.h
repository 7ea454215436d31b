// The three products of a chunk of rows on the CPU, by ATen: Z = X W^T + b, dX = G W, dW += G^T X.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "cpu/memory.h"
#include "linear_cross_entropy.h"

namespace mbperf {

// Whether ATen's products in this dtype are faster than those of float32 copies: bfloat16 with the
// instructions for it, float16 likewise. Without them dX = G W alone takes 80 times the float32 time.
inline bool has_products(at::ScalarType dtype) {
  const auto supported = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && op->typed<bool()>().call();
  };
  if (dtype == at::kBFloat16) {
    static const bool bfloat16 = supported("mkldnn::_is_mkldnn_bf16_supported");
    return bfloat16;
  }
  if (dtype == at::kHalf) {
    static const bool float16 = supported("mkldnn::_is_mkldnn_fp16_supported");
    return float16;
  }
  return true;
}

// Measured on 2 cores of Zen 4 (see docs/linear_cross_entropy.md): a chunk reads W twice and updates dW, 16
// bytes a weight in float32 and in bfloat16 alike, beside 6 operations a weight and row. From this many rows
// on that is below 5% of the time; more would save little, and a smaller matrix of logits is no use.
inline ChunkLimits cpu_chunk(at::ScalarType dtype, int64_t rows, int64_t memory_budget) {
  return {rows, memory_budget, c10::elementSize(dtype) == 2 ? 1024 : 512, int64_t{64} << 20};
}

// Classes a block, of a weight whose block of rows is worked in the caches.
inline int64_t block_rows(int64_t row_bytes) {
  constexpr int64_t kBlockBytes = int64_t{4} << 20;
  return std::max<int64_t>(kBlockBytes / std::max<int64_t>(row_bytes, 1), 64);
}

class Products {
 public:
  Products(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& linear_bias,
           int64_t chunk, Wanted wanted)
      : input_(input),
        weight_(linear_weight),
        bias_(linear_bias),
        dtype_(input.scalar_type()),
        widens_(!has_products(dtype_)),
        sums_wide_(c10::elementSize(dtype_) == 2 && (widens_ || chunk < input.size(0))),
        logits_(empty_recycled({chunk, linear_weight.size(0)}, logits_dtype())) {
    if (wanted[0]) grad_.input = at::empty(input.sizes(), input.options());
    if (wanted[1]) grad_.linear_weight = empty_recycled(linear_weight.sizes(), dtype_);
    if (wanted[1] && sums_wide_) sum_ = empty_recycled(linear_weight.sizes(), at::kFloat);
    if (wanted[2]) bias_sum_ = at::zeros({linear_weight.size(0)}, input.options().dtype(accumulate_dtype()));
  }

  at::ScalarType accumulate_dtype() const { return accumulate_type(input_); }
  static size_t logits_size(at::ScalarType dtype) {
    return has_products(dtype) ? c10::elementSize(dtype) : sizeof(float);
  }

  at::Tensor logits(int64_t begin, int64_t n) {
    const at::Tensor x = rows_of(input_, begin, n);
    at::Tensor z = rows_of(logits_, 0, n);
    if (!widens_)
      return bias_.defined() ? at::addmm_out(z, bias_, x, weight_.t()) : at::mm_out(z, x, weight_.t());
    const at::Tensor wide = x.to(at::kFloat);
    over_wide_blocks([&](int64_t c, int64_t m, const at::Tensor& w) {
      at::Tensor block = z.narrow(1, c, m);
      at::mm_out(block, wide, w.t());
    });
    if (bias_.defined()) z.add_(bias_);
    return z;
  }

  // The gradients of these rows, from that of their logits times factor.
  void differentiate(int64_t begin, int64_t n, const at::Tensor& g, double factor = 1) {
    const at::Tensor x = rows_of(input_, begin, n);
    if (bias_sum_.defined()) bias_sum_.add_(at::sum(g, {0}, false, accumulate_dtype()), factor);
    if (widens_) return differentiate_wide(begin, x, g, factor);
    if (grad_.input.defined()) {
      at::Tensor dx = rows_of(grad_.input, begin, n);
      at::addmm_out(dx, dx, g, weight_, 0, factor);
    }
    if (!grad_.linear_weight.defined()) return;
    if (sums_wide_) return add_rounded(begin, x, g, factor);
    at::addmm_out(grad_.linear_weight, grad_.linear_weight, g.t(), x, begin > 0, factor);
  }

  LinearGradients finish() {
    if (sum_.defined()) grad_.linear_weight.copy_(sum_);
    if (bias_sum_.defined()) grad_.linear_bias = bias_sum_.to(dtype_);
    return grad_;
  }

 private:
  at::ScalarType logits_dtype() const { return widens_ ? at::kFloat : dtype_; }

  // body(first class, how many, their weights in float32)
  template <class Body>
  void over_wide_blocks(const Body& body) {
    const int64_t classes = weight_.size(0), each = block_rows(weight_.size(1) * int64_t(sizeof(float)));
    if (!wide_weight_.defined())
      wide_weight_ =
          at::empty({std::min(each, classes), weight_.size(1)}, weight_.options().dtype(at::kFloat));
    for (int64_t c = 0; c < classes; c += each) {
      const int64_t m = std::min(each, classes - c);
      at::Tensor w = rows_of(wide_weight_, 0, m);
      w.copy_(weight_.narrow(0, c, m));
      body(c, m, w);
    }
  }

  void differentiate_wide(int64_t begin, const at::Tensor& x, const at::Tensor& g, double factor) {
    const at::Tensor wide = x.to(at::kFloat);
    if (grad_.input.defined()) {
      at::Tensor dx = at::empty_like(wide);
      over_wide_blocks([&](int64_t c, int64_t m, const at::Tensor& w) {
        at::addmm_out(dx, dx, g.narrow(1, c, m), w, c > 0, factor);
      });
      rows_of(grad_.input, begin, x.size(0)).copy_(dx);
    }
    if (sum_.defined()) at::addmm_out(sum_, sum_, g.t(), wide, begin > 0, factor);
  }

  // ATen has no product of bfloat16 into float32: that of a chunk is rounded once, block by block while it
  // stays in the caches, and the chunks are summed in float32.
  void add_rounded(int64_t begin, const at::Tensor& x, const at::Tensor& g, double factor) {
    const int64_t classes = weight_.size(0),
                  each = block_rows(weight_.size(1) * int64_t(c10::elementSize(dtype_)));
    if (!product_.defined()) product_ = at::empty({std::min(each, classes), weight_.size(1)}, x.options());
    for (int64_t c = 0; c < classes; c += each) {
      const int64_t m = std::min(each, classes - c);
      at::Tensor product = rows_of(product_, 0, m);
      at::mm_out(product, g.narrow(1, c, m).t(), x);
      add_block(sum_.narrow(0, c, m), product, begin == 0, float(factor));
    }
  }

  static void add_block(const at::Tensor& sum, const at::Tensor& product, bool first, float factor) {
    if (product.scalar_type() == at::kBFloat16) {
      add_block<at::BFloat16>(sum, product, first, factor);
    } else {
      add_block<at::Half>(sum, product, first, factor);
    }
  }

  // sum.add_(product, factor) would convert the product into a tensor of its own first.
  template <class Half>
  static void add_block(const at::Tensor& sum, const at::Tensor& product, bool first, float factor) {
    float* to = sum.mutable_data_ptr<float>();
    const Half* from = product.const_data_ptr<Half>();
    at::parallel_for(0, sum.numel(), 16384, [&](int64_t begin, int64_t end) {
      if (first) {
        for (int64_t i = begin; i < end; ++i) to[i] = factor * static_cast<float>(from[i]);
      } else {
        for (int64_t i = begin; i < end; ++i) to[i] += factor * static_cast<float>(from[i]);
      }
    });
  }

  const at::Tensor &input_, &weight_, &bias_;
  at::ScalarType dtype_;
  bool widens_;     // float32 copies, block by block
  bool sums_wide_;  // the gradient of the weight, in float32
  at::Tensor logits_, sum_, bias_sum_, wide_weight_, product_;
  LinearGradients grad_;
};

}  // namespace mbperf
