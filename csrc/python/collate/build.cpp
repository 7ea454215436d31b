// From plan to batch: one allocation per field (in a worker, or on the way to a device, one for all), one
// copy, the containers.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/Storage.h>

#include "cpu/collate/collate.h"
#include "cpu/memory.h"
#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

constexpr int64_t kAlign = 64;                       // a cache line, and the widest vector
constexpr int64_t kMappedBytes = int64_t{32} << 20;  // from here on malloc asks the kernel for every batch
constexpr int64_t kReleaseGilBytes = 16 * 1024;      // a copy of 1 us: giving up the GIL costs a tenth of it

at::Tensor new_tensor(const Field& field, const CollateSettings& settings) {
  const auto options = at::TensorOptions(field.dtype);
  if (settings.pin_memory) {
    const auto pinned = options.pinned_memory(true);
    return field.strides.empty() ? at::empty(field.sizes, pinned)
                                 : at::empty_strided(field.sizes, field.strides, pinned);
  }
  if (field.strides.empty()) return empty_recycled(field.sizes, field.dtype);
  return at::detail::empty_strided_cpu(field.sizes, field.strides, options);
}

// Samples that torch converts or gathers by stride: where no pages have to be cleared it allocates as well.
bool stacks_fresh(const Field& field, const CollateSettings& settings) {
  return !field.tensors.empty() && !settings.pin_memory && field.bytes() < kMappedBytes;
}

at::Tensor view_of(const c10::Storage& storage, int64_t byte_offset, const Field& field) {
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
                                                             c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                             c10::scalarTypeToTypeMeta(field.dtype));
  c10::TensorImpl* const impl = view.unsafeGetTensorImpl();
  impl->set_storage_offset(byte_offset / static_cast<int64_t>(c10::elementSize(field.dtype)));
  if (field.strides.empty())
    impl->set_sizes_contiguous(field.sizes);
  else
    impl->set_sizes_and_strides(field.sizes, field.strides);
  return view;
}

// Every tensor of the batch as a view of one storage: one descriptor and one mapping to send to another
// process, or one copy to a device.
class PackedBatch {
 public:
  // allocate(bytes) -> torch.UntypedStorage
  PackedBatch(std::vector<Field>& fields, const py::object& allocate) {
    for (const Field& field : fields) {
      offsets_.push_back(bytes_);
      bytes_ += (field.bytes() + kAlign - 1) / kAlign * kAlign;
    }
    if (!bytes_) return;
    object_ = allocate(bytes_);
    storage_ = THPStorage_Unpack(object_.ptr());
    for (size_t i = 0; i < fields.size(); ++i)
      if (!fields[i].ready) fields[i].out = view_of(storage_, offsets_[i], fields[i]);
  }

  bool empty() const { return bytes_ == 0; }
  char* at(size_t field) const { return static_cast<char*>(storage_.mutable_data()) + offsets_[field]; }

  // A tensor that torch made keeps its class and strides; only its memory becomes the batch's.
  void move_in(size_t i, Field& field) const {
    c10::TensorImpl* const impl = field.out.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(storage_);
    impl->set_storage_offset(offsets_[i] / static_cast<int64_t>(c10::elementSize(field.dtype)));
  }

  // The whole of it goes to the device at once; the fields become views there.
  void send(std::vector<Field>& fields, const py::object& staging) const {
    const py::object sent = staging.attr("send")(object_, bytes_);
    const at::Tensor& bytes = THPVariable_Unpack(sent.ptr());
    for (size_t i = 0; i < fields.size(); ++i) {
      Field& field = fields[i];
      const c10::DimVector strides(field.out.strides());
      field.out =
          at::empty({0}, bytes.options().dtype(field.dtype))
              .set_(bytes.storage(), offsets_[i] / static_cast<int64_t>(c10::elementSize(field.dtype)),
                    field.sizes, strides);
    }
  }

 private:
  std::vector<int64_t> offsets_;
  int64_t bytes_ = 0;
  py::object object_;
  c10::Storage storage_;
};

