// SPDX-License-Identifier: Apache-2.0
//
// What dispatch and combine share: who is in the group, which experts are where, which tokens take part.
#pragma once
#include "comm.h"
#include "moe.h"

namespace ascend_sim::exchange {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using MaybeTensor = std::optional<at::Tensor>;

struct Layout {
  const char* op;
  Group group, gloo;
  int64_t world, rank, experts, local;  // `local` experts on each rank
};

// A token's choice of an expert: token, place among its K choices.
struct Choice {
  int32_t token, k;
  int64_t expert;
};

// The layout that a call's arguments describe, checked against the group.
Layout layout_of(const char* op, c10::string_view group_ep, int64_t ep_world_size, int64_t ep_rank_id, int64_t moe_expert_num,
                 c10::string_view group_tp, int64_t tp_world_size, int64_t shared_expert_rank_num, int64_t expert_shard_type);

void check_tokens(const Layout& l, const char* argument, const at::Tensor& x, const at::Tensor& expert_ids);

// The choices that take part, in order of expert, then token.
std::vector<Choice> choices_of(const Layout& l, const at::Tensor& expert_ids, const MaybeTensor& mask);

// How many of the choices go to each rank; how many of such rows go to others than this rank.
std::vector<int64_t> by_rank(const Layout& l, const std::vector<Choice>& choices);
int64_t others(const Layout& l, const std::vector<int64_t>& rows);

// All to all: `sent[r]` of `rows` go to rank r, `received[r]` rows come from it. Not counted as a collective of its own.
at::Tensor all_to_all(const Layout& l, at::Tensor rows, std::vector<int64_t> sent, std::vector<int64_t> received);

// Every rank's `mine`, [world, size of mine].
at::Tensor all_gather(const Layout& l, const std::vector<int64_t>& mine);

}  // namespace ascend_sim::exchange
