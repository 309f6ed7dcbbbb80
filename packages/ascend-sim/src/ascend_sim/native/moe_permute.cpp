// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts: tokens sorted by expert, and back.
#include <numeric>

#include "moe.h"

namespace ascend_sim {
namespace {

// torch_npu/_op_plugin_docs.py: npu_moe_token_permute
std::tuple<at::Tensor, at::Tensor> token_permute(const at::Tensor& tokens, const at::Tensor& indices, std::optional<int64_t> num_out_tokens,
                                                 bool padded_mode) {
  static Tally& mine = tally("npu::npu_moe_token_permute");
  const char* op = "npu_moe_token_permute";
  count_call(mine);
  on_device(op, "tokens", tokens);
  on_device(op, "indices", indices);
  RULE("npu_moe_token_permute.rank", tokens.dim() == 2, op, ": tokens must be [tokens, H], got ", tokens.sizes());
  RULE("npu_moe_token_permute.indices-shape", (indices.dim() == 1 || indices.dim() == 2) && indices.size(0) == tokens.size(0), op,
       ": indices must be [tokens] or [tokens, K] with tokens = ", tokens.size(0), ", got ", indices.sizes());
  RULE("npu_moe_token_permute.indices-dtype", indices.scalar_type() == at::kInt || indices.scalar_type() == at::kLong, op,
       ": indices must be int32 or int64, got ", indices.scalar_type());
  RULE("npu_moe_token_permute.padded-mode", !padded_mode, op, ": padded_mode must be False");
  RULE("npu_moe_token_permute.dtype", is_float(tokens.scalar_type()) || tokens.scalar_type() == at::kChar, op,
       ": tokens must be float16, bfloat16 or float32, got ", tokens.scalar_type());
  STRICT("npu_moe_token_permute.dtype", tokens.scalar_type() != at::kChar, op, ": tokens must be float16, bfloat16 or float32, got Char");
  constexpr int64_t limit = 16777215;
  STRICT("npu_moe_token_permute.top-k", indices.dim() == 1 || indices.size(1) <= 512, op, ": K must not exceed 512, got ", indices.size(-1));
  STRICT("npu_moe_token_permute.indices-count", indices.numel() < limit, op, ": indices must have fewer than ", limit, " elements, got ", indices.numel());
  const at::Tensor ids = longs(indices), from = dense(tokens);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int64_t id = ids.const_data_ptr<int64_t>()[i];
    RULE("npu_moe_token_permute.indices", id >= 0 && id < limit, op, ": indices must lie in [0, ", limit, "), got ", id);
  }
  const int64_t all = ids.numel(), k = indices.dim() == 2 ? indices.size(1) : 1, asked = num_out_tokens.value_or(0);
  const int64_t rows = asked > 0 ? std::min(asked, all) : all + asked;
  TORCH_CHECK(rows >= 0, op, ": num_out_tokens must be at least ", -all, ", got ", asked);
  const std::vector<int32_t> places = sorted_places(ids, 0, limit);
  at::Tensor out = at::empty({rows, tokens.size(1)}, tokens.options()), sorted = at::empty({all}, tokens.options().dtype(at::kInt));
  gather_rows(from, out, rows, [&](int64_t i) { return places[i] / k; });
  for (int64_t i = 0; i < all; ++i) static_cast<int32_t*>(sorted.data_ptr())[places[i]] = static_cast<int32_t>(i);
  return {out, sorted};
}

// The documentation wants each row once. What production code does with a range of active experts is let through: a pair without a row takes some
// other one with weight zero.
void check_sorted(const char* op, const int32_t* where, int64_t pairs, const float* probs, int64_t rows) {
  std::vector<bool> seen(rows);
  for (int64_t i = 0; i < pairs; ++i) {
    const bool weighs = !probs || probs[i] != 0.0f;
    RULE(".sorted-indices", where[i] >= 0, op, ": sorted_indices must lie in [0, ", pairs - 1, "], got ", where[i]);
    STRICT(".sorted-indices", where[i] < pairs, op, ": sorted_indices must lie in [0, ", pairs - 1, "], got ", where[i]);
    if (where[i] >= rows || !weighs) continue;
    STRICT(".each-row-once", !seen[where[i]], op, ": sorted_indices must name each row once (or with a weight of zero), got ", where[i], " twice");
    seen[where[i]] = true;
  }
}

// torch_npu/_op_plugin_docs.py: npu_moe_token_unpermute: out[t] = sum over k of probs[t, k] * permuted[sorted[t * K + k]], summed in float32. A
// row after the last one (npu_moe_token_permute dropped it) counts as zero.
at::Tensor token_unpermute(const at::Tensor& permuted_tokens, const at::Tensor& sorted_indices, const std::optional<at::Tensor>& probs,
                           bool padded_mode, at::OptionalIntArrayRef restore_shape) {
  static Tally& mine = tally("npu::npu_moe_token_unpermute");
  const char* op = "npu_moe_token_unpermute";
  count_call(mine);
  on_device(op, "permuted_tokens", permuted_tokens);
  on_device(op, "sorted_indices", sorted_indices);
  RULE("npu_moe_token_unpermute.rank", permuted_tokens.dim() == 2, op, ": permuted_tokens must be [rows, H], got ", permuted_tokens.sizes());
  RULE("npu_moe_token_unpermute.indices-dtype", sorted_indices.scalar_type() == at::kInt, op, ": sorted_indices must be int32, got ",
       sorted_indices.scalar_type());
  RULE("npu_moe_token_unpermute.indices-rank", sorted_indices.dim() == 1, op, ": sorted_indices must be [tokens * K], got ", sorted_indices.sizes());
  RULE("npu_moe_token_unpermute.padded-mode", !padded_mode && !restore_shape, op, ": padded_mode must be False and restore_shape None");
  const int64_t pairs = sorted_indices.size(0), rows = permuted_tokens.size(0), size = permuted_tokens.size(1);
  const bool weighted = probs && probs->defined();
  at::Tensor weights;
  int64_t k = 1;
  if (weighted) {
    on_device(op, "probs", *probs);
    RULE("npu_moe_token_unpermute.probs-dtype", is_float(probs->scalar_type()), op, ": probs must be float16, bfloat16 or float32, got ",
         probs->scalar_type());
    RULE("npu_moe_token_unpermute.probs-shape", probs->dim() == 2 && probs->numel() == pairs, op, ": probs must be [tokens, K] with tokens * K = ",
         pairs, ", got ", probs->sizes());
    k = probs->size(1);
    STRICT("npu_moe_token_unpermute.top-k", k <= 512, op, ": K must not exceed 512, got ", k);
    weights = floats(*probs);
  }
  const int64_t tokens = pairs / std::max<int64_t>(1, k);
  const at::Tensor from = dense(permuted_tokens), indices = dense(sorted_indices);
  const int32_t* where = static_cast<const int32_t*>(indices.const_data_ptr());
  const float* w = weighted ? weights.const_data_ptr<float>() : nullptr;
  check_sorted(op, where, pairs, w, rows);
  at::Tensor out = at::empty({tokens, size}, permuted_tokens.options());
  by_type(op, permuted_tokens.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* read = static_cast<const T*>(from.const_data_ptr());
    T* write = static_cast<T*>(out.data_ptr());
    parallel(tokens, 2 * k * size, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(size);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t j = t * k; j < (t + 1) * k; ++j) {
          if (where[j] >= rows) continue;
          const T* row = read + where[j] * size;
          const float weight = w ? w[j] : 1.0f;
#pragma omp simd
          for (int64_t c = 0; c < size; ++c) sum[c] += weight * static_cast<float>(row[c]);
        }
        std::copy(sum.begin(), sum.end(), write + t * size);
      }
    });
  });
  return out;
}

