// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts: from router logits to expert ids and weights, and from experts to their replicas.
#include <numeric>

#include "moe.h"

namespace ascend_sim {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// The `count` largest of `keys`, largest first; of equals the first. NaN comes last, so that the order stays one.
void largest(const float* keys, int64_t size, int64_t count, int32_t* order) {
  auto key = [&](int32_t i) { return std::isnan(keys[i]) ? -infinity : keys[i]; };
  std::iota(order, order + size, 0);
  std::partial_sort(order, order + count, order + size, [&](int32_t a, int32_t b) {
    const float left = key(a), right = key(b);
    return left > right || (left == right && a < b);
  });
}

void softmax(const float* x, int64_t size, float* out) {
  const float top = *std::max_element(x, x + size);
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += out[i] = std::exp(x[i] - top);
  for (int64_t i = 0; i < size; ++i) out[i] /= sum;
}

struct Gating {
  int64_t experts, k, groups, kept_groups;
  bool sum_of_two, sigmoid;
  float factor, eps;
};

// One token: its scores (softmax or sigmoid) to `norm`, the k weights and experts to `weights` and `ids`.
void gate(const Gating& g, const float* logits, const float* bias, float* norm, float* weights, int32_t* ids, std::vector<float>& choice,
          std::vector<int32_t>& order) {
  if (g.sigmoid) {
    for (int64_t e = 0; e < g.experts; ++e) norm[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  } else {
    softmax(logits, g.experts, norm);
  }
  for (int64_t e = 0; e < g.experts; ++e) choice[e] = norm[e] + (bias ? bias[e] : 0.0f);
  if (g.groups > 1) {
    const int64_t size = g.experts / g.groups;
    std::vector<float> score(g.groups);
    for (int64_t i = 0; i < g.groups; ++i) {
      largest(choice.data() + i * size, size, std::min<int64_t>(2, size), order.data());
      score[i] = choice[i * size + order[0]] + (g.sum_of_two ? choice[i * size + order[1]] : 0.0f);
    }
    largest(score.data(), g.groups, g.groups, order.data());
    for (int64_t i = g.kept_groups; i < g.groups; ++i) std::fill_n(choice.begin() + order[i] * size, size, -infinity);
  }
  largest(choice.data(), g.experts, g.k, order.data());
  float sum = 0;
  for (int64_t j = 0; j < g.k; ++j) sum += weights[j] = norm[ids[j] = order[j]];
  for (int64_t j = 0; j < g.k; ++j) weights[j] = (g.sigmoid ? weights[j] / (sum + g.eps) : weights[j]) * g.factor;
}

// torch_npu/_op_plugin_docs.py: npu_moe_gating_top_k; the formula is in CANN's aclnnMoeGatingTopK: the bias chooses and does not weigh; with
// sigmoid the weights are divided by their sum + eps, with softmax they are not.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gating_top_k(const at::Tensor& x, int64_t k, const std::optional<at::Tensor>& bias,
                                                            const std::optional<at::Tensor>& input_ids, const std::optional<at::Tensor>& tid2eid,
                                                            int64_t k_group, int64_t group_count, int64_t group_select_mode, int64_t renorm,
                                                            int64_t norm_type, bool out_flag, double routed_scaling_factor, double eps) {
  static Tally& mine = tally("npu::npu_moe_gating_top_k");
  const char* op = "npu_moe_gating_top_k";
  count_call(mine);
  on_device(op, "x", x);
  TORCH_CHECK(!input_ids && !tid2eid, op, ": input_ids and tid2eid (hash mode) are not simulated");
  RULE("npu_moe_gating_top_k.rank", x.dim() == 2, op, ": x must be [tokens, experts], got ", x.sizes());
  const int64_t tokens = x.size(0), experts = x.size(1);
  RULE("npu_moe_gating_top_k.group-count", group_count > 0 && experts % group_count == 0, op, ": the number of experts must be a multiple of group_count, got ", experts,
              " and ", group_count);
  RULE("npu_moe_gating_top_k.k-group", k_group >= 1 && k_group <= group_count, op, ": k_group must lie in [1, group_count = ", group_count, "], got ", k_group);
  RULE("npu_moe_gating_top_k.k", k >= 1 && k <= experts / group_count * k_group, op, ": k must lie in [1, experts / group_count * k_group = ",
              experts / group_count * k_group, "], got ", k);
  RULE("npu_moe_gating_top_k.group-select-mode", group_select_mode == 0 || group_select_mode == 1, op, ": group_select_mode must be 0 (max) or 1 (sum of two), got ",
              group_select_mode);
  RULE("npu_moe_gating_top_k.renorm", renorm == 0, op, ": renorm must be 0, got ", renorm);
  RULE("npu_moe_gating_top_k.norm-type", norm_type == 0 || norm_type == 1, op, ": norm_type must be 0 (softmax) or 1 (sigmoid), got ", norm_type);
  TORCH_CHECK(group_select_mode == 0 || group_count == 1 || experts / group_count >= 2, op,
              ": group_select_mode 1 needs groups of at least 2 experts, got ", experts / group_count);
  STRICT("npu_moe_gating_top_k.experts", experts <= 2048, op, ": x must have at most 2048 experts, got ", experts);
  STRICT("npu_moe_gating_top_k.group-size", experts / group_count > 2, op, ": a group must have more than 2 experts, got ", experts / group_count);
  STRICT("npu_moe_gating_top_k.aligned-experts", (experts / group_count + 31) / 32 * 32 * group_count <= 2048, op,
         ": experts / group_count, rounded up to 32, times group_count must not exceed 2048, got ", experts, " experts and group_count ",
         group_count);
  at::Tensor biases;
  if (bias && bias->defined()) {
    on_device(op, "bias", *bias);
    RULE("npu_moe_gating_top_k.bias-shape", bias->dim() == 1 && bias->size(0) == experts, op, ": bias must be [experts = ", experts, "], got ", bias->sizes());
    STRICT("npu_moe_gating_top_k.bias-dtype", bias->scalar_type() == x.scalar_type(), op, ": bias must have the data type of x, got ", bias->scalar_type(), " and ",
           x.scalar_type());
    biases = floats(*bias);
  }
  RULE("npu_moe_gating_top_k.dtype", is_float(x.scalar_type()), op, ": x must be float16, bfloat16 or float32, got ", x.scalar_type());
  const Gating gating{experts,        k, group_count, k_group, group_select_mode == 1, norm_type == 1, static_cast<float>(routed_scaling_factor),
                      static_cast<float>(eps)};
  const at::Tensor logits = floats(x);
  at::Tensor y = at::empty({tokens, k}, x.options()), ids = at::empty({tokens, k}, x.options().dtype(at::kInt));
  at::Tensor norm = zeros({tokens, experts}, x.options().dtype(at::kFloat));
  float* norms = static_cast<float*>(norm.data_ptr());
  by_type(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(tokens, 64 * experts, [&](int64_t begin, int64_t end) {
      std::vector<float> scores(experts), choice(experts), weights(k);
      std::vector<int32_t> order(experts);
      for (int64_t t = begin; t < end; ++t) {
        gate(gating, logits.const_data_ptr<float>() + t * experts, biases.defined() ? biases.const_data_ptr<float>() : nullptr, scores.data(),
             weights.data(), static_cast<int32_t*>(ids.data_ptr()) + t * k, choice, order);
        std::copy(weights.begin(), weights.end(), static_cast<T*>(y.data_ptr()) + t * k);
        if (out_flag) std::copy(scores.begin(), scores.end(), norms + t * experts);
      }
    });
  });
  return {y, ids, norm};
}

