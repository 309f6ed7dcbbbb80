// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of mixtures of experts share.
#pragma once
#include "kernels.h"

namespace ascend_sim {

// A new tensor of zeros, past the dispatcher: what a kernel does inside is not counted as operators of its own.
inline at::Tensor zeros(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor out = at::empty(shape, options);
  if (out.numel()) std::memset(out.data_ptr(), 0, out.nbytes());
  return out;
}

inline at::Tensor longs(const at::Tensor& t) {
  at::AutoDispatchBelowADInplaceOrView below;
  return cpu_alias(t).to(at::kLong).contiguous();
}

// The places of `ids` in ascending order of id, equals in their own order; ids outside [first, last) are left out.
inline std::vector<int32_t> sorted_places(const at::Tensor& ids, int64_t first, int64_t last) {
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<int32_t> places;
  places.reserve(ids.numel());
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (id[i] >= first && id[i] < last) places.push_back(static_cast<int32_t>(i));
  std::stable_sort(places.begin(), places.end(), [&](int32_t a, int32_t b) { return id[a] < id[b]; });
  return places;
}

// Row i of `to` is row source(i) of `from`, for i < count; later rows are not written.
template <class F>
void gather_rows(const at::Tensor& from, const at::Tensor& to, int64_t count, const F& source) {
  if (to.numel() == 0) return;
  const int64_t bytes = from.element_size() * from.numel() / std::max<int64_t>(1, from.size(0));
  const char* read = static_cast<const char*>(from.const_data_ptr());
  char* write = static_cast<char*>(to.data_ptr());
  parallel(count, bytes / 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(write + i * bytes, read + source(i) * bytes, bytes);
  });
}

// Dynamic quantisation of one row (torch_npu/_op_plugin_docs.py: npu_dynamic_quant): returns scale = max |row| / 127, writes
// round(row / scale), halves to even.
inline float quantise(const float* row, int64_t size, int8_t* out) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < size; ++i) most = std::max(most, std::abs(row[i]));
  const float scale = most / 127.0f, divisor = scale > 0 ? scale : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<int8_t>(std::nearbyint(row[i] / divisor));
  return scale;
}

// The ends of the groups of rows in a group list of counts or of cumulative counts: rising, none beyond `rows`.
inline std::vector<int64_t> group_ends(const char* op, const char* argument, const at::Tensor& list, bool counts, int64_t rows) {
  on_device(op, argument, list);
  RULE(".groups-dtype", list.scalar_type() == at::kLong, op, ": ", argument, " must be int64, got ", list.scalar_type());
  RULE(".groups-rank", list.dim() == 1, op, ": ", argument, " must have 1 dimension, got ", list.sizes());
  const at::Tensor given = dense(list);
  const int64_t* numbers = given.const_data_ptr<int64_t>();
  std::vector<int64_t> ends(list.size(0));
  for (size_t i = 0; i < ends.size(); ++i) {
    const int64_t before = i ? ends[i - 1] : 0;
    ends[i] = numbers[i] + (counts ? before : 0);
    RULE(".groups", ends[i] >= before && ends[i] <= rows, op, ": ", argument, counts ? " (counts)" : " (cumulative counts)",
         " must name rising rows, at most ", rows, ", got ", numbers[i], " at [", i, "]");
  }
  return ends;
}

// int32 [m, n] of int8 x [m, k] and weight [k, n] in host memory, exact.
at::Tensor int8_product(const at::Tensor& x, const at::Tensor& weight);

}  // namespace ascend_sim
