// SPDX-License-Identifier: Apache-2.0
//
// New tensors on the simulated NPU. Memory that nothing has written yet is poisoned, whether the allocator took it from the device or reused a
// block: a program that relies on zeros, or on what happened to be there, computes NaN or uses an index far out of range. Operators that fill
// their result at once (to_npu) skip that, so it costs one pass over the tensors that a program asks for without contents.
#include <ATen/Operators.h>
#include <ATen/Parallel.h>
#include <c10/core/DispatchKeySet.h>

#include "alias.h"

namespace ascend_sim {

namespace {

// 0x7FFF in every two bytes: NaN as bfloat16, float16, float32, float64 and as both kinds of float8; 2147450879 as int32.
void poison_bytes(void* data, size_t bytes) {
  std::fill_n(static_cast<uint16_t*>(data), bytes / 2, uint16_t{0x7FFF});
  if (bytes % 2) static_cast<uint8_t*>(data)[bytes - 1] = 0x7F;
}

}  // namespace

void poison(const at::Tensor& t) {
  if (on_npu(t)) poison_bytes(t.storage().mutable_data(), t.storage().nbytes());
}

at::Tensor poisoned_on_cpu(at::IntArrayRef sizes, at::ScalarType type) {
  at::Tensor out = at::empty(sizes, type);
  poison_bytes(out.data_ptr(), out.nbytes());
  return out;
}

at::Tensor unwritten(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type, c10::Device device) {
  return at::_ops::empty_strided::redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::fromIntArrayRefSlow(sizes),
                                             c10::fromIntArrayRefSlow(strides), type, at::kStrided, device, false);
}

at::Tensor to_npu(const at::Tensor& given, c10::Device device) {
  at::Tensor cpu = given;
  if (cpu.is_conj()) cpu = cpu.resolve_conj();
  if (cpu.is_neg()) cpu = cpu.resolve_neg();
  if (cpu._is_zerotensor()) cpu = at::zeros(cpu.sizes(), cpu.options());  // it has no memory
  const bool dense = cpu.is_non_overlapping_and_dense();
  if (!dense) cpu = cpu.clone(at::MemoryFormat::Preserve);
  at::Tensor out = unwritten(cpu.sizes(), cpu.strides(), cpu.scalar_type(), device);
  auto* to = static_cast<char*>(out.data_ptr());
  const auto* from = static_cast<const char*>(cpu.const_data_ptr());
  at::parallel_for(0, cpu.nbytes(), 1 << 20, [&](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
  return out;
}

namespace {

using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;

at::Tensor poisoned(at::Tensor t) {
  poison(t);
  record_blank(t);
  return t;
}

// What PyTorch does at this key, which is to find the device's kernel, and the poison. torch_npu's kernels themselves stay: to_npu calls them.
at::Tensor empty(c10::SymIntArrayRef size, Type dtype, Layout layout, Device device, std::optional<bool> pin,
                 std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::computeDispatchKey(dtype, layout, device));
  return poisoned(at::_ops::empty_memory_format::redispatch(keys, size, dtype, layout, device, pin, format));
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, Type dtype, Layout layout, Device device, std::optional<bool> pin) {
  const c10::DispatchKeySet keys(c10::computeDispatchKey(dtype, layout, device));
  return poisoned(at::_ops::empty_strided::redispatch(keys, size, stride, dtype, layout, device, pin));
}

// PyTorch's own composition of an operator that torch_npu has a kernel for: it ends in one of the two above.
class Composed final : public c10::OperatorKernel {
 public:
  explicit Composed(const c10::OperatorHandle& op)
      : of_any_device_(op.getComputedKernelForDispatchKey(c10::DispatchKey::CPU)), tally_(tally(op.schema().name())) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    tally_.calls.fetch_add(1, std::memory_order_relaxed);
    of_any_device_.callBoxed(op, keys, stack);
  }

 private:
  c10::SafeKernelFunction of_any_device_;
  Tally& tally_;
};

}  // namespace

void install_memory() {
  static torch::Library any(torch::Library::IMPL, "aten", c10::DispatchKey::BackendSelect, __FILE__, __LINE__);
  any.impl("empty.memory_format", TORCH_FN(empty));
  any.impl("empty_strided", TORCH_FN(empty_strided));
  static torch::Library npu(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const char* name : {"empty_like", "new_empty_strided"}) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("aten::") + name).c_str(), "");
    npu.impl(name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Composed>(op)));
  }
}

}  // namespace ascend_sim