// torch_npu/_op_plugin_docs.py: npu_moe_gating_top_k_softmax. A finished row gets the expert id "number of experts", which is none.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gating_top_k_softmax(const at::Tensor& x, const std::optional<at::Tensor>& finished, int64_t k) {
  static Tally& mine = tally("npu::npu_moe_gating_top_k_softmax");
  const char* op = "npu_moe_gating_top_k_softmax";
  count_call(mine);
  on_device(op, "x", x);
  RULE("npu_moe_gating_top_k_softmax.rank", x.dim() == 2 || x.dim() == 3, op, ": x must have 2 or 3 dimensions, got ", x.sizes());
  RULE("npu_moe_gating_top_k_softmax.dtype", is_float(x.scalar_type()), op, ": x must be float16, bfloat16 or float32, got ", x.scalar_type());
  const int64_t experts = x.size(-1);
  RULE("npu_moe_gating_top_k_softmax.k", k >= 1 && k <= experts, op, ": k must lie in [1, ", experts, "], got ", k);
  STRICT("npu_moe_gating_top_k_softmax.most-k", k <= 1024, op, ": k must not exceed 1024, got ", k);
  at::Tensor done;
  if (finished && finished->defined()) {
    on_device(op, "finished", *finished);
    RULE("npu_moe_gating_top_k_softmax.finished-dtype", finished->scalar_type() == at::kBool, op, ": finished must be bool, got ", finished->scalar_type());
    RULE("npu_moe_gating_top_k_softmax.finished-shape", finished->sizes() == x.sizes().slice(0, x.dim() - 1), op, ": finished must have the shape of x without its last dimension, got ",
                finished->sizes(), " and ", x.sizes());
    done = dense(*finished);
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = k;
  at::Tensor y = at::empty(shape, x.options()), ids = at::empty(shape, x.options().dtype(at::kInt)), rows = at::empty_like(ids);
  const at::Tensor logits = floats(x);
  const int64_t tokens = y.numel() / k;
  int32_t *id = static_cast<int32_t*>(ids.data_ptr()), *row = static_cast<int32_t*>(rows.data_ptr());
  by_type(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(tokens, 32 * experts, [&](int64_t begin, int64_t end) {
      std::vector<float> scores(experts);
      std::vector<int32_t> order(experts);
      for (int64_t t = begin; t < end; ++t) {
        softmax(logits.const_data_ptr<float>() + t * experts, experts, scores.data());
        largest(scores.data(), experts, k, order.data());
        const bool none = done.defined() && static_cast<const bool*>(done.const_data_ptr())[t];
        for (int64_t j = 0; j < k; ++j) {
          static_cast<T*>(y.data_ptr())[t * k + j] = static_cast<T>(scores[order[j]]);
          id[t * k + j] = none ? static_cast<int32_t>(experts) : order[j];
          row[t * k + j] = static_cast<int32_t>(j * tokens + t);
        }
      }
    });
  });
  return {y, ids, rows};
}

