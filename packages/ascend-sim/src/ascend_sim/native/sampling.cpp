// SPDX-License-Identifier: Apache-2.0
//
// Filters before sampling.
#include <numeric>

#include "kernels.h"

namespace ascend_sim {
namespace {

// One row of steps 1 to 9: `row` keeps its numbers where they survive, else becomes -inf.
template <class T>
void filter(T* row, int64_t size, const int32_t* k, const float* p) {
  const T lowest = static_cast<T>(-std::numeric_limits<float>::infinity());
  if (k) {
    std::vector<float> values(row, row + size);
    auto kth = values.begin() + (size - *k);
    std::nth_element(values.begin(), kth, values.end());
    const float threshold = *kth;
    for (int64_t i = 0; i < size; ++i)
      if (static_cast<float>(row[i]) < threshold) row[i] = lowest;
  }
  if (!p) return;
  std::vector<int32_t> order;
  order.reserve(k ? *k + 16 : size);
  for (int64_t i = 0; i < size; ++i)
    if (static_cast<float>(row[i]) != -std::numeric_limits<float>::infinity()) order.push_back(static_cast<int32_t>(i));
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return static_cast<float>(row[a]) < static_cast<float>(row[b]); });
  const float top = static_cast<float>(row[order.back()]);
  double total = 0, sum = 0;
  std::vector<float> exps(order.size());
  for (size_t i = 0; i < order.size(); ++i) total += exps[i] = std::exp(static_cast<float>(row[order[i]]) - top);
  for (size_t i = 0; i + 1 < order.size(); ++i) {
    sum += exps[i] / total;
    if (static_cast<float>(sum) > 1.0f - *p) break;
    row[order[i]] = lowest;
  }
}

// torch_npu/_op_plugin_docs.py: npu_top_k_top_p
at::Tensor top_k_top_p(const at::Tensor& logits, const std::optional<at::Tensor>& p, const std::optional<at::Tensor>& k) {
  static Tally& mine = tally("npu::npu_top_k_top_p");
  const char* op = "npu_top_k_top_p";
  count_call(mine);
  const bool has_p = p && p->defined(), has_k = k && k->defined();
  on_device(op, "logits", logits);
  RULE("npu_top_k_top_p.p-or-k", has_p || has_k, op, ": p and k must not both be None");
  RULE("npu_top_k_top_p.rank", logits.dim() == 2, op, ": logits must be [batch, vocabulary], got ", logits.sizes());
  const int64_t rows = logits.size(0), size = logits.size(1);
  at::Tensor ps, ks;
  if (has_p) {
    on_device(op, "p", *p);
    RULE("npu_top_k_top_p.p-shape", p->dim() == 1 && p->size(0) == rows, op, ": p must hold one number per row, got ", p->sizes());
    STRICT("npu_top_k_top_p.p-dtype", p->scalar_type() == logits.scalar_type(), op, ": p must have the data type of logits, got ", p->scalar_type(), " and ",
           logits.scalar_type());
    ps = floats(*p);
    for (int64_t r = 0; r < rows; ++r)
      STRICT("npu_top_k_top_p.p-range", ps.const_data_ptr<float>()[r] >= 0 && ps.const_data_ptr<float>()[r] <= 1, op, ": p must lie in [0, 1], got ",
             ps.const_data_ptr<float>()[r]);
  }
  if (has_k) {
    on_device(op, "k", *k);
    RULE("npu_top_k_top_p.k-shape", k->dim() == 1 && k->size(0) == rows, op, ": k must hold one number per row, got ", k->sizes());
    RULE("npu_top_k_top_p.k-dtype", k->scalar_type() == at::kInt, op, ": k must be int32, got ", k->scalar_type());
    ks = dense(*k);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t value = ks.const_data_ptr<int32_t>()[r];
      RULE("npu_top_k_top_p.k-range", value >= 1 && value <= size, op, ": k must lie in [1, ", size, "], got ", value);
      STRICT("npu_top_k_top_p.k-range", value <= 1024, op, ": k must lie in [1, 1024], got ", value);
    }
  }
  at::Tensor out = to_npu(dense(logits), logits.device());
  by_type(op, logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(out.data_ptr());
    parallel(rows, 8 * size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        filter(to + r * size, size, has_k ? ks.const_data_ptr<int32_t>() + r : nullptr, has_p ? ps.const_data_ptr<float>() + r : nullptr);
    });
  });
  return out;
}

}  // namespace

void install_sampling(torch::Library& npu) { npu.impl("npu_top_k_top_p", TORCH_FN(top_k_top_p)); }

}  // namespace ascend_sim
