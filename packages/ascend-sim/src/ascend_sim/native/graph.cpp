// SPDX-License-Identifier: Apache-2.0
//
// What a graph records of the operators (runtime/graph.c keeps the graph itself). When the first capture of the process begins, every kernel for
// npu tensors is put after one that looks where the call belongs: a call on a stream that is captured runs once, which gives its results their
// shapes, and is kept with its arguments; a replay runs the kernel again and writes into the very tensors that the capture returned. No kernel
// knows of this, but for products, which take their time: in a capture they are zero. The graph owns no memory, as on hardware: tensors that are
// freed during the capture give their memory to later ones.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch_npu/csrc/core/NPUStorageImpl.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include "deferred.h"
#include "graph.h"

namespace ascend_sim {
namespace {

using c10::IValue;
using torch::jit::Stack;

thread_local bool inside = false;  // of an operator that is captured or replayed: what its kernel calls is part of it
thread_local bool captured = false;  // what this thread runs
std::atomic<int64_t> replayed{0};
std::set<std::string> immediate_names;

// An npu tensor over the same memory that does not keep it. Numbers on the host are kept as they are now.
at::Tensor unowned(const at::Tensor& t) {
  if (!on_npu(t)) return t.dim() ? t : t.clone();
  at::Tensor out = at::_ops::empty_strided::redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::SymInt(0), c10::SymInt(1), t.scalar_type(),
                                                       at::kStrided, t.device(), false);
  auto* impl = out.unsafeGetTensorImpl();
  auto* storage = out.storage().unsafeGetStorageImpl();
  const auto& from = t.storage();
  storage->set_data_ptr_noswap(c10::DataPtr(const_cast<void*>(from.data()), t.device()));
  storage->set_nbytes(from.nbytes());
  static_cast<torch_npu::NPUStorageImpl*>(storage)->npu_desc_ = static_cast<const torch_npu::NPUStorageImpl*>(from.unsafeGetStorageImpl())->npu_desc_;
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (t.is_conj()) impl->_set_conj(true);
  if (t.is_neg()) impl->_set_neg(true);
  return out;
}

// Where a tensor was and is: a graph's own, and what a kernel has just returned for it.
void write(const at::Tensor& to, const at::Tensor& from) {
  if (!to.defined() || !to.numel() || to.const_data_ptr() == from.const_data_ptr()) return;
  cpu_alias(to).copy_(cpu_alias(from));
}

class Recorder;

// One operator of a graph.
struct Operator {
  const Recorder* recorder;
  c10::OperatorHandle op;
  c10::DispatchKeySet keys;
  Stack arguments;
  std::vector<std::vector<at::Tensor>> results;  // for each of them its tensors
};

using Update = std::pair<std::shared_ptr<Operator>, Stack>;  // its new arguments

class Recorder final : public c10::OperatorKernel {
 public:
  explicit Recorder(const c10::OperatorHandle& op)
      : inner_(op.getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1)), name_(op.schema().name()) {
    static const std::set<std::string> lists = {"actual_seq_lengths", "actual_seq_lengths_kv", "actual_seq_qlen", "actual_seq_kvlen", "group_list"};
    const auto& arguments = op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = arguments[i].alias_info();
      writes_ |= alias && alias->isWrite();
      random_ |= arguments[i].name() == "generator";
      if (lists.count(arguments[i].name())) host_lists_.push_back(i);
      if (arguments[i].name() == "non_blocking") non_blocking_ = static_cast<int>(i);
      if (arguments[i].name() == "output_size") output_size_ = static_cast<int>(i);
    }
    random_ |= draws_without_generator(name_);
    collective_ = name_.starts_with("c10d::");
    writes_ |= !name_.starts_with("aten::");  // torch_npu's schemas do not always say what is written
    reads_ = op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape) || name_ == "aten::_local_scalar_dense";
    indexes_ = name_ == "aten::index" || name_ == "aten::index_put" || name_ == "aten::index_put_" || name_ == "aten::_index_put_impl_";
    copies_ = name_ == "aten::copy_" || name_ == "aten::_copy_from" || name_ == "aten::_to_copy" || name_ == "aten::_copy_from_and_resize";
    // These infer shapes and reserve memory; no task of theirs reaches the device.
    host_only_ = name_.starts_with("npu::_npu_fused_infer_attention_score");
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (inside || !ascend_sim_graph_active()) return inner_.callBoxed(op, keys, stack);
    const aclrtStream stream = c10_npu::getCurrentNPUStream().stream(false);
    switch (ascend_sim_graph_place(stream)) {
      case PLACE_RUNS: check(ascend_sim_graph_settle(stream)); return inner_.callBoxed(op, keys, stack);
      case PLACE_CAPTURED: return capture(stream, op, keys, stack);
      case PLACE_UPDATES: return update(stream, op, keys, stack);
      case PLACE_STRAYS: refuse(stream, " runs on a stream that has not joined the capture: let it wait for an event of the stream where the capture began");
    }
  }

  // Run the kernel; a collective is waited for.
  void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    const AtOnce at_once;
    const at::AutoDispatchBelowADInplaceOrView below;
    const While guard(inside);
    inner_.callBoxed(op, keys, stack);
    if (collective_ && !stack->empty() && stack->back().isCustomClass()) stack->back().toCustomClass<c10d::Work>()->wait();
  }

  const std::string& name() const { return name_; }

 private:
  // A flag that is set as long as this lives.
  struct While {
    explicit While(bool& flag) : flag(flag) { flag = true; }
    ~While() { flag = false; }
    bool& flag;
  };

  [[noreturn]] void refuse(aclrtStream stream, const std::string& why) const {
    const std::string reason = name_ + why;
    ascend_sim_graph_invalidate(stream, reason.c_str());
    TORCH_CHECK(false, "while a graph is captured: ", reason);
  }

  // What hardware cannot capture, or would capture with the numbers of today.
  void check_rules(aclrtStream stream, const Stack& stack, size_t base) const {
    if (reads_ && !indexes_ && !(output_size_ >= 0 && !stack[base + output_size_].isNone()))
      refuse(stream, " needs numbers of the device on the host");
    if (indexes_)
      for (const auto& t : stack[base + 1].toOptionalTensorVector())
        if (t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte))
          refuse(stream, " with a mask needs numbers of the device on the host");
    if (random_) refuse(stream, " draws random numbers, which is not simulated in graphs");
    if (copies_) check_copy(stream, stack, base);
    if (!ascend_sim_graph_in_group(stream))
      for (size_t i : host_lists_)
        if (stack[base + i].isList() && stack[base + i].toListRef().size())
          refuse(stream, " takes a list of lengths on the host, which would stay as it is now: capture it in a task group (torch.npu.graph(..., "
                         "auto_dispatch_capture=True))");
    if (name_ == "c10d::alltoall_base_" && !stack[base + 4].toIntVector().empty())
      refuse(stream, " takes sizes of splits on the host, which would stay as they are now");
  }

  void check_copy(aclrtStream stream, const Stack& stack, size_t base) const {
    const at::Tensor first = stack[base].toTensor();
    at::Tensor host;
    bool to_host = false;
    if (name_ == "aten::_to_copy") {
      const IValue& device = stack[base + 3];
      const bool npu = device.isNone() ? on_npu(first) : device.toDevice().type() == c10::DeviceType::PrivateUse1;
      if (npu == on_npu(first)) return;
      to_host = !npu;
      if (!to_host) host = first;
    } else {
      const at::Tensor second = stack[base + 1].toTensor();
      if (on_npu(first) == on_npu(second)) return;
      host = on_npu(first) ? second : first;
    }
    if (non_blocking_ < 0 || !stack[base + non_blocking_].toBool())
      refuse(stream, " between host and device waits for the device: use pinned memory and non_blocking=True");
    if (!to_host && host.dim() && !host.is_pinned()) refuse(stream, " between host and device needs pinned memory");
    if (!to_host && !host.dim() && !host.is_pinned()) refuse(stream, " of a number from the host needs pinned memory, or a fill of the tensor");
  }

  void capture(aclrtStream stream, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    const size_t base = stack->size() - op.schema().arguments().size();
    if (host_only_) return run(op, keys, stack);
    check_rules(stream, *stack, base);
    const Stack given(stack->begin() + base, stack->end());
    try {
      const While guard(captured);
      run(op, keys, stack);
    } catch (const c10::Error& error) {
      ascend_sim_graph_invalidate(stream, (name_ + ": " + error.what_without_backtrace()).c_str());
      throw;
    } catch (const std::exception& error) {
      ascend_sim_graph_invalidate(stream, (name_ + ": " + error.what()).c_str());
      throw;
    }
    if (!writes_ && !collective_ && only_views(given, *stack, base)) return;
    auto node = std::make_shared<Operator>(Operator{this, op, keys, {}, {}});
    for (const IValue& value : given) node->arguments.push_back(each_tensor(value, unowned));
    for (size_t r = base; r < stack->size() && !collective_; ++r) node->results.push_back(tensors_of((*stack)[r]));
    ascend_sim_graph_add(stream, replay, drop, new std::shared_ptr<Operator>(node));
  }

  void update(aclrtStream stream, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    if (host_only_) return run(op, keys, stack);
    const size_t count = op.schema().arguments().size(), base = stack->size() - count;
    const auto* found = static_cast<std::shared_ptr<Operator>*>(ascend_sim_graph_next(stream));
    TORCH_CHECK(found, name_, ": the task group that is updated has no more operators");
    const auto node = *found;  // kept until the update has run, for the graph may be gone by then
    TORCH_CHECK(node->op == op, name_, ": the task group that is updated has ", node->recorder->name(), " here");
    auto* fresh = new Update(node, {});
    for (size_t i = base; i < stack->size(); ++i) fresh->second.push_back(each_tensor((*stack)[i], unowned));
    stack->resize(base);
    for (const auto& result : node->results) {
      if (op.schema().returns()[stack->size() - base].type()->kind() == c10::TypeKind::ListType) stack->emplace_back(c10::List<at::Tensor>(result));
      else stack->emplace_back(result.empty() ? at::Tensor() : result[0]);
    }
    if (ascend_sim_late(stream)) ascend_sim_enqueue(stream, put, fresh);
    else put(fresh);
  }

  static aclError put(void* argument) {
    const std::unique_ptr<Update> fresh(static_cast<Update*>(argument));
    fresh->first->arguments = std::move(fresh->second);
    return ACL_SUCCESS;
  }

  static bool only_views(const Stack& given, const Stack& stack, size_t base) {
    std::set<const void*> storages;
    for (const IValue& value : given)
      each_tensor(value, [&](const at::Tensor& t) { return storages.insert(t.storage().unsafeGetStorageImpl()), t; });
    bool views = stack.size() > base;
    for (size_t r = base; r < stack.size(); ++r) {
      views &= stack[r].isTensor() || stack[r].isTensorList();
      each_tensor(stack[r], [&](const at::Tensor& t) { return views &= storages.count(t.storage().unsafeGetStorageImpl()) > 0, t; });
    }
    return views;
  }

  static std::vector<at::Tensor> tensors_of(const IValue& value) {
    std::vector<at::Tensor> out;
    if (value.isTensor()) out.push_back(value.toTensor().defined() ? unowned(value.toTensor()) : at::Tensor());
    if (value.isTensorList())
      for (const at::Tensor& t : value.toTensorVector()) out.push_back(t.defined() ? unowned(t) : t);
    return out;
  }

  static aclError replay(void* argument) {
    const Operator& node = **static_cast<const std::shared_ptr<Operator>*>(argument);
    const int64_t before = calls_of_thread;
    const WithoutPython without_python;
    try {
      Stack stack = node.arguments;
      node.recorder->run(node.op, node.keys, &stack);
      for (size_t r = 0; r < node.results.size(); ++r) {
        if (stack[r].isTensor() && !node.results[r].empty()) write(node.results[r][0], stack[r].toTensor());
        if (stack[r].isTensorList()) {
          const auto list = stack[r].toTensorVector();
          for (size_t i = 0; i < list.size(); ++i) write(node.results[r][i], list[i]);
        }
      }
    } catch (const c10::Error& error) {
      return ascend_sim_fail(TASK_FAILED, ("the replay of a graph failed in " + node.recorder->name() + ": " + error.what_without_backtrace()).c_str());
    } catch (const std::exception& error) {
      return ascend_sim_fail(TASK_FAILED, ("the replay of a graph failed in " + node.recorder->name() + ": " + error.what()).c_str());
    }
    replayed.fetch_add(calls_of_thread - before, std::memory_order_relaxed);
    return ACL_SUCCESS;
  }

  static void drop(void* argument) { delete static_cast<std::shared_ptr<Operator>*>(argument); }

  c10::SafeKernelFunction inner_;
  std::string name_;
  bool writes_ = false, random_ = false, collective_ = false, reads_ = false, indexes_ = false, copies_ = false, host_only_ = false;
  int non_blocking_ = -1, output_size_ = -1;
  std::vector<size_t> host_lists_;
};

