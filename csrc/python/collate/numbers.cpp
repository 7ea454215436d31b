// Python's ints, bools and floats become a field of values, as torch.tensor makes one of a list.
#include <c10/core/DefaultDtype.h>

#include <cstring>

#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

template <typename T>
void put(std::vector<char>& values, size_t k, T value) {
  std::memcpy(values.data() + k * sizeof(T), &value, sizeof(T));
}

}  // namespace

Node Planner::number_field(at::ScalarType dtype, std::vector<char> values, size_t n) {
  Field field;
  field.dtype = dtype;
  field.sizes = {static_cast<int64_t>(n)};
  field.values = std::move(values);
  return add(std::move(field));
}

// torch.tensor on a list: bool if all are, int64 with ints, the default dtype with floats.
Node Planner::plan_ints(const py::object& batch, const Samples& samples, Holder holder, const Rule& rule) {
  const size_t n = samples.size();
  std::vector<char> values(n * sizeof(int64_t));
  bool all_bool = true;
  for (size_t k = 0; k < n; ++k) {
    PyObject* const sample = samples[k].ptr();
    if (PyFloat_CheckExact(sample))
      return plan_doubles(batch, samples, holder, rule, c10::get_default_dtype_as_scalartype());
    if (!PyLong_Check(sample) || !direct_) return by_torch(batch, samples, holder, rule);
    all_bool = all_bool && PyBool_Check(sample);
    int overflow = 0;
    put<int64_t>(values, k, PyLong_AsLongLongAndOverflow(sample, &overflow));
    if (overflow) return by_torch(batch, samples, holder, rule);
  }
  if (!all_bool) return number_field(at::kLong, std::move(values), n);
  std::vector<char> bools(n);
  for (size_t k = 0; k < n; ++k) bools[k] = samples[k].ptr() == Py_True;
  return number_field(at::kBool, std::move(bools), n);
}

Node Planner::plan_doubles(const py::object& batch, const Samples& samples, Holder holder, const Rule& rule,
                           at::ScalarType dtype) {
  const size_t n = samples.size();
  const bool known = direct_ && (dtype == at::kDouble || dtype == at::kFloat);
  std::vector<char> values(n * sizeof(double));
  for (size_t k = 0; k < n; ++k) {
    PyObject* const sample = samples[k].ptr();
    const bool exact = PyFloat_Check(sample);
    if (!known || !(exact || PyLong_Check(sample))) return by_torch(batch, samples, holder, rule);
    const double value = exact ? PyFloat_AS_DOUBLE(sample) : PyLong_AsDouble(sample);
    if (value == -1.0 && PyErr_Occurred()) {  // an int beyond double: torch words the error
      PyErr_Clear();
      return by_torch(batch, samples, holder, rule);
    }
    if (dtype == at::kDouble)
      put<double>(values, k, value);
    else
      put<float>(values, k, static_cast<float>(value));
  }
  values.resize(n * c10::elementSize(dtype));
  return number_field(dtype, std::move(values), n);
}

}  // namespace mbperf
