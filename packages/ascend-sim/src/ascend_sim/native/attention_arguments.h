// SPDX-License-Identifier: Apache-2.0
//
// The arguments of the attention operators, read by name, and what their readers share.
#pragma once
#include <ATen/core/ivalue.h>

#include <unordered_map>

#include "attention.h"

namespace ascend_sim::attention {

using c10::IValue;

// The arguments of one of the operators: their names differ a little.
struct Names {
  std::string query_lengths, kv_lengths, heads, scale, lse;
};

class Arguments {
 public:
  Arguments(const char* op, const Names& names, const std::unordered_map<std::string, int>& index, const IValue* values)
      : op(op), names(names), index_(index), values_(values) {}

  const IValue& operator[](const std::string& name) const { return values_[index_.at(name)]; }
  bool knows(const std::string& name) const { return index_.count(name) > 0; }
  int64_t integer(const std::string& name) const { return (*this)[name].toInt(); }

  at::Tensor tensor(const std::string& name) const {
    const IValue& value = (*this)[name];
    if (!value.isTensor() || !value.toTensor().defined()) return {};
    on_device(op, name.c_str(), value.toTensor());
    return value.toTensor();
  }

  std::optional<std::vector<int64_t>> integers(const std::string& name) const {
    const IValue& value = (*this)[name];
    if (value.isNone()) return std::nullopt;
    if (value.isIntList()) return value.toIntVector();
    std::vector<int64_t> out;
    for (const IValue& item : value.toListRef()) out.push_back(item.isInt() ? item.toInt() : item.toSymInt().guard_int(__FILE__, __LINE__));
    return out;
  }

  const char* const op;
  const Names& names;

 private:
  const std::unordered_map<std::string, int>& index_;
  const IValue* values_;
};

// "BSND_NBSD" is query, key and value in BSND and the result in NBSD.
struct Layout {
  std::string name, in, out;
  bool packed;  // no batch dimension: requests lie one after the other
};

// Sizes of a query, key or value: tokens is S, or T of a packed layout (whose batch is 1).
struct Sizes {
  int64_t batch = 1, tokens = 0, heads = 0, size = 0;
};

// attention_operands.cpp
Layout layout_of(const Arguments& args);
Sizes sizes_of(const Arguments& args, const char* name, const at::Tensor& t, const std::string& layout, int64_t heads);
Axes axes_of(const std::string& layout, const Sizes& s);
std::vector<int64_t> shape_of(const std::string& layout, const Sizes& s);
void read_operands(const Arguments& args, Call& call, const Layout& layout, Sizes& query, Sizes& kv, bool paged);
void read_requests(const Arguments& args, Call& call, const Layout& layout, const Sizes& query, const Sizes& kv, bool paged);

// attention_rules.cpp
void read_window(const Arguments& args, Call& call, const Layout& layout, const Sizes& query, const Sizes& kv);
void read_sink(const Arguments& args, Call& call, const Layout& layout);
void check_limits(const Arguments& args, const Call& call, const Layout& layout, const Sizes& query, bool paged);

}  // namespace ascend_sim::attention
