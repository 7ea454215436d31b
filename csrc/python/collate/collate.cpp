// mbperf._C.collate(batch, strict, pin_memory, pad, lengths, mask, staging): plan, then build.
#include <torch/csrc/Exceptions.h>

#include "python/bindings.h"
#include "python/collate/plan.h"

namespace py = pybind11;

namespace mbperf {
namespace {

// The Python objects that collate needs, looked up once; never freed, as the interpreter goes first.
struct Context {
  py::module_ rules = py::module_::import("mbperf.ops.collate_rules");
  py::object worker_info = rules.attr("get_worker_info");
  py::object gathered = rules.attr("GatheredBatch");
  Dispatcher dispatcher{rules};
};

Context& context() {
  static Context* const made = new Context;
  return *made;
}

Samples samples_of(PyObject* batch) {
  const bool is_tuple = PyTuple_Check(batch);
  const Py_ssize_t n = is_tuple ? PyTuple_GET_SIZE(batch) : PyList_GET_SIZE(batch);
  Samples samples(static_cast<size_t>(n));
  for (Py_ssize_t k = 0; k < n; ++k)
    samples[static_cast<size_t>(k)] =
        py::reinterpret_borrow<py::object>(is_tuple ? PyTuple_GET_ITEM(batch, k) : PyList_GET_ITEM(batch, k));
  return samples;
}

// Strings stay as they are: default_collate hands the very list back.
bool is_text(const py::object& batch, const CollateSettings& settings, Dispatcher& dispatcher) {
  if (!PyList_CheckExact(batch.ptr()) || PyList_GET_SIZE(batch.ptr()) == 0 || settings.strict) return false;
  return dispatcher.rule_of(PyList_GET_ITEM(batch.ptr(), 0)).kind == Kind::text;
}

// A batch that is made already: its tensors are packed like any others, without a look at its samples.
py::object pass_on(const py::list& tensors, const CollateSettings& settings) {
  if (settings.staging.is_none()) return tensors;
  Planner planner(context().rules, context().dispatcher, settings, false);
  const Node root = planner.plan_made(tensors);
  return build(root, planner.fields(), settings, false, context().rules);
}

py::object collate(const py::object& batch, CollateSettings settings) {
  Context& here = context();
  here.dispatcher.refresh();
  if (is_text(batch, settings, here.dispatcher)) return batch;
  if (py::type::handle_of(batch).is(here.gathered)) return pass_on(batch.attr("collated")(), settings);
  const bool plain = PyList_CheckExact(batch.ptr()) || PyTuple_CheckExact(batch.ptr());
  const py::object listed = plain ? batch : here.rules.attr("samples")(batch);
  Samples samples = samples_of(listed.ptr());
  if (samples.empty()) here.rules.attr("fail_empty")();
  const bool worker = !here.worker_info().is_none();
  if (worker) settings.pin_memory = false;  // a forked process must not touch the accelerator
  Planner planner(here.rules, here.dispatcher, settings, worker);
  const Node root = planner.plan(batch, std::move(samples), Holder::batch);
  return build(root, planner.fields(), settings, worker, here.rules);
}

PyObject* py_collate(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (n != 1 && n != 6 && n != 7) {
    PyErr_Format(PyExc_TypeError, "collate: 1, 6 or 7 arguments expected, %zd given", n);
    return nullptr;
  }
  CollateSettings settings;
  if (n >= 6) {
    settings.strict = args[1] == Py_True;
    settings.pin_memory = args[2] == Py_True;
    settings.pad = py::reinterpret_borrow<py::object>(args[3]);
    settings.lengths = args[4] == Py_True;
    settings.mask = args[5] == Py_True;
  }
  if (n == 7) settings.staging = py::reinterpret_borrow<py::object>(args[6]);
  return collate(py::reinterpret_borrow<py::object>(args[0]), settings).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef kCollate = {
    "collate", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_collate)), METH_FASTCALL,
    "collate(batch, strict=False, pin_memory=False, pad=None, lengths=False, mask=False, staging=None)"};

}  // namespace

void bind_collate(py::module_& m) {
  m.add_object("collate", py::reinterpret_steal<py::object>(PyCFunction_NewEx(&kCollate, nullptr, nullptr)));
}

}  // namespace mbperf
