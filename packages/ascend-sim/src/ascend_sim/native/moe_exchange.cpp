// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts over several processes: what npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 share. They are not in
// _op_plugin_docs.py; the argument rules are those of torch_npu's documentation of the two operators for Atlas A2 and A3, either of which may
// allow a call.
#include "moe_exchange.h"

namespace ascend_sim::exchange {

Layout layout_of(const char* op, c10::string_view group_ep, int64_t ep_world_size, int64_t ep_rank_id, int64_t moe_expert_num,
                 c10::string_view group_tp, int64_t tp_world_size, int64_t shared_expert_rank_num, int64_t expert_shard_type) {
  RULE(".group-name", !group_ep.empty() && group_ep.size() < 128 && group_tp.size() < 128, op,
       ": group_ep must have 1 to 127 characters, group_tp at most 127");
  TORCH_CHECK(tp_world_size == 0 || tp_world_size == 1, op, ": tp_world_size must be 0 or 1 (2 is not simulated), got ", tp_world_size);
  TORCH_CHECK(shared_expert_rank_num == 0, op, ": shared_expert_rank_num must be 0 (others are not simulated), got ",
              shared_expert_rank_num);
  TORCH_CHECK(expert_shard_type == 0, op, ": expert_shard_type must be 0, got ", expert_shard_type);
  Layout l{op, group_named(op, group_ep), {}, ep_world_size, ep_rank_id, moe_expert_num, 0};
  RULE(".ep-rank", l.group->getSize() == l.world && l.group->getRank() == l.rank, op, ": ep_world_size and ep_rank_id must be those of group_ep, ",
              l.group->getSize(), " and ", l.group->getRank(), ", got ", l.world, " and ", l.rank);
  RULE(".experts-of-each-rank", l.experts >= l.world && l.experts % l.world == 0, op, ": moe_expert_num must be a multiple of ep_world_size = ", l.world, ", got ",
              l.experts);
  STRICT(".ep-world-size", l.world >= 2 && l.world <= 768, op, ": ep_world_size must lie in [2, 768], got ", l.world);
  STRICT(".experts", l.experts <= 1024, op, ": moe_expert_num must lie in [1, 1024], got ", l.experts);
  l.local = l.experts / l.world;
  l.gloo = over_gloo(l.group);
  log_collective(op, *l.group);
  return l;
}

void check_tokens(const Layout& l, const char* argument, const at::Tensor& x, const at::Tensor& expert_ids) {
  on_device(l.op, argument, x);
  on_device(l.op, "expert_ids", expert_ids);
  const int64_t size = x.dim() == 2 ? x.size(1) : 0, k = expert_ids.dim() == 2 ? expert_ids.size(1) : 0;
  RULE(".rank", x.dim() == 2, l.op, ": ", argument, " must have 2 dimensions, got ", x.sizes());
  RULE(".dtype", is_float(x.scalar_type()), l.op, ": ", argument, " must be float16 or bfloat16, got ", x.scalar_type());
  STRICT(".dtype", x.scalar_type() != at::kFloat, l.op, ": ", argument, " must be float16 or bfloat16, got ", x.scalar_type());
  STRICT(".size", (size % 32 == 0 && size > 0 && size <= 10240) || (size >= 1024 && size <= 8192), l.op,
         ": H must be a multiple of 32, at most 10240, or lie in [1024, 8192], got ", size);
  RULE(".ids-dtype", expert_ids.scalar_type() == at::kInt, l.op, ": expert_ids must be int32, got ", expert_ids.scalar_type());
  RULE(".ids-rank", expert_ids.dim() == 2, l.op, ": expert_ids must be [BS, K], got ", expert_ids.sizes());
  STRICT(".top-k", k >= 1 && k <= 16, l.op, ": K must lie in [1, 16], got ", k);
}

std::vector<Choice> choices_of(const Layout& l, const at::Tensor& expert_ids, const std::optional<at::Tensor>& mask) {
  const int64_t tokens = expert_ids.size(0), k = expert_ids.size(1);
  const at::Tensor ids = dense(expert_ids);
  at::Tensor active;
  if (mask && mask->defined()) {
    on_device(l.op, "x_active_mask", *mask);
    RULE(".mask", mask->scalar_type() == at::kBool && (mask->sizes() == at::IntArrayRef{tokens} || mask->sizes() == expert_ids.sizes()), l.op,
         ": x_active_mask must be bool [BS = ", tokens, "] or [BS, K = ", k, "], got ", mask->scalar_type(), " ", mask->sizes());
    active = dense(*mask);
  }
  const bool* on = active.defined() ? static_cast<const bool*>(active.const_data_ptr()) : nullptr;
  const bool by_token = on && active.dim() == 1;
  const int32_t* id = static_cast<const int32_t*>(ids.const_data_ptr());
  std::vector<Choice> choices;
  for (int64_t t = 0; t < tokens; ++t) {
    if (by_token && t) STRICT(".mask-order", on[t - 1] || !on[t], l.op, ": in x_active_mask every true must come before every false");
    for (int64_t j = 0; j < k; ++j) {
      if (on && !(by_token ? on[t] : on[t * k + j])) continue;
      const int32_t expert = id[t * k + j];
      RULE(".ids", expert >= 0 && expert < l.experts, l.op, ": expert_ids must lie in [0, moe_expert_num = ", l.experts, "), got ", expert);
      for (int64_t i = 0; i < j; ++i)  // nor would the rows fit the result
        RULE(".ids-differ", id[t * k + i] != expert, l.op, ": a row of expert_ids must not name an expert twice, got ", expert);
      choices.push_back({static_cast<int32_t>(t), static_cast<int32_t>(j), expert});
    }
  }
  std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
  return choices;
}

std::vector<int64_t> by_rank(const Layout& l, const std::vector<Choice>& choices) {
  std::vector<int64_t> out(l.world);
  for (const Choice& c : choices) ++out[c.expert / l.local];
  return out;
}

int64_t others(const Layout& l, const std::vector<int64_t>& rows) {
  int64_t sum = 0;
  for (int64_t r = 0; r < l.world; ++r) sum += r == l.rank ? 0 : rows[r];
  return sum;
}

at::Tensor all_to_all(const Layout& l, at::Tensor rows, std::vector<int64_t> sent, std::vector<int64_t> received) {
  int64_t total = 0;
  for (int64_t n : received) total += n;
  at::Tensor out = at::empty({total, rows.size(1)}, rows.options());
  l.gloo->alltoall_base(out, rows, received, sent)->wait();
  return out;
}

at::Tensor all_gather(const Layout& l, const std::vector<int64_t>& mine) {
  const int64_t size = static_cast<int64_t>(mine.size());
  at::Tensor copies = at::empty({l.world, size}, at::kLong);
  for (int64_t r = 0; r < l.world; ++r) std::copy(mine.begin(), mine.end(), copies.data_ptr<int64_t>() + r * size);
  const std::vector<int64_t> one(l.world, 1);
  return all_to_all(l, copies, one, one);
}

}  // namespace ascend_sim::exchange