// What torch_npu's autograd kernel of npu_moe_token_unpermute calls; the second result is for its backward.
std::tuple<at::Tensor, at::Tensor> token_unpermute_for_autograd(const at::Tensor& permuted_tokens, const at::Tensor& sorted_indices,
                                                                const std::optional<at::Tensor>& probs, bool padded_mode,
                                                                at::OptionalIntArrayRef restore_shape) {
  return {token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape), permuted_tokens};
}

// aclnnMoeReRouting (not in _op_plugin_docs.py): rows that came rank by rank, in each rank expert by expert, ordered by expert.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> re_routing(const at::Tensor& tokens, const at::Tensor& expert_token_num_per_rank,
                                                                      const std::optional<at::Tensor>& per_token_scales,
                                                                      int64_t expert_token_num_type, int64_t idx_type,
                                                                      std::optional<int64_t> tokens_dtype) {
  static Tally& mine = tally("npu::npu_moe_re_routing");
  const char* op = "npu_moe_re_routing";
  count_call(mine);
  on_device(op, "tokens", tokens);
  on_device(op, "expert_token_num_per_rank", expert_token_num_per_rank);
  const at::ScalarType type = tokens.scalar_type(), counts_type = expert_token_num_per_rank.scalar_type();
  TORCH_CHECK(tokens.dim() == 2 && (is_float(type) || type == at::kChar), op, ": tokens must be float16, bfloat16 or int8 [A, H], got ", type,
              " ", tokens.sizes());
  STRICT("npu_moe_re_routing.dtype", type != at::kFloat, op, ": tokens must be float16, bfloat16 or int8, got ", type);
  STRICT("npu_moe_re_routing.size", tokens.size(1) > 0 && tokens.size(1) < 16384, op, ": H must lie in [1, 16383], got ", tokens.size(1));
  TORCH_CHECK(expert_token_num_per_rank.dim() == 2 && (counts_type == at::kInt || counts_type == at::kLong), op,
              ": expert_token_num_per_rank must be int32 or int64 [ranks, experts], got ", counts_type, " ", expert_token_num_per_rank.sizes());
  TORCH_CHECK(expert_token_num_type == 1, op, ": expert_token_num_type must be 1 (counts), got ", expert_token_num_type);
  TORCH_CHECK(idx_type == 0, op, ": idx_type must be 0 (gather), got ", idx_type);
  TORCH_CHECK(!tokens_dtype, op, ": tokens_dtype is not simulated");
  const int64_t rows = tokens.size(0), ranks = expert_token_num_per_rank.size(0), experts = expert_token_num_per_rank.size(1);
  const at::Tensor numbers = longs(expert_token_num_per_rank), from = dense(tokens);
  const int64_t* n = numbers.const_data_ptr<int64_t>();
  std::vector<int64_t> begins(ranks * experts + 1), totals(experts);
  for (int64_t i = 0; i < ranks * experts; ++i) {
    TORCH_CHECK(n[i] >= 0, op, ": expert_token_num_per_rank must not be negative, got ", n[i]);
    begins[i + 1] = begins[i] + n[i], totals[i % experts] += n[i];
  }
  TORCH_CHECK(begins.back() == rows, op, ": expert_token_num_per_rank must add up to the ", rows, " tokens, got ", begins.back());
  at::Tensor source = at::empty({rows}, tokens.options().dtype(at::kInt));
  int32_t* to = static_cast<int32_t*>(source.data_ptr());
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t r = 0; r < ranks; ++r) {
      const int64_t at = r * experts + e;
      std::iota(to, to + n[at], static_cast<int32_t>(begins[at]));
      to += n[at];
    }
  to = static_cast<int32_t*>(source.data_ptr());
  at::Tensor out = at::empty(tokens.sizes(), tokens.options());
  gather_rows(from, out, rows, [&](int64_t i) { return to[i]; });
  at::Tensor scales = at::empty({rows}, tokens.options().dtype(at::kFloat));
  if (per_token_scales && per_token_scales->defined()) {
    on_device(op, "per_token_scales", *per_token_scales);
    TORCH_CHECK(per_token_scales->scalar_type() == at::kFloat && per_token_scales->dim() == 1 && per_token_scales->size(0) == rows, op,
                ": per_token_scales must be float32 [", rows, "], got ", per_token_scales->scalar_type(), " ", per_token_scales->sizes());
    gather_rows(dense(*per_token_scales), scales, rows, [&](int64_t i) { return to[i]; });
  }
  at::Tensor sums = at::empty({experts}, expert_token_num_per_rank.options());
  at::AutoDispatchBelowADInplaceOrView below;
  cpu_alias(sums).copy_(at::from_blob(totals.data(), {experts}, at::kLong));
  return {out, scales, source, sums};
}

}  // namespace

void install_moe_permute(torch::Library& npu) {
  npu.impl("npu_moe_token_permute", TORCH_FN(token_permute));
  npu.impl("npu_moe_token_unpermute", TORCH_FN(token_unpermute));
  npu.impl("_npu_moe_token_unpermute", TORCH_FN(token_unpermute_for_autograd));
  npu.impl("npu_moe_re_routing", TORCH_FN(re_routing));
}

}  // namespace ascend_sim