RowCopy copy_of(Field& field, char* out) {
  RowCopy copy{out, nullptr, static_cast<int64_t>(field.rows.size()), 0};
  if (!field.values.empty()) field.rows.assign(1, field.values.data());
  if (field.ready) field.rows.assign(1, static_cast<const char*>(field.out.const_data_ptr()));
  copy.rows = field.rows.data();
  copy.n = static_cast<int64_t>(field.rows.size());
  copy.stride = copy.n ? field.bytes() / copy.n : 0;
  if (!field.row_sizes.empty()) copy.sizes = field.row_sizes.data();
  if (!field.starts.empty()) copy.starts = field.starts.data();
  copy.fill = field.fill.data();
  copy.fill_bytes = static_cast<int64_t>(field.fill.size());
  return copy;
}

void write(std::vector<Field>& fields, const std::vector<RowCopy>& copies) {
  copy_rows(copies);
  const at::NoGradGuard no_grad;
  for (Field& field : fields)
    if (!field.tensors.empty() && field.out.defined())
      at::stack_out(field.out, field.tensors);
    else if (!field.tensors.empty())
      field.out = at::stack(field.tensors);
}

void fill_fields(std::vector<Field>& fields, const PackedBatch* packed) {
  std::vector<RowCopy> copies;
  int64_t bytes = 0;
  for (size_t i = 0; i < fields.size(); ++i) {
    Field& field = fields[i];
    bytes += field.bytes();
    if (!field.tensors.empty() || (field.ready && !packed)) continue;
    copies.push_back(
        copy_of(field, packed ? packed->at(i) : static_cast<char*>(field.out.mutable_data_ptr())));
  }
  if (bytes < kReleaseGilBytes) {
    write(fields, copies);
  } else {
    const py::gil_scoped_release no_gil;
    write(fields, copies);
  }
}

py::object put_together(const Node& node, const std::vector<Field>& fields, const py::module_& rules);

py::dict dict_of(const Node& node, const std::vector<Field>& fields, const py::module_& rules) {
  py::dict dict;
  for (size_t i = 0; i < node.children.size(); ++i)
    dict[node.keys[i]] = put_together(node.children[i], fields, rules);
  return dict;
}

py::list list_of(const Node& node, const std::vector<Field>& fields, const py::module_& rules) {
  py::list list(node.children.size());
  for (size_t i = 0; i < node.children.size(); ++i)
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i),
                    put_together(node.children[i], fields, rules).release().ptr());
  return list;
}

py::object put_together(const Node& node, const std::vector<Field>& fields, const py::module_& rules) {
  switch (node.shape) {
    case Node::Shape::field:
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(fields[node.field].out));
    case Node::Shape::object:
      return node.object;
    case Node::Shape::dict:
      return dict_of(node, fields, rules);
    case Node::Shape::list:
      return list_of(node, fields, rules);
    case Node::Shape::named_tuple:
    case Node::Shape::call:
      return node.object(*list_of(node, fields, rules));
    case Node::Shape::mapping:
      return rules.attr("rebuild_mapping")(node.object, dict_of(node, fields, rules));
    case Node::Shape::sequence:
      return rules.attr("rebuild_sequence")(node.object, list_of(node, fields, rules));
    case Node::Shape::dataclass:
      return rules.attr("rebuild_dataclass")(node.object, dict_of(node, fields, rules));
  }
  throw std::logic_error("mbperf: unknown node in a collate plan");
}

}  // namespace

py::object build(const Node& root, std::vector<Field>& fields, const CollateSettings& settings, bool worker,
                 const py::module_& rules) {
  const bool staged = !worker && !settings.staging.is_none();
  std::optional<PackedBatch> packed;
  if (worker) packed.emplace(fields, rules.attr("new_shared"));
  if (staged) packed.emplace(fields, settings.staging.attr("take"));
  if (packed && packed->empty()) packed.reset();
  if (!packed) {
    for (Field& field : fields)
      if (!field.ready && !stacks_fresh(field, settings)) field.out = new_tensor(field, settings);
  }
  fill_fields(fields, packed ? &*packed : nullptr);
  if (staged && packed) packed->send(fields, settings.staging);
  for (size_t i = 0; i < fields.size(); ++i) {
    Field& field = fields[i];
    if (worker && packed && field.ready) packed->move_in(i, field);
    if (staged && !packed) field.out = THPVariable_Unpack(settings.staging.attr("move")(field.out).ptr());
    if (field.requires_grad) field.out.requires_grad_(true);
  }
  return put_together(root, fields, rules);
}

}  // namespace mbperf
