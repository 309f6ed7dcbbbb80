// SPDX-License-Identifier: Apache-2.0
//
// npu_moe_distribute_dispatch_v2: each token goes to the ranks of its experts. Shapes are those of the meta function.
#include "moe_exchange.h"

namespace ascend_sim {
namespace exchange {
namespace {

// Rows for each rank and local expert of this rank, [source * local + expert], and every rank's BS.
struct Arrivals {
  std::vector<int64_t> counts, batches;
};

// Tell every rank what it will get. All see the same batches, so either all fail here or none waits for another.
Arrivals announce(const Layout& l, const std::vector<Choice>& choices, int64_t batch, int64_t pairs, int64_t global_bs) {
  std::vector<int64_t> mine(l.experts + 2);
  for (const Choice& c : choices) ++mine[c.expert];
  mine[l.experts] = batch, mine[l.experts + 1] = static_cast<int64_t>(choices.size()) < pairs;
  const at::Tensor all = all_gather(l, mine);
  Arrivals a;
  bool masked = false;
  for (int64_t r = 0; r < l.world; ++r) {
    const int64_t* from = all.const_data_ptr<int64_t>() + r * (l.experts + 2);
    a.counts.insert(a.counts.end(), from + l.rank * l.local, from + (l.rank + 1) * l.local);
    a.batches.push_back(from[l.experts]);
    masked = masked || from[l.experts + 1];
  }
  const auto [least, most] = std::minmax_element(a.batches.begin(), a.batches.end());
  STRICT("npu_moe_distribute_dispatch_v2.batch", *least >= 1 && *most <= 512, l.op, ": BS must lie in [1, 512] on every rank, got ", a.batches);
  RULE("npu_moe_distribute_dispatch_v2.global-bs", *least == *most || global_bs > 0, l.op,
       ": global_bs must be max(BS) * ep_world_size where BS differs from rank to rank, got 0 with ", a.batches);
  RULE("npu_moe_distribute_dispatch_v2.global-bs", global_bs == 0 || global_bs == *most * l.world, l.op, ": global_bs must be 0 or max(BS) * ep_world_size = ", *most * l.world,
              ", got ", global_bs);
  STRICT("npu_moe_distribute_dispatch_v2.mask-of-equal-batches", *least == *most || !masked, l.op, ": x_active_mask must be all true where BS differs from rank to rank, ", a.batches);
  return a;
}

struct Note {  // goes with each token
  float scale, expert_scale;
  int32_t token, k;
};

// The rows to send: the token, quantised or not, and its note.
at::Tensor packed(const at::Tensor& x, const std::vector<Choice>& choices, const at::Tensor& scales, const at::Tensor& expert_scales,
                  bool quantised) {
  const int64_t size = x.size(1), item = quantised ? 1 : x.element_size(), bytes = size * item + sizeof(Note);
  const int64_t k = expert_scales.defined() ? expert_scales.size(1) : 0;
  at::Tensor rows = at::empty({static_cast<int64_t>(choices.size()), bytes}, at::kByte);
  char* out = static_cast<char*>(rows.data_ptr());
  by_type("npu_moe_distribute_dispatch_v2", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    parallel(static_cast<int64_t>(choices.size()), 4 * size, [&](int64_t begin, int64_t end) {
      std::vector<float> row(size);
      for (int64_t i = begin; i < end; ++i) {
        const Choice& c = choices[i];
        const T* token = from + c.token * size;
        Note note{0, k ? expert_scales.const_data_ptr<float>()[c.token * k + c.k] : 0, c.token, c.k};
        if (quantised) {
          std::copy(token, token + size, row.begin());
          if (scales.defined())
            for (int64_t d = 0; d < size; ++d) row[d] *= scales.const_data_ptr<float>()[c.expert * size + d];
          note.scale = quantise(row.data(), size, reinterpret_cast<int8_t*>(out + i * bytes));
        } else {
          std::memcpy(out + i * bytes, token, size * item);
        }
        std::memcpy(out + i * bytes + size * item, &note, sizeof note);
      }
    });
  });
  return rows;
}

// Rows by source rank.
std::vector<int64_t> sources(const Layout& l, const Arrivals& a) {
  std::vector<int64_t> out(l.world);
  for (size_t i = 0; i < a.counts.size(); ++i) out[i / l.local] += a.counts[i];
  return out;
}

using Dispatched = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What arrived, expert by expert and within an expert rank by rank. The three numbers of a row's assist_info are its rank, token and k;
// ep_recv_counts are the ends of the rows of each (expert, rank).
Dispatched unpacked(const Layout& l, const Arrivals& a, const at::Tensor& rows, const Dispatched& out, bool quantised, bool cumulative) {
  const auto& [expand_x, dynamic_scales, assist_info, expert_token_nums, ep_recv_counts, tp_recv_counts, expand_scales] = out;
  const int64_t size = expand_x.size(1) * expand_x.element_size(), bytes = rows.size(1);
  std::vector<int64_t> begins(a.counts.size() + 1);
  for (size_t i = 0; i < a.counts.size(); ++i) begins[i + 1] = begins[i] + a.counts[i];
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  int64_t row = 0;
  for (int64_t e = 0; e < l.local; ++e) {
    const int64_t first = row;
    for (int64_t r = 0; r < l.world; ++r) {
      for (int64_t i = begins[r * l.local + e]; i < begins[r * l.local + e + 1]; ++i, ++row) {
        Note note;
        std::memcpy(&note, from + i * bytes + size, sizeof note);
        std::memcpy(static_cast<char*>(expand_x.data_ptr()) + row * size, from + i * bytes, size);
        if (quantised) static_cast<float*>(dynamic_scales.data_ptr())[row] = note.scale;
        if (expand_scales.numel()) static_cast<float*>(expand_scales.data_ptr())[row] = note.expert_scale;
        int32_t* assist = static_cast<int32_t*>(assist_info.data_ptr()) + row * 128;
        assist[0] = static_cast<int32_t>(r), assist[1] = note.token, assist[2] = note.k;
      }
      static_cast<int32_t*>(ep_recv_counts.data_ptr())[e * l.world + r] = static_cast<int32_t>(row);
    }
    static_cast<int64_t*>(expert_token_nums.data_ptr())[e] = cumulative ? row : row - first;
  }
  return out;
}

// expand_x[rows of this rank's experts] = the tokens of all ranks that chose them; quant_mode 2: npu_dynamic_quant of x * scales[expert].
Dispatched dispatch(const at::Tensor& x, const at::Tensor& expert_ids, c10::string_view group_ep, int64_t ep_world_size, int64_t ep_rank_id,
                    int64_t moe_expert_num, const MaybeTensor& scales, const MaybeTensor& x_active_mask,
                    const MaybeTensor& expert_scales, const MaybeTensor& elastic_info,
                    const MaybeTensor& performance_info, c10::string_view group_tp, int64_t tp_world_size, int64_t,
                    int64_t expert_shard_type, int64_t, int64_t shared_expert_rank_num, int64_t quant_mode, int64_t global_bs,
                    int64_t expert_token_nums_type, c10::string_view, int64_t zero_expert_num, int64_t copy_expert_num, int64_t const_expert_num,
                    std::optional<int64_t> y_dtype, std::optional<int64_t> x_dtype, std::optional<int64_t> scales_dtype) {
  static Tally& mine = tally("npu::npu_moe_distribute_dispatch_v2");
  const char* op = "npu_moe_distribute_dispatch_v2";
  count_call(mine);
  TORCH_CHECK(!elastic_info && !performance_info && !y_dtype && !x_dtype && !scales_dtype && !zero_expert_num && !copy_expert_num &&
                  !const_expert_num,
              op, ": elastic_info, performance_info, special experts and data types of their own are not simulated");
  TORCH_CHECK(quant_mode == 0 || quant_mode == 2, op, ": quant_mode must be 0 (none) or 2 (dynamic), got ", quant_mode);
  RULE("npu_moe_distribute_dispatch_v2.token-nums-type", expert_token_nums_type == 0 || expert_token_nums_type == 1, op, ": expert_token_nums_type must be 0 (cumulative) or 1 (counts), got ",
              expert_token_nums_type);
  const Layout l =
      layout_of(op, group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size, shared_expert_rank_num, expert_shard_type);
  check_tokens(l, "x", x, expert_ids);
  const int64_t batch = x.size(0), size = x.size(1), k = expert_ids.size(1);
  RULE("npu_moe_distribute_dispatch_v2.ids-shape", expert_ids.size(0) == batch, op, ": expert_ids must have a row for each of the ", batch, " tokens, got ", expert_ids.sizes());
  RULE("npu_moe_distribute_dispatch_v2.scales", !scales || quant_mode == 2, op, ": scales needs quant_mode 2");
  TORCH_CHECK(!scales || (scales->scalar_type() == at::kFloat && scales->sizes() == at::IntArrayRef{l.experts, size}), op,
              ": scales must be float32 [moe_expert_num = ", l.experts, ", H = ", size, "], got ", scales->scalar_type(), " ", scales->sizes());
  TORCH_CHECK(!expert_scales || (expert_scales->scalar_type() == at::kFloat && expert_scales->sizes() == expert_ids.sizes()), op,
              ": expert_scales must be float32 of the shape of expert_ids, got ", expert_scales->scalar_type(), " ", expert_scales->sizes());

  const std::vector<Choice> choices = choices_of(l, expert_ids, x_active_mask);
  const Arrivals arrivals = announce(l, choices, batch, batch * k, global_bs);
  const bool quantised = quant_mode == 2;
  const at::Tensor smooth = scales ? floats(*scales) : at::Tensor(), weights = expert_scales ? floats(*expert_scales) : at::Tensor();
  const at::Tensor rows = packed(dense(x), choices, smooth, weights, quantised);
  const std::vector<int64_t> sent = by_rank(l, choices);
  count_traffic(op, *l.group, others(l, sent) * (quantised ? size + 4 : size * x.element_size()));
  const at::Tensor received = all_to_all(l, rows, sent, sources(l, arrivals));

  const int64_t everyone = global_bs ? global_bs : batch * l.world, room = everyone * std::min(l.local, k);
  auto vector = [&](int64_t count, at::ScalarType type) { return at::empty({count}, x.options().dtype(type)); };
  const Dispatched out = {at::empty({room, size}, x.options().dtype(quantised ? at::kChar : x.scalar_type())),
                          vector(room, at::kFloat),
                          vector(std::max(batch * k, room * 128), at::kInt),
                          vector(l.local, at::kLong),
                          vector(l.world * l.local + (expert_scales ? everyone * 2 * k * (l.world / 8) : 0), at::kInt),
                          zeros({tp_world_size}, x.options().dtype(at::kInt)),
                          vector(expert_scales ? room : 0, at::kFloat)};
  return unpacked(l, arrivals, received, out, quantised, expert_token_nums_type == 0);
}

}  // namespace
}  // namespace exchange

void install_moe_dispatch(torch::Library& npu) { npu.impl("npu_moe_distribute_dispatch_v2", TORCH_FN(exchange::dispatch)); }

}  // namespace ascend_sim