// The mask of npu_moe_update_expert: false where the token takes no part or the expert's weight lies below the threshold's share of the sum.
at::Tensor pruned(const char* op, const at::Tensor& ids, const std::optional<at::Tensor>& expert_scales,
                  const std::optional<at::Tensor>& pruning_threshold, const std::optional<at::Tensor>& active_mask) {
  at::Tensor mask = at::ones(ids.sizes(), ids.options().dtype(at::kBool));
  TORCH_CHECK(expert_scales.has_value() == pruning_threshold.has_value(), op, ": expert_scales and pruning_threshold must be given together");
  TORCH_CHECK(!active_mask || expert_scales, op, ": active_mask needs expert_scales and pruning_threshold");
  if (!expert_scales) return mask;
  const int64_t tokens = ids.size(0), k = ids.size(1);
  TORCH_CHECK(expert_scales->sizes() == ids.sizes(), op, ": expert_scales must have the shape of expert_ids, got ", expert_scales->sizes(),
              " and ", ids.sizes());
  TORCH_CHECK(pruning_threshold->numel() == k && pruning_threshold->dim() >= 1 && pruning_threshold->dim() <= 2, op,
              ": pruning_threshold must be [K] or [1, K] with K = ", k, ", got ", pruning_threshold->sizes());
  STRICT("npu_moe_update_expert.threshold-dtype", pruning_threshold->scalar_type() == at::kFloat, op, ": pruning_threshold must be float32, got ", pruning_threshold->scalar_type());
  const at::Tensor scales = floats(*expert_scales), threshold = floats(*pruning_threshold);
  at::Tensor active;
  if (active_mask) {
    TORCH_CHECK(active_mask->scalar_type() == at::kBool && active_mask->dim() == 1 && active_mask->size(0) == tokens, op,
                ": active_mask must be bool [", tokens, "], got ", active_mask->scalar_type(), " ", active_mask->sizes());
    active = dense(*active_mask);
  }
  const bool* on = active.defined() ? static_cast<const bool*>(active.const_data_ptr()) : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    STRICT("npu_moe_update_expert.mask-order", !on || t == 0 || on[t - 1] || !on[t], op, ": in active_mask every true must come before every false");
    const float* s = scales.const_data_ptr<float>() + t * k;
    const float sum = std::accumulate(s, s + k, 0.0f);
    for (int64_t j = 0; j < k; ++j)
      static_cast<bool*>(mask.data_ptr())[t * k + j] = (!on || on[t]) && !(s[j] < threshold.const_data_ptr<float>()[j] * sum);
  }
  return mask;
}

