// SPDX-License-Identifier: Apache-2.0
//
// ASCEND_SIM_STREAMS=lazy: an operator on a stream that is not the default one is kept as a task, and runs when something waits for it
// (runtime/streams.c). Its results are allocated, and poisoned, at once: whoever reads them without having waited reads NaN. Their shapes come from
// the operator's meta kernel; one that has none, or whose shapes depend on numbers, runs at once, and only its results arrive late. Collectives
// start at once too, for other ranks wait for them, on any stream; their results arrive when their handle is waited for, as from HCCL's own streams.
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/custom_class.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include "alias.h"
#include "deferred.h"
#include "streams.h"

namespace ascend_sim {
namespace {

using c10::IValue;
using torch::jit::Stack;
using Tensors = std::vector<at::Tensor>;

thread_local bool in_task = false;

// The current stream where its work is late: a side stream, outside of tasks. Else null.
aclrtStream side_stream() {
  if (in_task) return nullptr;
  const auto current = c10_npu::getCurrentNPUStream(), usual = c10_npu::getDefaultNPUStream(current.device_index());
  ascend_sim_immediate(usual.stream(false));
  return current == usual ? nullptr : current.stream(false);
}

// Append a task to a stream.
uint64_t enqueue(aclrtStream stream, std::function<void()> work) {
  auto* kept = new std::function<void()>(std::move(work));
  return ascend_sim_enqueue(
      stream,
      [](void* argument) -> aclError {
        const std::unique_ptr<std::function<void()>> task(static_cast<std::function<void()>*>(argument));
        const bool outer = std::exchange(in_task, true);
        aclError error = ACL_SUCCESS;
        const WithoutPython without_python;
        try {
          at::AutoDispatchBelowADInplaceOrView below;
          (*task)();
        } catch (const std::exception& failure) {
          error = ascend_sim_fail(TASK_FAILED, (std::string("an operator of a side stream failed: ") + failure.what()).c_str());
        }
        in_task = outer;
        return error;
      },
      kept);
}

// The same memory for a task: a tensor object of its own, which no Python object belongs to and whose shape stays.
at::Tensor shared(const at::Tensor& t) {
  return at::Tensor(t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true));
}

at::Tensor like(const at::Tensor& t, at::Device device) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(device).pinned_memory(false));
}

// Poison a tensor's own part of its storage.
void poison_part(const at::Tensor& t) { cpu_alias(t).copy_(poisoned_on_cpu(t.sizes(), t.scalar_type())); }

void write(const at::Tensor& to, const at::Tensor& from) { cpu_alias(to).copy_(cpu_alias(from)); }

// Where a call's results are to be found once its task has run.
struct Results {
  std::vector<IValue> values;                            // what the caller gets
  std::vector<std::pair<size_t, at::Tensor>> late;       // the place of a tensor among the results, and its memory
  std::vector<std::pair<size_t, Tensors>> late_lists;
};

void arrive(const Results& wanted, const Stack& got) {
  for (const auto& [r, to] : wanted.late) write(to, got[r].toTensor());
  for (const auto& [r, to] : wanted.late_lists) {
    const Tensors from = got[r].toTensorVector();
    for (size_t i = 0; i < to.size(); ++i) write(to[i], from[i]);
  }
}

// Results as `of` has them, on the device and unwritten; none where one of them is not a tensor.
std::optional<Results> unwritten(const Stack& of, const std::vector<IValue>& given, at::Device device) {
  Results out;
  for (size_t r = 0; r < of.size(); ++r) {
    if (!given[r].isNone()) {
      out.values.push_back(given[r]);
    } else if (of[r].isTensor()) {
      if (!of[r].toTensor().defined()) { out.values.push_back(of[r]); continue; }
      out.late.emplace_back(r, like(of[r].toTensor(), device));
      out.values.emplace_back(out.late.back().second);
    } else if (of[r].isTensorList()) {
      Tensors list;
      for (const at::Tensor& t : of[r].toTensorVector()) list.push_back(like(t, device));
      out.values.emplace_back(c10::List<at::Tensor>(list));
      out.late_lists.emplace_back(r, std::move(list));
    } else {
      return std::nullopt;
    }
  }
  for (auto& [r, t] : out.late) t = shared(t);
  for (auto& [r, list] : out.late_lists)
    for (at::Tensor& t : list) t = shared(t);
  return out;
}

