// SPDX-License-Identifier: Apache-2.0
//
// What the reference kernels share: element types, rows spread over the cores, an exponential that vectorises.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "alias.h"

namespace ascend_sim {

// Call f(T{}) for the element type; the hardware's kernels of these families know these three.
template <class F>
void by_type(const char* op, at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat: return f(float{});
    case at::kHalf: return f(at::Half{});
    case at::kBFloat16: return f(at::BFloat16{});
    default: RULE(".dtype", false, op, ": data type must be float16, bfloat16 or float32, got ", type);
  }
}

inline bool is_float(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

// The tensor itself where its memory is contiguous, else a copy in host memory: to read from, by data pointer.
inline at::Tensor dense(const at::Tensor& t) {
  if (t.is_contiguous()) return t;
  at::AutoDispatchBelowADInplaceOrView below;
  return cpu_alias(t).contiguous();
}

// Whether a tensor has the format FRACTAL_NZ (format.cpp).
bool is_fractal(const at::Tensor& t);

// An operand that may have the format FRACTAL_NZ: the weight of some products.
inline void on_device_in_any_format(const char* op, const char* argument, const at::Tensor& t) {
  TORCH_CHECK(on_npu(t), op, ": ", argument, " must be on the npu, got ", t.defined() ? t.device().str() : "an undefined tensor");
}

inline void on_device(const char* op, const char* argument, const at::Tensor& t) {
  on_device_in_any_format(op, argument, t);
  TORCH_CHECK(!strict() || !is_fractal(t), op, ": ", argument, " must have the format ND, got FRACTAL_NZ; npu_format_cast(", argument,
              ", 2) converts it (ASCEND_SIM_STRICT=0 allows it)");
}

// Run f(begin, end) over [0, count), on several cores where there is enough to do: `work` is about the element operations of one row.
template <class F>
void parallel(int64_t count, int64_t work, const F& f) {
  if (count <= 0) return;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work));
  if (count <= grain) f(int64_t{0}, count);
  else at::parallel_for(0, count, grain, f);
}

// e^x within 2 units in the last place (Cephes' expf), without branches so that loops over it vectorise. Clamped to [e^-87, e^88].
inline float fast_exp(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the nearest integer ends up in the low bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (std::bit_cast<int32_t>(shifted) - 0x4B400000 + 127) << 23;
  return p * std::bit_cast<float>(power);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

inline at::Tensor floats(const at::Tensor& t) {
  at::AutoDispatchBelowADInplaceOrView below;
  return cpu_alias(t).to(at::kFloat).contiguous();
}

inline void count_call(Tally& mine, int64_t flops = 0) {
  mine.calls.fetch_add(1, std::memory_order_relaxed);
  if (flops) mine.flops.fetch_add(flops, std::memory_order_relaxed);
}

}  // namespace ascend_sim
