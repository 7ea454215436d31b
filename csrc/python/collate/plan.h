// The plan of a batch, worked out from its samples before a byte is copied: a tree of nodes whose leaves
// name fields; a field is one output tensor and where its rows come from.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "python/collate/dispatch.h"

namespace mbperf {

// The same place in every sample, owned: Python code that runs meanwhile must not free them.
using Samples = std::vector<pybind11::object>;

// The container of the samples when a function of the map is called with them, as default_collate does.
enum class Holder { batch, list, tuple };

struct Field {
  at::ScalarType dtype = at::kFloat;
  c10::DimVector sizes;    // of the batch
  c10::DimVector strides;  // empty: contiguous
  bool requires_grad = false;
  // The rows: dense bytes of each sample, and who keeps them alive ...
  std::vector<const char*> rows;
  Samples owners;
  std::vector<at::Tensor> kept;
  // ... or samples that torch has to convert or gather by stride ...
  std::vector<at::Tensor> tensors;
  // ... or values that were Python numbers.
  std::vector<char> values;
  // Ragged samples: bytes of each row; packed ones also where each starts.
  std::vector<int64_t> row_sizes;
  std::vector<int64_t> starts;
  std::vector<char> fill;
  // Made by torch already; in a worker, or on its way to a device, its memory is moved into the batch's.
  bool ready = false;
  at::Tensor out;

  int64_t bytes() const;
};

struct Node {
  enum class Shape { field, object, dict, list, named_tuple, mapping, sequence, dataclass, call };
  Shape shape = Shape::object;
  size_t field = 0;
  // A ready result, the named tuple's class, sample 0 to be rebuilt, or what is called with the children.
  pybind11::object object;
  std::vector<pybind11::object> keys;  // of a dict, mapping or dataclass
  std::vector<Node> children;

  static Node of(pybind11::object result) {
    Node node;
    node.object = std::move(result);
    return node;
  }
};

struct CollateSettings {
  bool strict = false;
  bool pin_memory = false;
  pybind11::object pad = pybind11::none();  // a number, "packed", or a callable: path -> one of these or None
  bool lengths = false;
  bool mask = false;
  // mbperf.ops.staging.Staging: the batch is packed into its buffer and sent to its device; or None.
  pybind11::object staging = pybind11::none();
};

class Planner {
 public:
  Planner(pybind11::module_ rules, Dispatcher& dispatcher, const CollateSettings& settings, bool worker);

  Node plan(pybind11::object batch, Samples samples, Holder holder);
  Node plan_made(const pybind11::list& tensors);
  std::vector<Field>& fields() { return fields_; }

 private:
  struct Step {
    bool attribute;
    pybind11::object name;
  };

  Node plan_tensors(Samples samples);
  bool plan_equal_tensors(Samples& samples, Node& node);
  Node plan_plain_tensors(Samples samples, bool grad);
  Node plan_promoted(const Samples& samples, Field batch);
  Node stack_by_torch(const Samples& samples);
  bool stack_directly(const Samples& samples, Node& node);
  Node stack_by_table(const Samples& samples);
  Node plan_ragged(Samples samples, const pybind11::object& pad, bool grad);
  Node plan_padded(Node values, const std::vector<int64_t>& lengths, int64_t longest);
  Node plan_packed(Node values, const std::vector<int64_t>& lengths, int64_t longest, const Samples& samples);
  Node plan_arrays(Samples samples);
  bool plan_plain_arrays(Samples& samples, Node& node);
  Node plan_array_scalars(const pybind11::object& batch, const Samples& samples, Holder holder,
                          const Rule& rule);
  Node plan_ints(const pybind11::object& batch, const Samples& samples, Holder holder, const Rule& rule);
  Node plan_function(pybind11::object batch, Samples samples, Holder holder, const Rule& rule);
  Node plan_mapping(Samples samples);
  Node plan_sequence(Samples samples);
  Node plan_named_tuple(Samples samples);
  Node plan_dataclass(Samples samples);

  Node by_torch(const pybind11::object& batch, const Samples& samples, Holder holder, const Rule& rule);
  Node node_of(pybind11::object result);
  bool staged() const { return !worker_ && !settings_.staging.is_none(); }
  Node add(Field field);
  Node plan_doubles(const pybind11::object& batch, const Samples& samples, Holder holder, const Rule& rule,
                    at::ScalarType dtype);
  Node number_field(at::ScalarType dtype, std::vector<char> values, size_t n);
  Field ragged_field(const Samples& samples, const pybind11::object& pad, at::ScalarType dtype,
                     const std::vector<int64_t>& lengths, int64_t longest);
  std::vector<char> fill_of(const pybind11::object& pad, at::ScalarType dtype, const Samples& samples);
  at::ScalarType check_ragged(const Samples& samples);
  at::ScalarType promoted(at::ScalarType a, at::ScalarType b, const Samples& samples, size_t k);
  static pybind11::object held(const pybind11::object& batch, const Samples& samples, Holder holder);
  std::vector<Samples> columns(const Samples& samples);
  pybind11::object value_of(const Samples& samples, size_t k, pybind11::handle key);
  pybind11::list items_of(const Samples& samples, size_t k);
  Samples values_of(const Samples& samples, pybind11::handle key);
  void check_same_type(const Samples& samples);
  pybind11::object pad_here() const;

  pybind11::list path() const;
  [[noreturn]] void fail(const char* reason, const Samples& samples, size_t k);

  pybind11::module_ rules_;
  Dispatcher& dispatcher_;
  const CollateSettings& settings_;
  const bool worker_;
  const bool direct_;  // no torch function or dispatch mode wants to see our tensors
  std::vector<Field> fields_;
  std::vector<Step> path_;
};

// Allocates the fields (in a worker: all in one piece of shared memory; on the way to a device: in one
// staging buffer), copies, sends, and puts the batch together.
pybind11::object build(const Node& root, std::vector<Field>& fields, const CollateSettings& settings,
                       bool worker, const pybind11::module_& rules);

inline const at::Tensor& tensor_of(const pybind11::object& sample) {
  return THPVariable_Unpack(sample.ptr());
}
// A strided CPU tensor with nothing behind it: no subclass, conjugation, quantizer or transform.
bool is_plain(const at::Tensor& tensor);
// The same on GPUs, where the kernels for it are built.
bool are_plain_cuda(const Samples& samples);
pybind11::list as_list(const Samples& samples);
// The sizes of n samples together.
c10::DimVector with_batch(size_t n, at::IntArrayRef sizes);

}  // namespace mbperf
