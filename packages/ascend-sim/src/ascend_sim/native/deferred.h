// SPDX-License-Identifier: Apache-2.0
//
// What operators that run after they were called have in common: those of lazy streams (streams.cpp) and those of graphs (graph.cpp).
#pragma once
#include "alias.h"

namespace ascend_sim {

// Apply f to every tensor of an argument: a tensor, a list of them, or a list of lists.
template <class F>
c10::IValue each_tensor(const c10::IValue& value, const F& f) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(f(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(f(t));
    return list;
  }
  if (!value.isList()) return value;
  const auto type = value.toList().elementType();
  if (type->kind() == c10::TypeKind::OptionalType && type->containedType(0)->kind() == c10::TypeKind::TensorType) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector()) list.push_back(t && t->defined() ? std::optional<at::Tensor>(f(*t)) : t);
    return list;
  }
  if (type->kind() == c10::TypeKind::ListType && type->containedType(0)->kind() == c10::TypeKind::TensorType) {
    c10::List<c10::List<at::Tensor>> lists;
    for (const c10::IValue& inner : value.toListRef()) lists.push_back(each_tensor(inner, f).toTensorList());
    return lists;
  }
  return value;
}

// As long as it lives, what this thread calls runs at once on any stream.
class AtOnce {
 public:
  AtOnce();
  ~AtOnce();
  AtOnce(const AtOnce&) = delete;
  AtOnce& operator=(const AtOnce&) = delete;

 private:
  bool outer_;
};

}  // namespace ascend_sim
