// SPDX-License-Identifier: Apache-2.0
//
// npu_moe_distribute_combine_v2: what the experts made of a token returns to its rank and is added up.
#include "moe_exchange.h"

namespace ascend_sim {
namespace exchange {
namespace {

struct Home {  // where a row belongs on its rank
  int32_t token, k;
};

// Rows of expand_x for each rank, rank by rank with their homes, from the ends of each (expert, rank) that dispatch wrote.
struct Returning {
  at::Tensor rows;
  std::vector<int64_t> counts;
};

Returning returning(const Layout& l, const at::Tensor& expand_x, const at::Tensor& assist_info, const at::Tensor& ep_send_counts) {
  const at::Tensor x = dense(expand_x), assist = dense(assist_info), given = dense(ep_send_counts);
  const int32_t *ends = static_cast<const int32_t*>(given.const_data_ptr()), *note = static_cast<const int32_t*>(assist.const_data_ptr());
  const int64_t total = ends[l.world * l.local - 1], size = x.size(1) * x.element_size(), bytes = size + sizeof(Home);
  TORCH_CHECK(total >= 0 && total <= x.size(0) && total * 128 <= assist.numel(), l.op, ": ep_send_counts end at row ", total,
              ", beyond expand_x ", x.sizes(), " or assist_info_for_combine ", assist.sizes());
  Returning out{at::empty({total, bytes}, at::kByte), std::vector<int64_t>(l.world)};
  char* to = static_cast<char*>(out.rows.data_ptr());
  for (int64_t r = 0; r < l.world; ++r)
    for (int64_t e = 0; e < l.local; ++e) {
      const int64_t at = e * l.world + r, begin = at ? ends[at - 1] : 0;
      TORCH_CHECK(begin >= 0 && begin <= ends[at] && ends[at] <= total, l.op, ": ep_send_counts must be the ep_recv_counts of the dispatch");
      out.counts[r] += ends[at] - begin;
      for (int64_t i = begin; i < ends[at]; ++i, to += bytes) {
        TORCH_CHECK(note[i * 128] == r, l.op, ": assist_info_for_combine and ep_send_counts must be those of one dispatch");
        const Home home{note[i * 128 + 1], note[i * 128 + 2]};
        std::memcpy(to, static_cast<const char*>(x.const_data_ptr()) + i * size, size);
        std::memcpy(to + size, &home, sizeof home);
      }
    }
  return out;
}

// All ranks learn how many rows each sends to and expects of each, so that either all fail or none waits for another.
void agree(const Layout& l, const std::vector<int64_t>& sent, const std::vector<int64_t>& expected) {
  std::vector<int64_t> mine = sent;
  mine.insert(mine.end(), expected.begin(), expected.end());
  const at::Tensor all = all_gather(l, mine);
  const auto table = all.accessor<int64_t, 2>();
  for (int64_t from = 0; from < l.world; ++from)
    for (int64_t to = 0; to < l.world; ++to)
      TORCH_CHECK(table[from][to] == table[to][l.world + from], l.op, ": expert_ids and x_active_mask must be those of the dispatch: rank ", to,
                  " expects ", table[to][l.world + from], " rows of rank ", from, ", which has ", table[from][to]);
}

// out[t] = sum over k of scales[t, k] * row + shared[t], in float32, rounded once.
template <class T>
void add_up(const std::vector<const char*>& row_of, const float* scales, const T* shared, int64_t k, int64_t size, T* out) {
  const int64_t tokens = static_cast<int64_t>(row_of.size()) / k;
  parallel(tokens, 2 * k * size, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(size);
    for (int64_t t = begin; t < end; ++t) {
      const auto first = row_of.begin() + t * k;
      if (!shared && std::none_of(first, first + k, [](const char* row) { return row; })) continue;  // masked: not written
      for (int64_t d = 0; d < size; ++d) sum[d] = shared ? static_cast<float>(shared[t * size + d]) : 0.0f;
      for (int64_t j = t * k; j < (t + 1) * k; ++j) {
        if (!row_of[j]) continue;
        const char* row = row_of[j];
        for (int64_t d = 0; d < size; ++d) {
          T value;
          std::memcpy(&value, row + d * sizeof(T), sizeof value);  // rows are not aligned
          sum[d] += scales[j] * static_cast<float>(value);
        }
      }
      std::copy(sum.begin(), sum.end(), out + t * size);
    }
  });
}

at::Tensor combine(const at::Tensor& expand_x, const at::Tensor& expert_ids, const at::Tensor& assist_info, const at::Tensor& ep_send_counts,
                   const at::Tensor& expert_scales, c10::string_view group_ep, int64_t ep_world_size, int64_t ep_rank_id, int64_t moe_expert_num,
                   const MaybeTensor&, const MaybeTensor& x_active_mask, const MaybeTensor&,
                   const MaybeTensor& shared_expert_x, const MaybeTensor& elastic_info,
                   const MaybeTensor& ori_x, const MaybeTensor& const_expert_alpha_1,
                   const MaybeTensor& const_expert_alpha_2, const MaybeTensor& const_expert_v,
                   const MaybeTensor& performance_info, c10::string_view group_tp, int64_t tp_world_size, int64_t,
                   int64_t expert_shard_type, int64_t, int64_t shared_expert_rank_num, int64_t, int64_t comm_quant_mode, c10::string_view,
                   int64_t zero_expert_num, int64_t copy_expert_num, int64_t const_expert_num) {
  static Tally& mine = tally("npu::npu_moe_distribute_combine_v2");
  const char* op = "npu_moe_distribute_combine_v2";
  count_call(mine);
  TORCH_CHECK(!elastic_info && !performance_info && !ori_x && !const_expert_alpha_1 && !const_expert_alpha_2 && !const_expert_v &&
                  !zero_expert_num && !copy_expert_num && !const_expert_num,
              op, ": elastic_info, performance_info and special experts are not simulated");
  TORCH_CHECK(comm_quant_mode == 0, op, ": comm_quant_mode must be 0 (2 is not simulated), got ", comm_quant_mode);
  const Layout l =
      layout_of(op, group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size, shared_expert_rank_num, expert_shard_type);
  check_tokens(l, "expand_x", expand_x, expert_ids);
  const int64_t batch = expert_ids.size(0), k = expert_ids.size(1), size = expand_x.size(1);
  TORCH_CHECK(expert_scales.scalar_type() == at::kFloat && expert_scales.sizes() == expert_ids.sizes(), op,
              ": expert_scales must be float32 of the shape of expert_ids, got ", expert_scales.scalar_type(), " ", expert_scales.sizes());
  TORCH_CHECK(assist_info.scalar_type() == at::kInt && ep_send_counts.scalar_type() == at::kInt && ep_send_counts.numel() >= l.world * l.local, op,
              ": assist_info_for_combine and ep_send_counts must be int32, ep_send_counts with at least ep_world_size * experts of a rank = ",
              l.world * l.local, " numbers, got ", ep_send_counts.sizes());
  TORCH_CHECK(!shared_expert_x || (shared_expert_x->scalar_type() == expand_x.scalar_type() && shared_expert_x->numel() == batch * size), op,
              ": shared_expert_x must have the data type of expand_x and BS * H numbers");
  const std::vector<int64_t> expected = by_rank(l, choices_of(l, expert_ids, x_active_mask));
  const Returning back = returning(l, expand_x, assist_info, ep_send_counts);
  agree(l, back.counts, expected);
  count_traffic(op, *l.group, others(l, back.counts) * size * expand_x.element_size());
  const at::Tensor rows = all_to_all(l, back.rows, back.counts, expected);

  std::vector<const char*> row_of(batch * k);
  const int64_t bytes = rows.size(1);
  for (int64_t i = 0; i < rows.size(0); ++i) {
    const char* row = static_cast<const char*>(rows.const_data_ptr()) + i * bytes;
    Home home;
    std::memcpy(&home, row + bytes - sizeof home, sizeof home);
    TORCH_CHECK(home.token >= 0 && home.token < batch && home.k >= 0 && home.k < k, op, ": assist_info_for_combine is not that of the dispatch");
    row_of[home.token * k + home.k] = row;
  }
  const at::Tensor scales = dense(expert_scales), shared = shared_expert_x ? dense(*shared_expert_x) : at::Tensor();
  at::Tensor out = at::empty({batch, size}, expand_x.options());
  by_type(op, expand_x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    add_up(row_of, static_cast<const float*>(scales.const_data_ptr()), shared.defined() ? static_cast<const T*>(shared.const_data_ptr()) : nullptr,
           k, size, static_cast<T*>(out.data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace exchange

void install_moe_combine(torch::Library& npu) { npu.impl("npu_moe_distribute_combine_v2", TORCH_FN(exchange::combine)); }

}  // namespace ascend_sim