class Late : public c10::OperatorKernel {
 public:
  explicit Late(const c10::OperatorHandle& op) : inner_(op.getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1)), name_(op.schema().name()) {
    const auto& schema = op.schema();
    written_ = arguments_of_results(schema);
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto& argument = schema.arguments()[i];
      at_once_ |= argument.name() == "generator";
      if (argument.kwarg_only() && argument.alias_info() && argument.alias_info()->isWrite()) outs_.push_back(i);
    }
    // Ranks wait for each other in these, and numbers reach the host in those.
    at_once_ |= name_.starts_with("npu::npu_mm_") || name_.starts_with("npu::npu_moe_distribute_");
    host_ = op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape) || name_ == "aten::_local_scalar_dense";
    copies_ = name_ == "aten::copy_" || name_ == "aten::_copy_from" || name_ == "aten::_to_copy";
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const aclrtStream side = side_stream();
    if (!side) return inner_.callBoxed(op, keys, stack);
    const size_t base = stack->size() - op.schema().arguments().size();
    if (host_ || (copies_ && waits_for_host(*stack, base))) return now(side, op, keys, stack);
    if (copies_ && crosses(*stack, base)) return copy(side, op, keys, stack, base);
    std::vector<IValue> given;
    for (int written : written_) given.push_back(written < 0 ? IValue() : (*stack)[base + written]);
    const at::Device device = c10_npu::getCurrentNPUStream().device();
    std::optional<Results> results;
    bool view = false;
    const bool grows = std::any_of(outs_.begin(), outs_.end(), [&](size_t i) { return (*stack)[base + i].isTensor() && !(*stack)[base + i].toTensor().numel(); });
    if (!at_once_ && !grows) results = expected(op, *stack, base, given, device, view);
    if (view) return inner_.callBoxed(op, keys, stack);
    if (!results) return late_results(side, op, keys, stack, base, given, device);
    keep(side, op, keys, stack, base, std::move(*results));
  }

 private:
  // Everything before, then this, as the host asks for it.
  void now(aclrtStream side, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    check(aclrtSynchronizeStream(side));
    inner_.callBoxed(op, keys, stack);
  }

  void late_results(aclrtStream side, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack, size_t base, const std::vector<IValue>& given,
                    at::Device device) const {
    now(side, op, keys, stack);
    const Stack got(stack->begin() + base, stack->end());
    auto results = unwritten(got, given, device);
    if (!results) return;
    enqueue(side, [results = *results, got] { arrive(results, got); });
    stack->resize(base);
    for (IValue& value : results->values) stack->push_back(std::move(value));
  }

  void keep(aclrtStream side, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack, size_t base, Results results) const {
    Stack arguments;
    for (size_t i = base; i < stack->size(); ++i) arguments.push_back(each_tensor((*stack)[i], shared));
    stack->resize(base);
    for (IValue& value : results.values) stack->push_back(std::move(value));
    results.values.clear();
    enqueue(side, [this, op, keys, arguments = std::move(arguments), results = std::move(results)]() mutable {
      inner_.callBoxed(op, keys, &arguments);
      arrive(results, arguments);
    });
  }

  // The results that the call will have, by the operator's meta kernel; none where that cannot be said. `view`: it makes views, and reads nothing.
  std::optional<Results> expected(const c10::OperatorHandle& op, const Stack& stack, size_t base, const std::vector<IValue>& given, at::Device device,
                                  bool& view) const {
    const bool fresh = std::any_of(given.begin(), given.end(), [](const IValue& value) { return value.isNone(); });
    if (!fresh) return unwritten(Stack(given.begin(), given.end()), given, device);
    std::vector<const c10::StorageImpl*> read;
    const auto to_meta = [&](const at::Tensor& t) {
      if (!on_npu(t) && t.dim() == 0) return t;  // a number
      at::Tensor out = like(t, at::kMeta);
      read.push_back(out.storage().unsafeGetStorageImpl());
      return out;
    };
    Stack of;
    try {
      at::AutoDispatchBelowADInplaceOrView below;
      for (size_t i = base; i < stack.size(); ++i)
        of.push_back(stack[i].isDevice() ? IValue(at::Device(at::kMeta)) : each_tensor(stack[i], to_meta));
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &of);
    } catch (const std::exception&) {
      return std::nullopt;  // what is wrong shows when it runs
    }
    for (const IValue& value : of)
      each_tensor(value, [&](const at::Tensor& t) {
        view |= std::find(read.begin(), read.end(), t.storage().unsafeGetStorageImpl()) != read.end();
        return t;
      });
    if (std::any_of(given.begin(), given.end(), [](const IValue& value) { return !value.isNone(); })) view = false;
    return view ? std::nullopt : unwritten(of, given, device);
  }

  static bool crosses(const Stack& stack, size_t base) { return on_npu(stack[base].toTensor()) != npu_target(stack, base); }

  static bool npu_target(const Stack& stack, size_t base) {
    const IValue &second = stack[base + 1], &first = stack[base];
    if (second.isTensor()) return on_npu(second.toTensor());
    const IValue& device = stack[base + 3];  // aten::_to_copy(self, dtype, layout, device, pin_memory, non_blocking, memory_format)
    return device.isNone() ? on_npu(first.toTensor()) : device.toDevice().type() == c10::DeviceType::PrivateUse1;
  }

  // A copy between host and device that returns when it is done: a blocking one, or one from or to memory that is not pinned.
  bool waits_for_host(const Stack& stack, size_t base) const {
    if (!crosses(stack, base)) return false;
    const bool to_copy = name_ == "aten::_to_copy";
    if (!stack[base + (to_copy ? 5 : 2)].toBool()) return true;
    if (to_copy) return npu_target(stack, base) && !stack[base].toTensor().is_pinned();
    const at::Tensor first = stack[base].toTensor(), second = stack[base + 1].toTensor();
    return !(on_npu(first) ? second : first).is_pinned();
  }

  // An asynchronous copy between host and device. What arrives on the host is poisoned until it does.
  void copy(aclrtStream side, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack, size_t base) const {
    Results results;
    if (name_ != "aten::_to_copy") {
      const bool from = name_ == "aten::_copy_from";
      const at::Tensor to = (*stack)[base + from].toTensor();
      if (!on_npu(to)) poison_part(to);
      results.values.emplace_back(to);
    } else {
      const at::Tensor self = (*stack)[base].toTensor();
      const at::Device target = (*stack)[base + 3].toDevice();
      const IValue& dtype = (*stack)[base + 1];
      const auto options = self.options().dtype(dtype.isNone() ? self.scalar_type() : dtype.toScalarType()).pinned_memory(false);
      at::Tensor out = at::empty_like(self, options.device(target.type() == c10::DeviceType::PrivateUse1 ? c10_npu::getCurrentNPUStream().device() : target));
      if (!on_npu(out)) poison_part(out);
      results.values.emplace_back(out);
      results.late.emplace_back(0, shared(out));
    }
    keep(side, op, keys, stack, base, std::move(results));
  }

  c10::SafeKernelFunction inner_;
  std::string name_;
  std::vector<int> written_;  // for each result the argument that it is, or -1
  std::vector<size_t> outs_;  // arguments `out=`: an empty one grows
  bool at_once_ = false, host_ = false, copies_ = false;
};

