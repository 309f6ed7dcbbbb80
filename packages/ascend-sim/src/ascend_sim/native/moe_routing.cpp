// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts: npu_moe_init_routing_v2, the tokens of a range of experts in expert order.
#include <numeric>

#include "moe.h"

namespace ascend_sim {
namespace {

struct Routing {
  int64_t first, last;          // the active experts
  const int64_t* ids;           // [tokens * k]
  std::vector<int32_t> places;  // of the active (token, expert) pairs, in expert order
  int64_t k, rows, valid;       // rows of the output, and how many of them hold a token
};

// The dynamic quantisation of x * scale, row by row; scale [1, H] or one row for each active expert, or undefined.
template <class T>
void quantise_rows(const Routing& r, const at::Tensor& x, const at::Tensor& scale, int8_t* out, float* scales) {
  const int64_t size = x.size(1);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  parallel(r.valid, 4 * size, [&](int64_t begin, int64_t end) {
    std::vector<float> row(size);
    for (int64_t i = begin; i < end; ++i) {
      const T* token = from + r.places[i] / r.k * size;
      std::copy(token, token + size, row.begin());
      if (scale.defined()) {
        const float* smooth = scale.const_data_ptr<float>() + (scale.size(0) > 1 ? (r.ids[r.places[i]] - r.first) * size : 0);
        for (int64_t c = 0; c < size; ++c) row[c] *= smooth[c];
      }
      scales[i] = quantise(row.data(), size, out + i * size);
    }
  });
}

// Counts (1), cumulative counts (0), or pairs of expert and count with (0, 0) after them (2).
at::Tensor token_numbers(const Routing& r, int64_t kind, int64_t experts, const at::TensorOptions& options) {
  std::vector<int64_t> counts(r.last - r.first);
  for (int32_t place : r.places) ++counts[r.ids[place] - r.first];
  at::Tensor out = kind == 2 ? zeros({experts, 2}, options) : at::empty({r.last - r.first}, options);
  int64_t* to = static_cast<int64_t*>(out.data_ptr());
  if (kind == 0) std::partial_sum(counts.begin(), counts.end(), to);
  if (kind == 1) std::copy(counts.begin(), counts.end(), to);
  if (kind != 2) return out;
  for (size_t e = 0; e < counts.size(); ++e)
    if (counts[e]) *to++ = r.first + static_cast<int64_t>(e), *to++ = counts[e];
  return out;
}

// gather (0): the row of pair i, or -1. scatter (1): the pair of row i; later ones are not written.
at::Tensor row_numbers(const Routing& r, int64_t kind, const at::TensorOptions& options, int64_t pairs) {
  at::Tensor out = at::empty({pairs}, options);
  int32_t* to = static_cast<int32_t*>(out.data_ptr());
  if (kind == 0) std::fill(to, to + pairs, -1);
  for (size_t i = 0; i < r.places.size(); ++i) (kind == 0 ? to[r.places[i]] : to[i]) = kind == 0 ? static_cast<int32_t>(i) : r.places[i];
  return out;
}

void check_scale(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& scale, int64_t quant_mode, int64_t active) {
  if (!scale || !scale->defined()) return;
  on_device(op, "scale", *scale);
  RULE("npu_moe_init_routing_v2.scale-dtype", scale->scalar_type() == at::kFloat, op, ": scale must be float32, got ", scale->scalar_type());
  const bool by_token = scale->dim() == 1 && scale->size(0) == x.size(0);
  const bool by_expert = scale->dim() == 2 && (scale->size(0) == active || scale->size(0) == 1) && scale->size(1) == x.size(1);
  RULE("npu_moe_init_routing_v2.scale-shape", quant_mode == -1 ? by_token : by_expert, op, ": scale must be [tokens = ", x.size(0), "] with quant_mode -1, [active experts = ",
              active, ", H = ", x.size(1), "] or [1, H] with quant_mode 1, got ", scale->sizes());
}

// torch_npu/_op_plugin_docs.py: npu_moe_init_routing_v2
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> init_routing(
    const at::Tensor& x, const at::Tensor& expert_idx, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& offset,
    int64_t active_num, int64_t, int64_t expert_num, int64_t drop_pad_mode, int64_t expert_tokens_num_type, bool expert_tokens_num_flag,
    int64_t quant_mode, at::IntArrayRef active_expert_range, int64_t row_idx_type, std::optional<int64_t> x_dtype) {
  static Tally& mine = tally("npu::npu_moe_init_routing_v2");
  const char* op = "npu_moe_init_routing_v2";
  count_call(mine);
  on_device(op, "x", x);
  on_device(op, "expert_idx", expert_idx);
  RULE("npu_moe_init_routing_v2.shape", x.dim() == 2 && expert_idx.dim() == 2 && x.size(0) == expert_idx.size(0), op,
       ": x must be [tokens, H] and expert_idx [tokens, K], got ", x.sizes(), " and ", expert_idx.sizes());
  RULE("npu_moe_init_routing_v2.dtype", is_float(x.scalar_type()) || x.scalar_type() == at::kChar, op, ": x must be float16, bfloat16, float32 or int8, got ",
              x.scalar_type());
  RULE("npu_moe_init_routing_v2.expert-idx-dtype", expert_idx.scalar_type() == at::kInt || expert_idx.scalar_type() == at::kLong, op,
       ": expert_idx must be int32, got ", expert_idx.scalar_type());
  STRICT("npu_moe_init_routing_v2.expert-idx-dtype", expert_idx.scalar_type() == at::kInt, op, ": expert_idx must be int32, got ", expert_idx.scalar_type());
  RULE("npu_moe_init_routing_v2.offset", !offset, op, ": offset must be None");
  TORCH_CHECK(!x_dtype, op, ": x_dtype is not simulated");
  RULE("npu_moe_init_routing_v2.drop-pad-mode", drop_pad_mode == 0, op, ": drop_pad_mode must be 0 (dropless), got ", drop_pad_mode);
  RULE("npu_moe_init_routing_v2.quant-mode", quant_mode == -1 || quant_mode == 1, op, ": quant_mode must be -1 (none) or 1 (dynamic), got ", quant_mode);
  RULE("npu_moe_init_routing_v2.int8-quant-mode", quant_mode == -1 || x.scalar_type() != at::kChar, op, ": x of int8 needs quant_mode -1");
  RULE("npu_moe_init_routing_v2.row-idx-type", row_idx_type == 0 || row_idx_type == 1, op, ": row_idx_type must be 0 (gather) or 1 (scatter), got ", row_idx_type);
  RULE("npu_moe_init_routing_v2.active-num", active_num >= -1, op, ": active_num must be at least -1, got ", active_num);
  RULE("npu_moe_init_routing_v2.expert-num", expert_num > 0, op, ": expert_num must be greater than 0, got ", expert_num);
  TORCH_CHECK(expert_tokens_num_type >= 0 && expert_tokens_num_type <= 2, op, ": expert_tokens_num_type must be 0, 1 or 2, got ",
              expert_tokens_num_type);
  STRICT("npu_moe_init_routing_v2.tokens-num-flag", expert_tokens_num_flag, op, ": expert_tokens_num_flag must be True");
  STRICT("npu_moe_init_routing_v2.tokens-num-type", expert_tokens_num_type != 0, op, ": expert_tokens_num_type must be 1 (counts) or 2 (pairs), got 0");
  STRICT("npu_moe_init_routing_v2.most-experts", expert_num <= (expert_tokens_num_type == 2 ? 5120 : 10240), op, ": expert_num must not exceed ",
         expert_tokens_num_type == 2 ? 5120 : 10240, ", got ", expert_num);
  RULE("npu_moe_init_routing_v2.expert-range",
       active_expert_range.empty() || (active_expert_range.size() == 2 && active_expert_range[0] >= 0 &&
                                       active_expert_range[0] < active_expert_range[1] && active_expert_range[1] <= expert_num),
       op, ": active_expert_range must be [start, end) within [0, expert_num = ", expert_num, "), got ", active_expert_range);
  const at::Tensor ids = longs(expert_idx), tokens = dense(x);
  Routing r;
  r.first = active_expert_range.empty() ? 0 : active_expert_range[0], r.last = active_expert_range.empty() ? expert_num : active_expert_range[1];
  r.ids = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    STRICT("npu_moe_init_routing_v2.expert-ids", r.ids[i] >= 0 && r.ids[i] < expert_num, op, ": expert_idx must lie in [0, expert_num = ", expert_num, "), got ", r.ids[i]);
  check_scale(op, x, scale, quant_mode, r.last - r.first);
  r.places = sorted_places(ids, r.first, r.last);
  r.k = expert_idx.size(1), r.rows = active_num > 0 ? std::min(active_num, ids.numel()) : ids.numel();
  r.valid = std::min<int64_t>(r.rows, static_cast<int64_t>(r.places.size()));

  const auto options = x.options();
  at::Tensor out = at::empty({r.rows, x.size(1)}, options.dtype(quant_mode == 1 ? at::kChar : x.scalar_type()));
  at::Tensor scales = at::empty({r.rows}, options.dtype(at::kFloat));
  float* s = static_cast<float*>(scales.data_ptr());
  if (quant_mode == -1) {
    gather_rows(tokens, out, r.valid, [&](int64_t i) { return r.places[i] / r.k; });
    if (scale && scale->defined()) {
      const at::Tensor given = dense(*scale);
      for (int64_t i = 0; i < r.valid; ++i) s[i] = static_cast<const float*>(given.const_data_ptr())[r.places[i] / r.k];
    }
  } else {
    const at::Tensor given = scale && scale->defined() ? floats(*scale) : at::Tensor();
    by_type(op, x.scalar_type(), [&](auto tag) { quantise_rows<decltype(tag)>(r, tokens, given, static_cast<int8_t*>(out.data_ptr()), s); });
  }
  at::Tensor numbers = expert_tokens_num_flag ? token_numbers(r, expert_tokens_num_type, expert_num, options.dtype(at::kLong))
                                              : zeros({}, options.dtype(at::kLong));
  return {out, row_numbers(r, row_idx_type, options.dtype(at::kInt), ids.numel()), numbers, scales};
}

}  // namespace

void install_moe_routing(torch::Library& npu) { npu.impl("npu_moe_init_routing_v2", TORCH_FN(init_routing)); }

}  // namespace ascend_sim
