// mbperf._C.gather_rows: allocate, then one operator call per tensor; and a list of ints as an index.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "cpu/memory.h"
#include "python/bindings.h"
#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

using GatherRows = at::Tensor&(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const std::optional<at::Tensor>&, int64_t, at::Tensor&);

const c10::TypedOperatorHandle<GatherRows>& gather_rows_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mbperf::gather_rows", "out").typed<GatherRows>();
  return op;
}

// (n, rows of input), laid out as input's rows are where they are dense, so that a row is one copy.
at::Tensor new_rows(const at::Tensor& input, int64_t n, at::ScalarType dtype) {
  c10::DimVector sizes(input.sizes());
  sizes[0] = n;
  return empty_recycled(sizes, dtype, input.suggest_memory_format());
}

// A list or tuple of Python ints; undefined where one of them is something else.
at::Tensor index_of(PyObject* indices) {
  if (!PyTuple_CheckExact(indices) && !PyList_CheckExact(indices)) return {};
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(indices);
  at::Tensor index = at::detail::empty_cpu({n}, at::TensorOptions(at::kLong));
  auto* const data = index.mutable_data_ptr<int64_t>();
  for (Py_ssize_t k = 0; k < n; ++k) {
    PyObject* const item = PySequence_Fast_GET_ITEM(indices, k);
    if (!PyLong_CheckExact(item)) return {};
    data[k] = PyLong_AsLongLong(item);
    if (data[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return index;
}

// Nothing that torch has to see: CPU tensors without a graph to keep.
bool ours(const at::Tensor& tensor) {
  return is_plain(tensor) && !(tensor.requires_grad() && at::GradMode::is_enabled());
}

std::optional<at::Tensor> optional_tensor(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<at::Tensor>(THPVariable_Unpack(object));
}

std::vector<at::Tensor> unpack(PyObject* tuple) {
  std::vector<at::Tensor> tensors;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    PyObject* const item = PyTuple_GET_ITEM(tuple, i);
    if (!THPVariable_Check(item)) throw py::type_error("gather: expected tensors");
    tensors.push_back(THPVariable_Unpack(item));
  }
  return tensors;
}

struct Conversion {
  at::ScalarType dtype;
  std::optional<at::Tensor> mean, scale;
  int64_t channel_dim;

  // The named tuple mbperf.ops.gather.Conversion.
  explicit Conversion(PyObject* tuple)
      : dtype(reinterpret_cast<THPDtype*>(PyTuple_GET_ITEM(tuple, 0))->scalar_type),
        mean(optional_tensor(PyTuple_GET_ITEM(tuple, 1))),
        scale(optional_tensor(PyTuple_GET_ITEM(tuple, 2))),
        channel_dim(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 3))) {}
};

// The first tensor is converted and normalised, the others are gathered as they are.
at::ScalarType dtype_of(const std::vector<at::Tensor>& inputs, size_t i,
                        const std::optional<Conversion>& convert) {
  return i == 0 && convert ? convert->dtype : inputs[i].scalar_type();
}

void write_rows(const std::vector<at::Tensor>& inputs, const at::Tensor& index,
                const std::optional<Conversion>& convert, std::vector<at::Tensor>& outs) {
  const py::gil_scoped_release no_gil;
  const bool fresh = outs.empty();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Conversion* const how = i == 0 && convert ? &*convert : nullptr;
    if (fresh) outs.push_back(new_rows(inputs[i], index.numel(), dtype_of(inputs, i, convert)));
    gather_rows_op().call(inputs[i], index, how ? how->mean : std::nullopt, how ? how->scale : std::nullopt,
                          how ? how->channel_dim : 1, outs[i]);
  }
}

bool are_served(const std::vector<at::Tensor>& inputs, const at::Tensor& index) {
  return index.defined() && ours(index) && index.scalar_type() == at::kLong && index.dim() == 1 &&
         !inputs.empty() && std::all_of(inputs.begin(), inputs.end(), [&](const at::Tensor& input) {
           return ours(input) && input.dim() > 0 && input.size(0) == inputs[0].size(0);
         });
}

bool fits(const at::Tensor& out, const at::Tensor& input, int64_t n, at::ScalarType dtype) {
  return ours(out) && out.dim() == input.dim() && out.size(0) == n && out.scalar_type() == dtype &&
         out.sizes().slice(1) == input.sizes().slice(1);
}

// gather_rows(inputs tuple, index tensor or list of ints, Conversion or None, outs tuple or None) -> list of
// tensors; None where Python has to do it: another index, torch's work, or an argument that does not fit.
PyObject* py_gather_rows(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 4 || !PyTuple_Check(args[0])) throw py::type_error("gather_rows: expected a tuple and 3 more");
  const std::vector<at::Tensor> inputs = unpack(args[0]);
  const at::Tensor index = THPVariable_Check(args[1]) ? THPVariable_Unpack(args[1]) : index_of(args[1]);
  if (!are_served(inputs, index)) Py_RETURN_NONE;
  const auto convert = args[2] == Py_None ? std::nullopt : std::optional<Conversion>(std::in_place, args[2]);
  std::vector<at::Tensor> outs;
  if (args[3] != Py_None) {
    outs = unpack(args[3]);
    if (outs.size() != inputs.size()) Py_RETURN_NONE;
    for (size_t i = 0; i < outs.size(); ++i)
      if (!fits(outs[i], inputs[i], index.numel(), dtype_of(inputs, i, convert))) Py_RETURN_NONE;
  }
  write_rows(inputs, index, convert, outs);
  return THPVariable_WrapList(outs);
  END_HANDLE_TH_ERRORS
}

PyMethodDef kGatherRows = {"gather_rows",
                           reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_gather_rows)),
                           METH_FASTCALL, "gather_rows(inputs, index, conversion, outs)"};

}  // namespace

void bind_gather(py::module_& m) {
  m.add_object("gather_rows",
               py::reinterpret_steal<py::object>(PyCFunction_NewEx(&kGatherRows, nullptr, nullptr)));
}

}  // namespace mbperf