// The handle of a collective: its results are there when it has been waited for.
class LateWork final : public c10d::Work {
 public:
  LateWork(aclrtStream stream, uint64_t position, c10::intrusive_ptr<c10d::Work> inner) : stream_(stream), position_(position), inner_(std::move(inner)) {}

  bool isCompleted() override {
    if (!inner_->isCompleted()) return false;
    check(ascend_sim_wait(nullptr, stream_, position_));
    return true;
  }

  bool wait(std::chrono::milliseconds) override {
    check(ascend_sim_wait(side_stream(), stream_, position_));
    return true;
  }

  void synchronize() override { wait(kNoTimeout); }

 private:
  aclrtStream stream_;
  uint64_t position_;
  c10::intrusive_ptr<c10d::Work> inner_;
};

class LateCollective final : public c10::OperatorKernel {
 public:
  explicit LateCollective(const c10::OperatorHandle& op) : inner_(op.getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) {
    const std::string& name = op.schema().name();
    sends_ = name == "c10d::send" || op.schema().arguments()[0].type()->kind() == c10::TypeKind::ClassType;
    stays_ = name == "c10d::broadcast_" || name == "c10d::reduce_";
    message_ = name == "c10d::send" || name.starts_with("c10d::recv");
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (in_task) return inner_.callBoxed(op, keys, stack);
    if (const aclrtStream side = side_stream()) check(aclrtSynchronizeStream(side));  // what it reads
    const size_t base = stack->size() - op.schema().arguments().size();
    const IValue first = (*stack)[base];
    const aclrtStream own = own_stream(*stack, base);
    Tensors operands;  // kept until the handle has been waited for, as HCCL keeps them
    for (size_t i = base; i < stack->size(); ++i)
      (*stack)[i] = each_tensor((*stack)[i], [&](const at::Tensor& t) {
        if (!on_npu(t)) return t;
        operands.push_back(shared(t));
        return to_npu(cpu_alias(t), t.device());
      });
    Tensors to, from;
    if (!sends_) {
      each_tensor(first, [&](const at::Tensor& t) { return to.push_back(shared(t)), t; });
      each_tensor((*stack)[base], [&](const at::Tensor& t) { return from.push_back(shared(t)), t; });
    }
    inner_.callBoxed(op, keys, stack);
    if (stack->size() == base || !stack->back().isCustomClass()) return;
    auto work = stack->back().toCustomClass<c10d::Work>();
    if (!stays_)
      for (const at::Tensor& t : to) poison_part(t);
    const uint64_t position = enqueue(own, [work, operands, to, from] {
      work->wait();
      for (size_t i = 0; i < to.size(); ++i) write(to[i], from[i]);
    });
    stack->back() = c10::intrusive_ptr<c10d::Work>(c10::make_intrusive<LateWork>(own, position, work));
    if (stack->size() == base + 2) (*stack)[base] = first;
  }

