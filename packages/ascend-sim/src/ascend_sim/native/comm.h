// SPDX-License-Identifier: Apache-2.0
//
// What kernels that communicate need of the collectives (comm.cpp).
#pragma once
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace ascend_sim {

// The process group whose HCCL communicator has this name (get_hccl_comm_name); an error that names `op` where this process is in none.
c10::intrusive_ptr<c10d::ProcessGroup> group_named(const char* op, c10::string_view comm_name);

// The same ranks for CPU tensors, over the Gloo group that the npu backend uses. What runs over it is not counted.
c10::intrusive_ptr<c10d::ProcessGroup> over_gloo(const c10::intrusive_ptr<c10d::ProcessGroup>& group);

// One more call of a collective, or of a kernel that has one in it, on a group, and the bytes that this rank sent.
void count_traffic(const std::string& name, const c10d::ProcessGroup& group, int64_t bytes);

// A line about a call that begins, where a log is wanted (collective_log.cpp); `more` is further members of its JSON object. Kernels that
// communicate call it; collectives of torch.distributed are seen without.
void log_collective(const std::string& name, const c10d::ProcessGroup& group, const std::string& more = "");

}  // namespace ascend_sim