void install_recorder() {
  const Silence silence;
  replace_kernels(immediate_names, [](const std::string&, const c10::OperatorHandle& op) {
    return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Recorder>(op));
  });
}

// Memory that a program asked for, without contents, while a graph was captured.
struct Blank {
  at::Tensor memory;
  c10::weak_intrusive_ptr<c10::StorageImpl> owner;
};

// Once its owner is gone, other tensors and other graphs of the pool use the memory between two replays.
aclError make_blank(void* argument) {
  const auto* blank = static_cast<const Blank*>(argument);
  if (blank->owner.expired()) poison(blank->memory);
  return ACL_SUCCESS;
}

std::tuple<int64_t, int64_t, int64_t> counts() {
  int64_t replays = 0, updates = 0;
  ascend_sim_graph_counts(&replays, &updates);
  return {replays, updates, replayed.load()};
}

void reset_counts() {
  ascend_sim_graph_reset_counts();
  replayed = 0;
}

}  // namespace

bool is_captured() { return captured; }

void record_blank(const at::Tensor& t) {
  if (inside || !ascend_sim_graph_active() || !on_npu(t) || !t.numel()) return;
  const aclrtStream stream = c10_npu::getCurrentNPUStream().stream(false);
  if (ascend_sim_graph_place(stream) != PLACE_CAPTURED) return;
  auto* blank = new Blank{unowned(t), t.storage().getWeakStorageImpl()};
  ascend_sim_graph_add(stream, make_blank, [](void* argument) { delete static_cast<Blank*>(argument); }, blank);
}

void install_graph(const std::set<std::string>& immediate) {
  immediate_names = immediate;
  ascend_sim_graph_before_capture([] {
    static const bool installed = (install_recorder(), true);
    (void)installed;
    ascend_sim_immediate(c10_npu::getDefaultNPUStream(c10_npu::getCurrentNPUStream().device_index()).stream(false));
  });
}

TORCH_LIBRARY_FRAGMENT(ascend_sim, m) {
  m.def("graph_counts() -> (int, int, int)", &counts);
  m.def("reset_graph_counts() -> ()", &reset_counts);
}

}  // namespace ascend_sim
