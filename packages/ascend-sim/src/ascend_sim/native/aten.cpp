// SPDX-License-Identifier: Apache-2.0
//
// Every aten operator on the simulated NPU: one boxed kernel that runs the operator's CPU kernel on aliases of the same memory.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <set>

#include "deferred.h"
#include "matmul.h"

namespace ascend_sim {

using c10::IValue;
using torch::jit::Stack;

namespace {
std::mutex tally_mutex;
std::map<std::string, Tally>& tallies() {
  static std::map<std::string, Tally> all;
  return all;
}
}  // namespace

Tally& tally(const std::string& op) {
  std::lock_guard<std::mutex> lock(tally_mutex);
  return tallies()[op];
}

bool strict() {
  static const bool value = [] {
    const char* text = std::getenv("ASCEND_SIM_STRICT");
    return !(text && std::string(text) == "0");
  }();
  return value;
}

namespace {

c10::Device current_device() {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::PrivateUse1);
  return guard.getDevice();
}

// Random numbers are a function of (seed, offset) of the npu generator, which torch_npu keeps: so manual_seed, get_state and per-request
// generators are reproducible, and each draw moves the offset on.
at::Generator cpu_generator(const std::optional<at::Generator>& given, c10::Device device) {
  at::Generator npu = given.has_value() && given->defined() && given->device().type() == c10::DeviceType::PrivateUse1
                          ? *given
                          : at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(npu.mutex());
  const uint64_t seed = npu.current_seed(), offset = npu.get_offset();
  npu.set_offset(offset + 4);
  return at::make_generator<at::CPUGeneratorImpl>(seed ^ (offset * 0x9E3779B97F4A7C15ull));
}

// Runs an operator that draws from the default CPU generator, because its schema has no generator, on the npu's random numbers instead.
class BorrowedGenerator {
 public:
  explicit BorrowedGenerator(c10::Device device) : cpu_(at::detail::getDefaultCPUGenerator()) {
    auto drawn = cpu_generator(std::nullopt, device).get_state();
    std::lock_guard<std::mutex> lock(cpu_.mutex());
    saved_ = cpu_.get_state();
    cpu_.set_state(drawn);
  }
  ~BorrowedGenerator() {
    std::lock_guard<std::mutex> lock(cpu_.mutex());
    cpu_.set_state(saved_);
  }
  BorrowedGenerator(const BorrowedGenerator&) = delete;
  BorrowedGenerator& operator=(const BorrowedGenerator&) = delete;

 private:
  at::Generator cpu_;
  at::Tensor saved_;
};

// Operators for which a CPU tensor beside npu tensors is right on hardware too.
bool takes_cpu_tensors(const std::string& name) {
  static const std::set<std::string> names = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_",
                                              "aten::tensor_split", "aten::_pack_padded_sequence"};
  return names.count(name) > 0;
}

// Matrix products: 2 * inner size * elements of the result. `left` is the argument whose last axis is the inner one.
int left_matrix(const std::string& name) {
  static const std::set<std::string> first = {"aten::mm", "aten::bmm", "aten::matmul", "aten::linear", "aten::mv", "aten::_int_mm"};
  static const std::set<std::string> second = {"aten::addmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_", "aten::addmv"};
  return first.count(name) ? 0 : second.count(name) ? 1 : -1;
}

// What to do with each argument, read off the operator's schema once.
struct Argument {
  enum Kind { other, tensor, tensors, optional_tensors, device, generator } kind = other;
  bool write = false;
  bool out = false;  // a keyword `out=` tensor
};

Argument::Kind kind_of(c10::TypePtr type) {
  if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  switch (type->kind()) {
    case c10::TypeKind::TensorType: return Argument::tensor;
    case c10::TypeKind::DeviceObjType: return Argument::device;
    case c10::TypeKind::GeneratorType: return Argument::generator;
    case c10::TypeKind::ListType: {
      auto element = type->expectRef<c10::ListType>().getElementType();
      if (element->kind() == c10::TypeKind::TensorType) return Argument::tensors;
      if (element->kind() == c10::TypeKind::OptionalType) return kind_of(element) == Argument::tensor ? Argument::optional_tensors : Argument::other;
      return Argument::other;
    }
    default: return Argument::other;
  }
}

