// SPDX-License-Identifier: Apache-2.0
//
// The order in which this process joins collectives, as a file that another program compares with those of other ranks (collectives.py).
// Once hccl.py has named a folder, every collective on npu and CPU tensors and every kernel that has one in it is a line of
// FOLDER/<process id>.jsonl, written before the collective begins: a rank that waits for ever has said for what.
#ifndef NDEBUG
#define NDEBUG  // torch is built with it, and at::RecordFunction has another layout without
#endif
#include <ATen/record_function.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/custom_class.h>
#include <unistd.h>

#include "comm.h"

namespace ascend_sim {
namespace {

using c10::IValue;
using Group = c10d::ProcessGroup;

std::string& folder() {  // "": nothing is logged
  static std::string path;
  return path;
}

void append(const std::string& line) {
  static std::mutex mutex;
  static int file = -1;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {  // also in a forked process
    if (file >= 0) close(file);
    const std::string path = folder() + "/" + std::to_string(getpid()) + ".jsonl";
    file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    TORCH_CHECK(file >= 0, "ASCEND_SIM_COLLECTIVES=", folder(), ": cannot write ", path, ": ", strerror(errno));
    owner = getpid();
  }
  TORCH_CHECK(write(file, line.data(), line.size()) == static_cast<ssize_t>(line.size()), "ASCEND_SIM_COLLECTIVES=", folder(), ": ",
              strerror(errno));
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + '"';
}

const at::Tensor* first_tensor(const IValue& value, at::Tensor& holder) {
  if (value.isTensor() && value.toTensor().defined()) return &(holder = value.toTensor());
  if (value.isList())
    for (const IValue& inner : value.toListRef())
      if (const at::Tensor* found = first_tensor(inner, holder)) return found;
  return nullptr;
}

// What every rank of the group must have in common with this one, and the peer of a message.
std::string operand(const std::string& op, const std::vector<IValue>& inputs) {
  at::Tensor holder;
  const at::Tensor* first = nullptr;
  for (const IValue& value : inputs)
    if ((first = first_tensor(value, holder))) break;
  if (!first) return "";
  std::ostringstream out;
  out << ", \"device\": " << quoted(first->device().type() == at::kCPU ? "cpu" : "npu") << ", \"dtype\": " << quoted(c10::toString(first->scalar_type()));
  const bool splits = op == "alltoall_base_" && !inputs[4].toIntVector().empty();
  if (!splits && op != "gather_" && op != "scatter_" && op != "alltoall_") out << ", \"numbers\": " << first->numel();
  if (op == "send" || op == "recv_") out << ", \"peer\": " << inputs[2].toInt();
  return out.str();
}

std::unique_ptr<at::ObserverContext> begins(const at::RecordFunction& function) {
  const std::string name = function.name();
  if (!name.starts_with("c10d::")) return nullptr;
  std::vector<IValue> inputs(function.inputs().begin(), function.inputs().end());
  static const auto group_type = c10::getCustomClassType<c10::intrusive_ptr<Group>>();
  for (const IValue& value : inputs)
    if (value.isCustomClass() && *value.type() == *group_type) {
      const auto group = value.toCustomClass<Group>();
      // Groups of torch.distributed have a description; those of over_gloo have none, and what runs over them is part of a line above.
      if (!group->getGroupDesc().empty()) log_collective(name.substr(6), *group, operand(name.substr(6), inputs));
    }
  return nullptr;
}

}  // namespace

void log_collective(const std::string& name, const Group& group, const std::string& more) {
  if (folder().empty()) return;
  std::ostringstream line;
  line << "{\"op\": " << quoted(name) << ", \"group\": " << quoted(group.getGroupName()) << ", \"about\": " << quoted(group.getGroupDesc())
       << ", \"rank\": " << group.getRank() << ", \"size\": " << group.getSize() << more << "}\n";
  append(line.str());
}

TORCH_LIBRARY_FRAGMENT(ascend_sim, m) {
  m.def("log_collectives(str folder) -> ()", [](const std::string& path) {
    if (folder().empty()) at::addGlobalCallback(at::RecordFunctionCallback(&begins).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
    folder() = path;
  });
}

}  // namespace ascend_sim
