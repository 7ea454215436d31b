// Which rule of collate a sample follows: torch's live default_collate_fn_map first, then its containers.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace mbperf {

// The numbers of the containers are known to mbperf/ops/collate_rules.py too.
enum class Kind {
  mapping = 0,
  named_tuple = 1,
  sequence = 2,
  dataclass = 3,
  unsupported = 4,
  tensor,
  array,
  array_scalar,
  float_number,
  int_number,
  text,
  function,  // a user's own entry of the map
};

struct Rule {
  Kind kind;
  pybind11::handle function;  // its entry in the map, null for containers
};

class Dispatcher {
 public:
  // `rules` is the module mbperf.ops.collate_rules.
  explicit Dispatcher(pybind11::module_ rules);

  // Looks whether the user changed the map since the last call; a few pointer comparisons.
  void refresh();
  Rule rule_of(pybind11::handle sample);
  Rule rule_of_tensors() const;  // what numpy arrays become

  const pybind11::dict& map() const { return map_; }

 private:
  Rule rule_of_entry(pybind11::handle function) const;
  Rule search(pybind11::handle sample) const;
  bool unchanged() const;

  pybind11::module_ rules_;
  pybind11::dict map_;
  std::vector<std::pair<pybind11::object, Kind>> native_;  // torch's own functions
  std::vector<std::pair<pybind11::object, pybind11::object>> seen_;
  // Static types only (int, dict, numpy's scalars): they are never freed, so their address is their name.
  std::unordered_map<PyTypeObject*, Rule> known_;
  bool plain_keys_ = false;
};

}  // namespace mbperf