struct Pair {
  at::Tensor npu, cpu;
  bool write;
};

class AtenKernel : public c10::OperatorKernel {
 public:
  explicit AtenKernel(const c10::FunctionSchema& schema)
      : name_(schema.name()), tally_(tally(schema.name())), left_(left_matrix(schema.name())), mixed_(takes_cpu_tensors(schema.name())), draws_(draws_without_generator(schema.name())), returns_(arguments_of_results(schema)) {
    for (const auto& argument : schema.arguments()) {
      Argument info;
      info.kind = kind_of(argument.real_type());
      info.write = argument.alias_info() && argument.alias_info()->isWrite();
      info.out = info.write && argument.kwarg_only();
      arguments_.push_back(info);
    }
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    tally_.calls.fetch_add(1, std::memory_order_relaxed);
    const size_t count = arguments_.size(), base = stack->size() - count;
    c10::SmallVector<Pair, 6> pairs;
    c10::SmallVector<IValue, 4> originals(returns_.size());
    for (size_t r = 0; r < returns_.size(); ++r)
      if (returns_[r] >= 0) originals[r] = (*stack)[base + returns_[r]];
    std::optional<c10::Device> device;
    bool cpu_tensor = false;
    for (size_t i = 0; i < count; ++i) take(arguments_[i], (*stack)[base + i], pairs, device, cpu_tensor);
    if (!device) device = current_device();
    TORCH_CHECK(!cpu_tensor || pairs.empty(), "Expected all tensors to be on the same device, but found at least two devices, ",
                *device, " and cpu! (operator ", name_, ")");
    for (size_t i = 0; i < count; ++i)
      if (arguments_[i].kind == Argument::generator) {
        auto& value = (*stack)[base + i];
        auto given = value.isNone() ? std::nullopt : std::optional<at::Generator>(value.toGenerator());
        value = cpu_generator(given, *device);
      }
    const int64_t depth = left_ < 0 ? 0 : inner((*stack)[base + left_]);
    {
      std::optional<BorrowedGenerator> borrowed;
      if (draws_) borrowed.emplace(*device);
      at::AutoDispatchBelowADInplaceOrView below;
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    }
    write_back(pairs);
    const size_t first = stack->size() - returns_.size();
    for (size_t r = 0; r < returns_.size(); ++r) {
      auto& value = (*stack)[first + r];
      if (depth && value.isTensor()) tally_.flops.fetch_add(2 * depth * value.toTensor().numel(), std::memory_order_relaxed);
      if (returns_[r] >= 0 && !originals[r].isNone()) value = std::move(originals[r]);
      else give(value, pairs, *device);
    }
  }

 protected:
  void count(int64_t flops) {
    tally_.calls.fetch_add(1, std::memory_order_relaxed);
    tally_.flops.fetch_add(flops, std::memory_order_relaxed);
  }

 private:
  static int64_t inner(const IValue& matrix) { return matrix.isTensor() && matrix.toTensor().dim() ? matrix.toTensor().size(-1) : 0; }

  at::Tensor take_tensor(const Argument& info, const at::Tensor& t, c10::SmallVector<Pair, 6>& pairs, std::optional<c10::Device>& device,
                         bool& cpu_tensor) const {
    if (!on_npu(t)) {
      cpu_tensor |= t.defined() && t.dim() > 0 && (!mixed_ || pairs.empty());
      return t;
    }
    if (!device) device = t.device();
    if (!pairs.empty() && pairs[0].npu.device() != t.device())
      TORCH_CHECK(t.dim() == 0 || pairs[0].npu.dim() == 0, "Expected all tensors to be on the same device, but found at least two devices, ",
                  pairs[0].npu.device(), " and ", t.device(), "! (operator ", name_, ")");
    at::Tensor cpu = cpu_alias(t, info.out);
    pairs.push_back({t, cpu, info.write});
    return cpu;
  }