// torch_npu/_op_plugin_docs.py: npu_moe_update_expert: row e of the table is [replicas of e, where they are ...]; the replica is chosen by rank
// (balance_mode 0) or by token (1).
std::tuple<at::Tensor, at::Tensor> update_expert(const at::Tensor& expert_ids, const at::Tensor& eplb_table,
                                                 const std::optional<at::Tensor>& expert_scales,
                                                 const std::optional<at::Tensor>& pruning_threshold, const std::optional<at::Tensor>& active_mask,
                                                 int64_t local_rank_id, int64_t world_size, int64_t balance_mode) {
  static Tally& mine = tally("npu::npu_moe_update_expert");
  const char* op = "npu_moe_update_expert";
  count_call(mine);
  on_device(op, "expert_ids", expert_ids);
  on_device(op, "eplb_table", eplb_table);
  TORCH_CHECK(expert_ids.dim() == 2 && (expert_ids.scalar_type() == at::kInt || expert_ids.scalar_type() == at::kLong), op,
              ": expert_ids must be int32 or int64 [tokens, K], got ", expert_ids.scalar_type(), " ", expert_ids.sizes());
  TORCH_CHECK(eplb_table.dim() == 2 && eplb_table.scalar_type() == at::kInt, op, ": eplb_table must be int32 [experts, 1 + replicas], got ",
              eplb_table.scalar_type(), " ", eplb_table.sizes());
  TORCH_CHECK(balance_mode == 0 || balance_mode == 1, op, ": balance_mode must be 0 (by rank) or 1 (by token), got ", balance_mode);
  TORCH_CHECK(balance_mode == 1 || (world_size > 0 && local_rank_id >= 0 && local_rank_id < world_size), op,
              ": balance_mode 0 needs local_rank_id in [0, world_size), got ", local_rank_id, " and ", world_size);
  STRICT("npu_moe_update_expert.world-size", balance_mode == 1 || (world_size >= 2 && world_size <= 768), op, ": world_size must lie in [2, 768], got ", world_size);
  const at::Tensor ids = longs(expert_ids), table = dense(eplb_table);
  const int64_t k = expert_ids.size(1), experts = table.size(0), columns = table.size(1);
  at::Tensor out = at::empty_like(ids);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int64_t id = ids.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(id >= 0 && id < experts, op, ": expert_ids must lie in [0, ", experts - 1, "], got ", id);
    const int32_t* row = static_cast<const int32_t*>(table.const_data_ptr()) + id * columns;
    TORCH_CHECK(row[0] >= 1 && row[0] < columns, op, ": eplb_table[", id, "][0], the number of replicas, must lie in [1, ", columns - 1,
                "], got ", row[0]);
    const int64_t replicas = row[0], share = (world_size + replicas - 1) / replicas;
    out.data_ptr<int64_t>()[i] = row[1 + (balance_mode == 0 ? local_rank_id / share : i / k % replicas)];
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return {to_npu(out.to(expert_ids.scalar_type()), expert_ids.device()), pruned(op, expert_ids, expert_scales, pruning_threshold, active_mask)};
}

}  // namespace

void install_moe_gating(torch::Library& npu) {
  npu.impl("npu_moe_gating_top_k", TORCH_FN(gating_top_k));
  npu.impl("npu_moe_gating_top_k_softmax", TORCH_FN(gating_top_k_softmax));
  npu.impl("npu_moe_update_expert", TORCH_FN(update_expert));
}

}  // namespace ascend_sim
