// SPDX-License-Identifier: Apache-2.0
//
// Collectives on npu tensors, over Gloo. Every c10d operator gets one boxed kernel: it replaces npu tensors by aliases that keep the memory
// alive (asynchronous work outlasts the call) and hands them to the CPU kernel of the same operator with the Gloo group that "hccl" uses.
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "alias.h"
#include "comm.h"

namespace ascend_sim {
namespace {

using c10::IValue;
using torch::jit::Stack;
using Group = c10d::ProcessGroup;

struct Traffic {
  int64_t calls = 0, bytes = 0;
};
std::mutex traffic_mutex;
std::map<std::pair<std::string, std::string>, Traffic>& traffic() {
  static std::map<std::pair<std::string, std::string>, Traffic> all;
  return all;
}

}  // namespace

void count_traffic(const std::string& name, const Group& group, int64_t bytes) {
  calls_of_thread += 1;
  const std::string& described = group.getGroupDesc();
  std::lock_guard<std::mutex> lock(traffic_mutex);
  auto& entry = traffic()[{name, described.empty() || described == "undefined" ? group.getGroupName() : described}];
  entry.calls += 1;
  entry.bytes += bytes;
}

c10::intrusive_ptr<Group> over_gloo(const c10::intrusive_ptr<Group>& group) {
  auto gloo = group->getBackend(c10::DeviceType::PrivateUse1);
  auto shadow = c10::make_intrusive<Group>(group->getRank(), group->getSize());
  shadow->setBackend(c10::DeviceType::CPU, Group::BackendType::GLOO, gloo);
  shadow->setGroupName(group->getGroupName());
  return shadow;
}

c10::intrusive_ptr<Group> group_named(const char* op, c10::string_view comm_name) {
  // SimulatedHCCL.get_hccl_comm_name (hccl.py): hccl_<name of the process group>_<ranks joined by ->
  static const char* remedy = "take the name from get_hccl_comm_name(rank)";
  const std::string name(comm_name);
  const size_t end = name.rfind('_');
  TORCH_CHECK(name.starts_with("hccl_") && end > 4, op, ": no HCCL communicator is named '", name, "' in this process; ", remedy);
  try {
    return c10d::resolve_process_group(name.substr(5, end - 5));
  } catch (const c10::Error&) {
    TORCH_CHECK(false, op, ": no HCCL communicator is named '", name, "' in this process; ", remedy);
  }
}

namespace {

IValue aliased(const IValue& value) {
  if (value.isTensor()) return owning_alias(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(owning_alias(t));
    return list;
  }
  if (value.isList()) {
    const auto& type = *value.toList().elementType();
    if (type.kind() == c10::TypeKind::ListType && type.containedType(0)->kind() == c10::TypeKind::TensorType) {
      c10::List<c10::List<at::Tensor>> lists;
      for (const IValue& inner : value.toListRef()) lists.push_back(aliased(inner).toTensorList());
      return lists;
    }
  }
  return value;
}

// HCCL gathers into and scatters from one buffer of any shape; Gloo insists on the first axis. So both see flat tensors.
IValue flat(const IValue& value) {
  if (value.isTensor()) return value.toTensor().is_contiguous() ? value.toTensor().view({-1}) : value.toTensor();
  c10::List<at::Tensor> list;
  for (const at::Tensor& t : value.toTensorVector()) list.push_back(flat(t).toTensor());
  return list;
}

bool takes_any_shape(const std::string& op) {
  return op == "c10d::_allgather_base_" || op == "c10d::_reduce_scatter_base_" || op == "c10d::allgather_into_tensor_coalesced_" ||
         op == "c10d::reduce_scatter_tensor_coalesced_";
}

int64_t bytes_of(const IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() ? value.toTensor().numel() * value.toTensor().element_size() : 0;
  int64_t sum = 0;
  if (value.isTensorList())
    for (const at::Tensor& t : value.toTensorVector()) sum += t.numel() * t.element_size();
  else if (value.isList())
    for (const IValue& inner : value.toListRef()) sum += bytes_of(inner);
  return sum;
}

// Bytes this rank puts on the wire with the bandwidth-optimal algorithm of each collective (ring all-reduce, pairwise exchange, ...).
int64_t wire_bytes(const std::string& op, const Stack& stack, size_t base, int64_t rank, int64_t size) {
  auto arg = [&](size_t i) -> const IValue& { return stack[base + i]; };
  auto has = [&](const char* part) { return op.find(part) != std::string::npos; };
  if (has("alltoall_base_")) {
    const auto splits = arg(4).toIntVector();
    const at::Tensor input = arg(1).toTensor();
    if (splits.empty() || input.size(0) == 0) return bytes_of(arg(1)) * (size - 1) / size;
    return bytes_of(arg(1)) / input.size(0) * (input.size(0) - splits[rank]);
  }
  if (has("allreduce")) return 2 * bytes_of(arg(0)) * (size - 1) / size;
  if (has("allgather")) return bytes_of(arg(1)) * (size - 1);
  if (has("reduce_scatter") || has("alltoall_")) return bytes_of(arg(1)) * (size - 1) / size;
  if (has("broadcast_")) return arg(2).toInt() == rank ? bytes_of(arg(0)) : 0;
  if (has("c10d::reduce_")) return arg(3).toInt() == rank ? 0 : bytes_of(arg(0));
  if (has("gather_")) return arg(3).toInt() == rank ? 0 : bytes_of(arg(1));
  if (has("scatter_")) return arg(3).toInt() == rank ? bytes_of(arg(1)) * (size - 1) / size : 0;
  return has("c10d::send") ? bytes_of(arg(0)) : 0;
}

// Gloo has no list form of all-to-all: flatten, exchange by splits, copy out.
void all_to_all_lists(const IValue& outputs, const IValue& inputs, const c10::intrusive_ptr<Group>& gloo) {
  std::vector<at::Tensor> out = outputs.toTensorVector(), in = inputs.toTensorVector(), flat;
  std::vector<int64_t> out_sizes, in_sizes;
  int64_t total = 0;
  for (const auto& t : in) flat.push_back(t.reshape({-1})), in_sizes.push_back(t.numel());
  for (const auto& t : out) out_sizes.push_back(t.numel()), total += t.numel();
  at::Tensor sent = at::cat(flat), received = at::empty({total}, sent.options());
  gloo->alltoall_base(received, sent, out_sizes, in_sizes)->wait();
  auto parts = received.split_with_sizes(out_sizes);
  for (size_t i = 0; i < out.size(); ++i) out[i].copy_(parts[i].view(out[i].sizes()));
}

struct Done final : c10d::Work {
  bool isCompleted() override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
};

void collective(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), base = stack->size() - count;
  IValue first = (*stack)[base];
  c10::intrusive_ptr<Group> group, gloo;
  for (size_t i = 0; i < count; ++i)
    if (schema.arguments()[i].name() == "process_group") {
      group = (*stack)[base + i].toCustomClass<Group>();
      gloo = over_gloo(group);
      (*stack)[base + i] = gloo;
    }
  TORCH_INTERNAL_ASSERT(group, "no process group in ", schema.name());
  count_traffic(schema.name().substr(6), *group, wire_bytes(schema.name(), *stack, base, group->getRank(), group->getSize()));
  for (size_t i = 0; i < count; ++i) (*stack)[base + i] = aliased((*stack)[base + i]);
  if (takes_any_shape(schema.name()))
    for (size_t i = 0; i < 2; ++i) (*stack)[base + i] = flat((*stack)[base + i]);
  if (schema.name() == "c10d::alltoall_") {
    all_to_all_lists((*stack)[base], (*stack)[base + 1], gloo);
    stack->resize(base);
    stack->push_back(first);
    stack->push_back(c10::intrusive_ptr<c10d::Work>(c10::make_intrusive<Done>()));
    return;
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (schema.returns().size() == 2) (*stack)[base] = first;  // hand back the caller's tensors, not the aliases
}

std::tuple<std::vector<std::string>, std::vector<std::string>, std::vector<int64_t>, std::vector<int64_t>> counts() {
  std::lock_guard<std::mutex> lock(traffic_mutex);
  std::vector<std::string> names, groups;
  std::vector<int64_t> calls, bytes;
  for (auto& [key, entry] : traffic()) {
    names.push_back(key.first);
    groups.push_back(key.second);
    calls.push_back(entry.calls);
    bytes.push_back(entry.bytes);
  }
  return {names, groups, calls, bytes};
}

void reset_counts() {
  std::lock_guard<std::mutex> lock(traffic_mutex);
  traffic().clear();
}

}  // namespace

void install_comm() {
  static torch::Library c10d(torch::Library::IMPL, "c10d", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("c10d::", 0) != 0) continue;
    auto op = dispatcher.findSchema(name);
    if (op && op->hasKernelForDispatchKey(c10::DispatchKey::CPU))
      c10d.impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&collective>());
  }
}

TORCH_LIBRARY_FRAGMENT(ascend_sim, m) {
  m.def("comm_counts() -> (str[], str[], int[], int[])", &counts);
  m.def("reset_comm_counts() -> ()", &reset_counts);
}

}  // namespace ascend_sim