  void take(const Argument& info, IValue& value, c10::SmallVector<Pair, 6>& pairs, std::optional<c10::Device>& device, bool& cpu_tensor) const {
    if (value.isNone()) return;
    switch (info.kind) {
      case Argument::tensor: value = take_tensor(info, value.toTensor(), pairs, device, cpu_tensor); break;
      case Argument::tensors: {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : value.toTensorVector()) list.push_back(take_tensor(info, t, pairs, device, cpu_tensor));
        value = std::move(list);
        break;
      }
      case Argument::optional_tensors: {
        c10::List<std::optional<at::Tensor>> list;
        for (const auto& t : value.toOptionalTensorVector())
          list.push_back(t && t->defined() ? std::optional<at::Tensor>(take_tensor(info, *t, pairs, device, cpu_tensor)) : std::nullopt);
        value = std::move(list);
        break;
      }
      case Argument::device:
        device = value.toDevice();
        if (device->type() == c10::DeviceType::PrivateUse1) {
          if (!device->has_index()) device = current_device();
          value = c10::Device(c10::kCPU);
        }
        break;
      default: break;
    }
  }

  // What the CPU kernel did to the shape of an argument: `out=` that got memory of its own, or squeeze_, t_ and the like.
  static void write_back(c10::SmallVector<Pair, 6>& pairs) {
    for (auto& pair : pairs) {
      if (!pair.write) continue;
      const bool moved = pair.cpu.storage().data() != pair.npu.storage().data();
      if (moved) pair.npu.resize_(pair.cpu.sizes());
      if (!pair.cpu.sizes().equals(pair.npu.sizes()) || !pair.cpu.strides().equals(pair.npu.strides()))
        pair.npu.unsafeGetTensorImpl()->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(), pair.cpu.storage_offset());
      if (moved && pair.cpu.numel()) cpu_alias(pair.npu).copy_(pair.cpu);
    }
  }

  // A result over an argument's memory is a view of that argument; anything else moves to the device.
  at::Tensor give_tensor(const at::Tensor& t, c10::SmallVector<Pair, 6>& pairs, c10::Device device) const {
    if (!t.defined() || t.device().type() != c10::DeviceType::CPU || device.type() != c10::DeviceType::PrivateUse1) return t;
    TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided, "ascend-sim: ", name_, " makes a tensor of layout ", t.layout(), ", which is not simulated");
    for (auto& pair : pairs)
      if (t.storage().unsafeGetStorageImpl() == pair.cpu.storage().unsafeGetStorageImpl()) {
        if (t.unsafeGetTensorImpl() == pair.cpu.unsafeGetTensorImpl()) return pair.npu;
        if (t.dtype() == pair.npu.dtype() && !t.is_conj() && !t.is_neg())
          return at::as_strided(pair.npu, t.sizes(), t.strides(), t.storage_offset());
      }
    return to_npu(t, device);
  }

  void give(IValue& value, c10::SmallVector<Pair, 6>& pairs, c10::Device device) const {
    if (value.isTensor()) {
      value = give_tensor(value.toTensor(), pairs, device);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(give_tensor(t, pairs, device));
      value = std::move(list);
    }
  }

  std::string name_;
  Tally& tally_;
  int left_;  // see left_matrix
  bool mixed_, draws_;
  std::vector<Argument> arguments_;
  std::vector<int> returns_;
};

// A product with few rows, as in a decoding step, and one that is captured, which computes nothing on hardware and is zero here; every other one goes the common way.
class MatmulKernel final : public AtenKernel {
 public:
  explicit MatmulKernel(const c10::FunctionSchema& schema) : AtenKernel(schema), adds_(schema.name() == "aten::addmm") {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const size_t base = stack->size() - op.schema().arguments().size();
    const IValue* args = stack->data() + base;
    at::Tensor bias;
    if (adds_) {
      if (!plain(args[3]) || !plain(args[4])) return AtenKernel::operator()(op, keys, stack);  // beta, alpha
      bias = args[0].toTensor();
    }
    const at::Tensor left = args[adds_].toTensor(), right = args[adds_ + 1].toTensor();
    auto out = is_captured() ? zeros(left, right) : few_rows(left, right, bias);
    if (!out) out = many_rows(left, right, bias);
    if (!out) return AtenKernel::operator()(op, keys, stack);
    count(2 * left.size(1) * out->numel());
    stack->resize(base);
    stack->emplace_back(std::move(*out));
  }

