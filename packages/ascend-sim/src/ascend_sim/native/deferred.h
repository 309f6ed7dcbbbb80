// SPDX-License-Identifier: Apache-2.0
//
// What operators that run after they were called have in common, those of lazy streams (streams.cpp) and those of graphs (graph.cpp), with each other
// and some of it with operators that run at once (aten.cpp).
#pragma once
#include <functional>
#include <set>

#include "alias.h"
#include "streams.h"

namespace ascend_sim {

inline void check(aclError error) { TORCH_CHECK(error == ACL_SUCCESS, aclGetRecentErrMsg()); }

// As long as it lives, this thread's warnings are not shown: the dispatcher warns about every kernel that replaces another, and replacing torch_npu's
// is what this library is for.
class Silence {
 public:
  Silence() : guard_(&none_) {}

 private:
  struct None final : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  None none_;
  c10::WarningUtils::WarningHandlerGuard guard_;
};

// For each result of an operator the argument that it is, or -1.
std::vector<int> arguments_of_results(const c10::FunctionSchema& schema);

// Whether an operator draws random numbers without saying so by an argument `generator`.
bool draws_without_generator(const std::string& name);

// Whether this thread's operator is captured in a graph: its results get their shapes, and nobody reads their numbers (graph.cpp).
bool is_captured();

// Put what `make` returns for an operator, of "aten", "npu" or "c10d", in the place of its kernel for npu tensors. Views keep theirs, and the operators `but`.
using MakeKernel = std::function<torch::CppFunction(const std::string& space, const c10::OperatorHandle& op)>;
void replace_kernels(const std::set<std::string>& but, const MakeKernel& make);

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

// As long as it lives, this thread leaves Python to others. What runs late may begin where torch_npu holds Python's lock, as hardware returns at once
// there; a collective would wait for a thread of gloo, and that one for the lock, to drop a tensor that Python knows.
class WithoutPython {
 public:
  WithoutPython();
  ~WithoutPython();
  WithoutPython(const WithoutPython&) = delete;
  WithoutPython& operator=(const WithoutPython&) = delete;

 private:
  void* thread_;
};

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
