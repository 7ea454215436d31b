// Every operator of mbperf. Backends register themselves; the shapes are those of torch's cross_entropy:
// input (C), (N, C) or (N, C, d1, ...), target of class indices or of probabilities, weight (C).
#include <torch/library.h>

TORCH_LIBRARY(mbperf, m) {
  // Public: differentiable, decomposed by autograd/cross_entropy.cpp into the operators below.
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
      "SymInt ignore_index=-100, float label_smoothing=0.0, *, ScalarType? out_dtype=None, "
      "float z_loss=0.0, float? softcap=None) -> Tensor");
  m.def(
      "cross_entropy_with_lse(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
      "SymInt ignore_index=-100, float label_smoothing=0.0, *, ScalarType? out_dtype=None, "
      "float z_loss=0.0, float? softcap=None) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight=None, int reduction=1, "
      "SymInt ignore_index=-100, float label_smoothing=0.0, *, ScalarType? out_dtype=None, "
      "float z_loss=0.0, float? softcap=None) -> Tensor");
  m.def(
      "cross_entropy_with_stats(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
      "SymInt ignore_index=-100, float label_smoothing=0.0, *, ScalarType? out_dtype=None, "
      "float z_loss=0.0, float? softcap=None) "
      "-> (Tensor loss, Tensor entropy, Tensor predicted, Tensor probability)");

  // One pass over the logits each. row_max and row_sum, one a position, are the largest logit and the sum
  // of exp(logit - row_max): unlike log(sum(exp)) alone they keep the loss of logits around 2^24 exact.
  // weight is keyword-only: torch hides a keyword that holds its default from Python, and its check of fake
  // tensors that propagate real ones takes a None that it sees for a changed tensor.
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, int reduction, SymInt ignore_index, "
      "float label_smoothing, ScalarType? out_dtype, float z_loss, *, Tensor? weight=None) -> Tensor loss");
  m.def(
      "cross_entropy_forward_gradient(Tensor input, Tensor target, int reduction, SymInt ignore_index, "
      "float label_smoothing, ScalarType? out_dtype, float z_loss, *, Tensor? weight=None) "
      "-> (Tensor loss, Tensor grad_input)");
  m.def(
      "cross_entropy_forward_gradient_(Tensor(a!) input, Tensor target, int reduction, SymInt ignore_index, "
      "float label_smoothing, ScalarType? out_dtype, float z_loss, *, Tensor? weight=None) -> Tensor loss");
  m.def(
      "cross_entropy_forward_softmax(Tensor input, Tensor target, int reduction, SymInt ignore_index, "
      "float label_smoothing, ScalarType? out_dtype, float z_loss, *, Tensor? weight=None) "
      "-> (Tensor loss, Tensor row_max, Tensor row_sum)");
  // Of softcap tanh(input / softcap); a gradient that is not wanted comes back without elements.
  m.def(
      "cross_entropy_forward_softcap(Tensor input, Tensor target, int reduction, SymInt ignore_index, "
      "float label_smoothing, ScalarType? out_dtype, float z_loss, float softcap, bool wants_gradient, *, "
      "Tensor? weight=None) -> (Tensor loss, Tensor grad_input, Tensor row_max, Tensor row_sum)");
  m.def(
      "cross_entropy_backward_softcap(Tensor grad_loss, Tensor input, Tensor target, Tensor row_max, "
      "Tensor row_sum, int reduction, SymInt ignore_index, float label_smoothing, float z_loss, "
      "float softcap, *, Tensor? weight=None) -> Tensor grad_input");
  // softcap 0 stands for none; entropy, predicted and probability are in the shape of the positions.
  m.def(
      "cross_entropy_forward_stats(Tensor input, Tensor target, int reduction, SymInt ignore_index, "
      "float label_smoothing, ScalarType? out_dtype, float z_loss, float softcap, bool wants_gradient, *, "
      "Tensor? weight=None) -> (Tensor loss, Tensor grad_input, Tensor row_max, Tensor row_sum, "
      "Tensor entropy, Tensor predicted, Tensor probability)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor row_max, "
      "Tensor row_sum, int reduction, SymInt ignore_index, float label_smoothing, float z_loss, *, "
      "Tensor? weight=None) -> Tensor grad_input");
  // Multiplies a gradient for an upstream gradient of 1 by the real one, after checking hard targets again.
  m.def(
      "cross_entropy_scale_gradient_(Tensor(a!) grad_input, Tensor grad_loss, Tensor target, "
      "SymInt ignore_index) -> ()");
  // The same from the logits, for float16: what it has rounded to zero no loss scaling would bring back.
  m.def(
      "cross_entropy_rescale_gradient_(Tensor(a!) grad_input, Tensor grad_loss, Tensor input, "
      "Tensor target, int reduction, SymInt ignore_index, float label_smoothing, float z_loss, *, "
      "Tensor? weight=None) -> ()");
  // cross_entropy(linear(input, linear_weight, linear_bias), ...) without the logits: input (H) or (N, H),
  // linear_weight (V, H) or (V, d1, ..., H). A chunk of logits takes chunk_rows rows, or memory_budget bytes.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None, "
      "Tensor? weight=None, int reduction=1, SymInt? ignore_index=None, float label_smoothing=0.0, *, "
      "ScalarType? out_dtype=None, float z_loss=0.0, float? softcap=None, int? chunk_rows=None, "
      "int? memory_budget=None) -> Tensor");
  m.def(
      "linear_cross_entropy_with_lse(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias=None, Tensor? weight=None, int reduction=1, SymInt? ignore_index=None, "
      "float label_smoothing=0.0, *, ScalarType? out_dtype=None, float z_loss=0.0, float? softcap=None, "
      "int? chunk_rows=None, int? memory_budget=None) -> (Tensor loss, Tensor lse)");
  // One product, or three; input is (N, H). wanted: the gradients of input, linear_weight, linear_bias; one
  // that is not wanted comes back without elements, and so does lse. softcap 0, chunk_rows 0 and
  // memory_budget -1 stand for none given. Tensors that may be missing are keyword-only, as weight above.
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor target, int reduction, "
      "SymInt ignore_index, float label_smoothing, float z_loss, float softcap, int chunk_rows, "
      "int memory_budget, ScalarType? out_dtype, bool wants_lse, *, Tensor? linear_bias=None, "
      "Tensor? weight=None) -> (Tensor loss, Tensor lse)");
  m.def(
      "linear_cross_entropy_forward_gradient(Tensor input, Tensor linear_weight, Tensor target, "
      "int reduction, SymInt ignore_index, float label_smoothing, float z_loss, float softcap, "
      "int chunk_rows, int memory_budget, ScalarType? out_dtype, bool[3] wanted, *, "
      "Tensor? linear_bias=None, Tensor? weight=None) "
      "-> (Tensor loss, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor input, Tensor linear_weight, Tensor target, int reduction, "
      "SymInt ignore_index, float label_smoothing, float z_loss, float softcap, int chunk_rows, "
      "int memory_budget, bool[3] wanted, *, Tensor? grad_loss=None, Tensor? grad_lse=None, "
      "Tensor? linear_bias=None, Tensor? weight=None) "
      "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  // Multiplies gradients for an upstream gradient of 1 by the real one, after checking hard targets again.
  m.def(
      "linear_cross_entropy_scale_gradients_(Tensor(a!)[] gradients, Tensor grad_loss, Tensor target, "
      "bool soft, SymInt classes, SymInt ignore_index) -> ()");
  // KL(softmax(teacher / temperature) || softmax(student / temperature)), classes last, any shape in front;
  // reduction 3 is batchmean. The others take one pass over both each, backward for an upstream gradient that
  // is known by then; cross_entropy_scale_gradient_ serves a gradient taken in the forward pass here as well.
  m.def(
      "kl_div_from_logits(Tensor student, Tensor teacher, *, float temperature=1.0, int reduction=3, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "kl_div_forward(Tensor student, Tensor teacher, float temperature, int reduction, "
      "ScalarType? out_dtype) -> Tensor loss");
  m.def(
      "kl_div_forward_gradient(Tensor student, Tensor teacher, float temperature, int reduction, "
      "ScalarType? out_dtype) -> (Tensor loss, Tensor grad_student)");
  m.def(
      "kl_div_backward(Tensor grad_loss, Tensor student, Tensor teacher, float temperature, int reduction) "
      "-> Tensor grad_student");
  // log p(target) of softmax(logits / temperature) over the classes, and the entropy of that distribution.
  // Both in out_dtype, or in the one that logits are accumulated in.
  m.def(
      "token_log_probs(Tensor logits, Tensor target, *, float temperature=1.0, SymInt ignore_index=-100, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "token_log_probs_with_entropy(Tensor logits, Tensor target, *, float temperature=1.0, "
      "SymInt ignore_index=-100, ScalarType? out_dtype=None) -> (Tensor log_probs, Tensor entropy)");
  // One pass over the logits each. row_statistics, one of each a position: the largest logit m, the sum of
  // exp(z) for z = (logit - m) / temperature, and with an entropy the sum of exp(z) z. An entropy that is not
  // wanted comes back without elements. Tensors that may be missing are keyword-only, as weight above.
  m.def(
      "token_log_probs_forward(Tensor logits, Tensor target, float temperature, SymInt ignore_index, "
      "ScalarType? out_dtype, bool wants_entropy) "
      "-> (Tensor log_probs, Tensor entropy, Tensor row_statistics)");
  m.def(
      "token_log_probs_backward(Tensor logits, Tensor target, Tensor row_statistics, float temperature, "
      "SymInt ignore_index, *, Tensor? grad_log_probs=None, Tensor? grad_entropy=None) "
      "-> Tensor grad_logits");
  // The same gradient over the logits themselves.
  m.def(
      "token_log_probs_backward_(Tensor(a!) logits, Tensor target, Tensor row_statistics, float temperature, "
      "SymInt ignore_index, *, Tensor? grad_log_probs=None, Tensor? grad_entropy=None) -> ()");
  // token_log_probs(linear(input, linear_weight, linear_bias), ...) from chunks of the logits, of
  // memory_budget bytes: input (..., H), linear_weight (V, H), target (...).
  m.def(
      "linear_token_log_probs(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None, "
      "*, "
      "float temperature=1.0, SymInt ignore_index=-100, ScalarType? out_dtype=None, "
      "int? memory_budget=None) -> Tensor");
  m.def(
      "linear_token_log_probs_with_entropy(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias=None, *, float temperature=1.0, SymInt ignore_index=-100, "
      "ScalarType? out_dtype=None, int? memory_budget=None) -> (Tensor log_probs, Tensor entropy)");
  // One product, or the same one again and one for each gradient that is wanted; input is (N, H).
  // memory_budget -1 stands for none given, row_statistics are as above.
  m.def(
      "linear_token_log_probs_forward(Tensor input, Tensor linear_weight, Tensor target, float temperature, "
      "SymInt ignore_index, int memory_budget, ScalarType? out_dtype, bool wants_entropy, *, "
      "Tensor? linear_bias=None) -> (Tensor log_probs, Tensor entropy, Tensor row_statistics)");
  m.def(
      "linear_token_log_probs_backward(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor row_statistics, float temperature, SymInt ignore_index, int memory_budget, bool[3] wanted, *, "
      "Tensor? grad_log_probs=None, Tensor? grad_entropy=None, Tensor? linear_bias=None) "
      "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  // Rows of input (N, ...) picked by index (B,), optionally (row - mean) * scale per channel.
  m.def(
      "gather_rows.out(Tensor input, Tensor index, Tensor? mean=None, Tensor? scale=None, "
      "int channel_dim=1, *, Tensor(a!) out) -> Tensor(a!)");
  // Samples of one shape on a GPU, without a graph to keep -> the batch; torch.stack where they differ.
  m.def("stack(Tensor[] samples) -> Tensor");
}