 private:
  static std::optional<at::Tensor> zeros(const at::Tensor& left, const at::Tensor& right) {
    if (!is_product(left, right)) return std::nullopt;
    at::Tensor out = unwritten({left.size(0), right.size(1)}, {right.size(1), 1}, left.scalar_type(), left.device());
    std::memset(out.data_ptr(), 0, out.nbytes());
    return out;
  }

  static bool plain(const IValue& factor) { return factor.isScalar() && factor.toScalar().equal(1); }

  bool adds_;
};

// torch_npu differentiates some operators with npu kernels of its own. Here they differentiate as they do on the CPU, with npu tensors: either
// by PyTorch's formula or, for an operator composed of others (`composite`), by those. Without a gradient a composite runs in one piece.
class AutogradKernel final : public c10::OperatorKernel {
 public:
  AutogradKernel(c10::SafeKernelFunction of_cpu, bool composite) : of_cpu_(std::move(of_cpu)), composite_(composite) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (composite_ && !differentiates(*stack, op.schema().arguments().size()))
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), stack);
    else
      of_cpu_.callBoxed(op, keys, stack);
  }

 private:
  static bool differentiates(const Stack& stack, size_t count) {
    if (!at::GradMode::is_enabled()) return false;
    return std::any_of(stack.end() - count, stack.end(), [](const IValue& value) {
      if (value.isTensor()) return value.toTensor().defined() && value.toTensor().requires_grad();
      if (!value.isTensorList()) return false;
      auto list = value.toTensorVector();
      return std::any_of(list.begin(), list.end(), [](const at::Tensor& t) { return t.requires_grad(); });
    });
  }

  c10::SafeKernelFunction of_cpu_;
  bool composite_;
};

// ---- operators that cross devices ---------------------------------------------------------------------------------------------------------

