// SPDX-License-Identifier: Apache-2.0
//
// The int8 matrix product, exact in int32.
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>

#include "moe.h"

namespace ascend_sim {
namespace {

// Rows of b lie in memory one after the other: b is read once, in stretches of columns whose sums stay in the cache.
void by_rows(const int8_t* a, const int8_t* b, int32_t* out, int64_t m, int64_t k, int64_t n, int64_t step) {
  constexpr int64_t stretch = 512;
  parallel((n + stretch - 1) / stretch, m * k * stretch, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * stretch; first < std::min(end * stretch, n); first += stretch) {
      const int64_t width = std::min(stretch, n - first);
      for (int64_t r = 0; r < m; ++r) std::fill_n(out + r * n + first, width, 0);
      for (int64_t i = 0; i < k; i += 2) {
        const int8_t *b0 = b + i * step + first, *b1 = i + 1 < k ? b0 + step : b0;
        for (int64_t r = 0; r < m; ++r) {
          const int16_t a0 = a[r * k + i], a1 = i + 1 < k ? a[r * k + i + 1] : 0;
          int32_t* to = out + r * n + first;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c)
            to[c] += static_cast<int32_t>(static_cast<int16_t>(a0 * b0[c])) + static_cast<int32_t>(static_cast<int16_t>(a1 * b1[c]));
        }
      }
    }
  });
}

// Columns of b lie in memory one after the other.
void by_columns(const int8_t* a, const int8_t* b, int32_t* out, int64_t m, int64_t k, int64_t n) {
  parallel(n, m * k, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t r = 0; r < m; ++r) {
        const int8_t *x = a + r * k, *y = b + c * k;
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < k; ++i) sum += static_cast<int16_t>(x[i]) * static_cast<int16_t>(y[i]);
        out[r * n + c] = sum;
      }
  });
}

// Whether torch's own product is exact here. Without VNNI oneDNN adds pairs of products in int16, which saturates; what it uses depends on the processor and on
// ONEDNN_MAX_CPU_ISA, so it is asked once.
bool library_is_exact() {
  static const bool exact = [] {
    const auto options = at::TensorOptions().dtype(at::kChar);
    const at::Tensor products = at::_int_mm(at::full({17, 64}, 127, options), at::full({64, 65}, 127, options));
    const int32_t* found = products.const_data_ptr<int32_t>();
    return std::all_of(found, found + products.numel(), [](int32_t sum) { return sum == 64 * 127 * 127; });
  }();
  return exact;
}

}  // namespace

at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b) {
  at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor left = cpu_alias(a).contiguous(), given = cpu_alias(b);
  const int64_t m = left.size(0), k = left.size(1), n = given.size(1);
  if (m > 1 && k > 1 && library_is_exact()) return at::_int_mm(left, given);  // for k = 1 it is wrong, for one row slow
  at::Tensor out = at::empty({m, n}, at::TensorOptions().dtype(at::kInt));
  const bool columns = given.stride(0) == 1 && given.stride(1) == k;
  const at::Tensor right = columns || given.stride(1) == 1 ? given : given.contiguous();
  const int8_t *x = left.const_data_ptr<int8_t>(), *y = right.const_data_ptr<int8_t>();
  if (columns) by_columns(x, y, out.data_ptr<int32_t>(), m, k, n);
  else by_rows(x, y, out.data_ptr<int32_t>(), m, k, n, right.stride(0));
  return out;
}

}  // namespace ascend_sim
