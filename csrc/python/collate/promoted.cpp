// Samples of several dtypes on their way to a device: each travels as it is, in a group of its dtype, and is
// converted there. A group costs one launch however the dtypes alternate in the batch.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <cstring>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

struct Group {
  at::ScalarType dtype;
  Samples samples;
  std::vector<int64_t> places;  // of the samples in the batch
};

// In the order in which their dtypes first appear.
std::vector<Group> groups_by_dtype(const Samples& samples) {
  std::vector<Group> groups;
  for (size_t k = 0; k < samples.size(); ++k) {
    const at::ScalarType dtype = THPVariable_Unpack(samples[k].ptr()).scalar_type();
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.dtype == dtype; });
    if (group == groups.end()) group = groups.insert(groups.end(), Group{dtype, {}, {}});
    group->samples.push_back(samples[k]);
    group->places.push_back(static_cast<int64_t>(k));
  }
  return groups;
}

// For each sample of the batch: which row it is when the groups lie end to end.
std::vector<char> rows_of(const std::vector<Group>& groups, size_t n) {
  std::vector<int64_t> rows(n);
  int64_t row = 0;
  for (const Group& group : groups)
    for (const int64_t place : group.places) rows[static_cast<size_t>(place)] = row++;
  std::vector<char> bytes(n * sizeof(int64_t));
  std::memcpy(bytes.data(), rows.data(), bytes.size());
  return bytes;
}

// rows (n,) and the groups, on their device -> the batch there.
at::Tensor joined(const Field& batch, const at::Tensor& rows, const std::vector<at::Tensor>& groups) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> converted;
  for (const at::Tensor& group : groups) converted.push_back(group.to(batch.dtype));
  const auto options = converted[0].options();
  at::Tensor out = batch.strides.empty() ? at::empty(batch.sizes, options)
                                         : at::empty_strided(batch.sizes, batch.strides, options);
  return at::index_select_out(out, at::cat(converted), 0, rows);
}

}  // namespace

// `batch` has the dtype, sizes and strides of the result; the samples have one shape.
Node Planner::plan_promoted(const Samples& samples, Field batch) {
  std::vector<Group> groups = groups_by_dtype(samples);
  batch.rows.clear();
  Node node;
  node.shape = Node::Shape::call;
  node.object = py::cpp_function([batch](const at::Tensor& rows, const py::args& groups) {
    return joined(batch, rows, groups.cast<std::vector<at::Tensor>>());
  });
  node.children.push_back(number_field(at::kLong, rows_of(groups, samples.size()), samples.size()));
  for (Group& group : groups)
    node.children.push_back(plan_plain_tensors(std::move(group.samples), /*grad=*/false));
  return node;
}

}  // namespace mbperf