at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool) {
  static Tally& mine = tally("aten::copy_");
  mine.calls.fetch_add(1, std::memory_order_relaxed);
  at::AutoDispatchBelowADInplaceOrView below;
  cpu_alias(self).copy_(cpu_alias(from));
  return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  cpu_alias(to).copy_(cpu_alias(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor to_copy(const at::Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout, std::optional<at::Device> device,
                   std::optional<bool> pin_memory, bool, std::optional<at::MemoryFormat> format) {
  static Tally& mine = tally("aten::_to_copy");
  mine.calls.fetch_add(1, std::memory_order_relaxed);
  at::AutoDispatchBelowADInplaceOrView below;
  at::Device target = device.value_or(self.device());
  at::Tensor source = cpu_alias(self);
  if (target.type() != c10::DeviceType::PrivateUse1)
    return at::_to_copy(source, dtype, layout, target, pin_memory, false, format);
  if (!target.has_index()) target = current_device();
  if (dtype.value_or(self.scalar_type()) != self.scalar_type() || format.value_or(at::MemoryFormat::Preserve) != at::MemoryFormat::Preserve)
    source = at::_to_copy(source, dtype, std::nullopt, std::nullopt, std::nullopt, false, format);
  return to_npu(source, target);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  static Tally& mine = tally("aten::_local_scalar_dense");
  mine.calls.fetch_add(1, std::memory_order_relaxed);
  return at::_local_scalar_dense(cpu_alias(self));
}

// torch_npu's own, which know its storages.
const std::set<std::string>& kept() {
  static const std::set<std::string> names = {
      "aten::empty.memory_format", "aten::empty_strided", "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
      "aten::set_.source_Tensor", "aten::set_", "aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::resize_", "aten::record_stream",
      "aten::is_pinned", "aten::_pin_memory", "aten::unfold", "aten::view_as_real", "aten::view_as_complex", "aten::is_set_to"};
  return names;
}

// Kernels of their own, below.
bool crosses_devices(const std::string& full_name) {
  static const std::set<std::string> names = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_to_copy",
                                              "aten::_local_scalar_dense"};
  return names.count(full_name) > 0;
}

std::string full_name(const c10::OperatorName& name) { return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name; }

void install() {
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    auto op = dispatcher.findSchema(name);
    if (!op) continue;
    const bool npu = op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1);
    const bool composite = op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
    const bool formula = composite || op->hasKernelForDispatchKey(c10::DispatchKey::Autograd);
    if (op->hasKernelForDispatchKey(c10::DispatchKey::AutogradPrivateUse1) || (npu && composite))
      autograd.impl(full_name(name).c_str(),
                    formula ? torch::CppFunction::makeFromBoxedFunctor(std::make_unique<AutogradKernel>(
                                  op->getComputedKernelForDispatchKey(c10::DispatchKey::AutogradCPU), composite))
                            : torch::CppFunction::makeFallthrough());
    const bool cpu = op->hasKernelForDispatchKey(c10::DispatchKey::CPU) && !composite;  // a composite needs no kernel where torch_npu has none
    if (kept().count(full_name(name)) || crosses_devices(full_name(name)) || !(npu || cpu)) continue;
    const std::string full = full_name(name);
    aten.impl(full.c_str(), full == "aten::mm" || full == "aten::matmul" || full == "aten::addmm"
                                ? torch::CppFunction::makeFromBoxedFunctor(std::make_unique<MatmulKernel>(op->schema()))
                                : torch::CppFunction::makeFromBoxedFunctor(std::make_unique<AtenKernel>(op->schema())));
  }
  aten.impl("copy_", TORCH_FN(copy_));
  aten.impl("_copy_from", TORCH_FN(copy_from));
  aten.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  aten.impl("_to_copy", TORCH_FN(to_copy));
  aten.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
}

std::tuple<std::vector<std::string>, std::vector<int64_t>, std::vector<int64_t>> counts() {
  std::lock_guard<std::mutex> lock(tally_mutex);
  std::vector<std::string> names;
  std::vector<int64_t> calls, flops;
  for (auto& [name, entry] : tallies())
    if (entry.calls.load()) {
      names.push_back(name);
      calls.push_back(entry.calls.load());
      flops.push_back(entry.flops.load());
    }
  return {names, calls, flops};
}

void reset_counts() {
  std::lock_guard<std::mutex> lock(tally_mutex);
  for (auto& [name, entry] : tallies()) entry.calls = 0, entry.flops = 0;
}

void count(std::string name, int64_t flops) {
  auto& entry = tally(name);
  entry.calls.fetch_add(1, std::memory_order_relaxed);
  entry.flops.fetch_add(flops, std::memory_order_relaxed);
}

at::Tensor alias_of(const at::Tensor& t) { return owning_alias(t); }

}  // namespace

void install_comm();
void install_kernels();
void install_memory();
void install_streams(const std::set<std::string>& immediate);
void install_graph(const std::set<std::string>& immediate);

TORCH_LIBRARY(ascend_sim, m) {
  m.def("install() -> ()", [] {
    const Silence silence;
    install();
    install_memory();
    install_kernels();
    install_comm();
    auto immediate = kept();
    immediate.insert({"aten::empty_like", "aten::new_empty_strided", "aten::empty_with_format", "aten::unsafe_empty_with_format"});
    install_streams(immediate);
    install_graph(immediate);
  });
  m.def("counts() -> (str[], int[], int[])", &counts);
  m.def("reset_counts() -> ()", &reset_counts);
  m.def("count(str name, int flops) -> ()", &count);
  m.def("strict() -> bool", &strict);
  // Both directions over the same memory, for reference kernels written in Python.
  m.def("alias(Tensor t) -> Tensor", &alias_of);
  m.def("to_npu(Tensor t, Device device) -> Tensor", &to_npu);
}

}  // namespace ascend_sim