 private:
  // As HCCL has it: a stream for each group, and one for the messages to and from each rank.
  aclrtStream own_stream(const Stack& stack, size_t base) const {
    std::string key;
    for (size_t i = base; i < stack.size(); ++i) {
      if (stack[i].isCustomClass() && *stack[i].type() == *c10::getCustomClassType<c10::intrusive_ptr<c10d::ProcessGroup>>())
        key += stack[i].toCustomClass<c10d::ProcessGroup>()->getGroupName();
      if (message_ && stack[i].isInt()) key += "/" + std::to_string(stack[i].toInt());
    }
    static std::mutex mutex;
    static std::map<std::string, aclrtStream> streams;
    std::lock_guard<std::mutex> lock(mutex);
    aclrtStream& stream = streams[key];
    if (!stream) check(aclrtCreateStream(&stream));
    return stream;
  }

  c10::SafeKernelFunction inner_;
  bool sends_ = false, stays_ = false, message_ = false;
};

bool lazy() {
  const char* text = std::getenv("ASCEND_SIM_STREAMS");
  return text && std::string(text) == "lazy";
}

}  // namespace

AtOnce::AtOnce() : outer_(std::exchange(in_task, true)) {}
AtOnce::~AtOnce() { in_task = outer_; }

void install_streams(const std::set<std::string>& immediate) {
  if (!lazy()) return;
  replace_kernels(immediate, [](const std::string& space, const c10::OperatorHandle& op) {
    return space == "c10d" ? torch::CppFunction::makeFromBoxedFunctor(std::make_unique<LateCollective>(op))
                           : torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Late>(op));
  });
}

}  // namespace ascend_sim
