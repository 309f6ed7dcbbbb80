// SPDX-License-Identifier: Apache-2.0
//
// Simulated device memory is host memory, so a CPU tensor over the same bytes is all that a CPU kernel needs.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>

namespace ascend_sim {

inline bool on_npu(const at::Tensor& t) { return t.defined() && t.device().type() == c10::DeviceType::PrivateUse1; }

// A CPU tensor over the memory of an npu tensor. It owns nothing: it must not outlive the tensor it was made of.
// `resizable` lets a CPU kernel give an `out=` alias memory of its own; the caller then copies that back.
inline at::Tensor cpu_alias(const at::Tensor& t, bool resizable = false) {
  if (!on_npu(t)) return t;
  const auto& from = t.storage();
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), from.nbytes(),
                                                       c10::DataPtr(const_cast<void*>(from.data()), c10::Device(c10::kCPU)),
                                                       resizable ? c10::GetAllocator(c10::kCPU) : nullptr, resizable);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (t.is_conj()) impl->_set_conj(true);
  if (t.is_neg()) impl->_set_neg(true);
  return out;
}

// The same, keeping the npu tensor's memory alive for as long as the alias lives: for work that outlasts the call. It keeps the storage and not
// the tensor: a tensor that Python made takes Python's lock when it dies, and a thread that waits for that lock while Python ends is aborted.
inline at::Tensor owning_alias(const at::Tensor& t) {
  if (!on_npu(t)) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [kept = t.storage()](void*) {}, t.options().device(c10::kCPU));
}

// Write over all of an npu tensor's memory what no program can take for results (memory.cpp); nothing for tensors elsewhere.
void poison(const at::Tensor& t);
// The same at each replay of the graph that is captured now, if one is and the memory belongs to no tensor by then (graph.cpp).
void record_blank(const at::Tensor& t);
at::Tensor poisoned_on_cpu(at::IntArrayRef sizes, at::ScalarType type);

// A new npu tensor without poison, for a result that is written at once.
at::Tensor unwritten(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type, c10::Device device);

// A new npu tensor with the numbers of a CPU tensor.
at::Tensor to_npu(const at::Tensor& cpu, c10::Device device);

// Operators and collectives that this thread has run.
inline thread_local int64_t calls_of_thread = 0;

class CallCount {
 public:
  void fetch_add(int64_t calls, std::memory_order order) {
    calls_of_thread += calls;
    count_.fetch_add(calls, order);
  }
  int64_t load() const { return count_.load(); }
  void operator=(int64_t count) { count_ = count; }

 private:
  std::atomic<int64_t> count_{0};
};

// One tally per operator: how often it ran, and the floating-point operations of its matrix products.
struct Tally {
  CallCount calls;
  std::atomic<int64_t> flops{0};
};
Tally& tally(const std::string& op);

// Strict mode (default): what the operator's documentation rules out is an error. ASCEND_SIM_STRICT=0 relaxes data types and alignment.
bool strict();

// The id of a rule: as it is, or, where it begins with "." (several operators share the check), after the operator's name.
inline std::string rule_id(const char* id, const std::string& op) { return *id == '.' ? op + id : id; }

// A rule of an operator's documentation (ascend_sim/contracts/<operator>.toml) that relaxed mode does without. The message follows `op`.
#define STRICT(id, condition, op, ...)                                                                                 \
  TORCH_CHECK(!::ascend_sim::strict() || (condition), "[", ::ascend_sim::rule_id(id, op), "] ", op, __VA_ARGS__, \
              " (ASCEND_SIM_STRICT=0 allows it)")

// A rule that relaxed mode keeps, because the operator's arithmetic has no meaning without it.
#define RULE(id, condition, op, ...) TORCH_CHECK((condition), "[", ::ascend_sim::rule_id(id, op), "] ", op, __VA_ARGS__)

}  // namespace ascend_sim
