// SPDX-License-Identifier: Apache-2.0
#include "matmul.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "kernels.h"
#include "lanes.h"

namespace ascend_sim {
namespace {

// Beyond, the CPU's libraries are faster: they pack their operands, and multiply bfloat16 as it is.
constexpr int64_t most_rows(at::ScalarType type) { return type == at::kFloat ? 128 : type == at::kBFloat16 ? 8 : 0; }
constexpr int tile_columns = 8;  // rows of the weight in a tile: with three rows of `left`, 24 of the 32 AVX-512 registers hold sums

template <class T>
struct Product {
  const T *left, *right;  // rows of `depth` contiguous elements
  const T* bias;          // or null
  T* out;
  int64_t rows, columns, depth, left_stride, right_stride;
};

// out[c][r] for C rows of `left` from `row` on and R rows of the weight from `column` on. The first tile of a strip also asks for the weight of
// the next strip, so that memory is read while the others compute.
template <class T, int R, int C, bool First>
void tile(const Product<T>& p, int64_t row, int64_t column) {
  const T *w = p.right + column * p.right_stride, *x = p.left + row * p.left_stride;
  Lanes sums[(R * C + lanes - 1) / lanes * lanes] = {};
  for (int64_t k = 0; k < p.depth; k += lanes) {
    Lanes weight[R];
    for (int r = 0; r < R; ++r) {
      weight[r] = vload(w + r * p.right_stride + k);
      if constexpr (First) __builtin_prefetch(w + (r + R) * p.right_stride + k, 0, 2);
    }
    for (int c = 0; c < C; ++c) {
      const Lanes value = vload(x + c * p.left_stride + k);
      for (int r = 0; r < R; ++r) sums[c * R + r] += weight[r] * value;
    }
  }
  float flat[sizeof sums / sizeof(Lanes)];
  for (size_t i = 0; i < std::size(flat); i += lanes) {
    const Lanes sum = totals(sums + i);
    std::memcpy(flat + i, &sum, sizeof sum);
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      const float bias = p.bias ? static_cast<float>(p.bias[column + r]) : 0.0f;
      p.out[(row + c) * p.columns + column + r] = static_cast<T>(flat[c * R + r] + bias);
    }
}

// All rows of `left`, C at a time, against R rows of the weight, which stay in the first cache meanwhile.
template <class T, int R, int C>
void strip(const Product<T>& p, int64_t column) {
  if (p.rows == 1) return tile<T, R, 1, true>(p, 0, column);
  if (p.rows == 2) return tile<T, R, 2, true>(p, 0, column);
  tile<T, R, C, true>(p, 0, column);
  int64_t row = C;
  for (; row + C <= p.rows; row += C) tile<T, R, C, false>(p, row, column);
  if (p.rows - row == 2) tile<T, R, 2, false>(p, row, column);
  else if (p.rows - row == 1) tile<T, R, 1, false>(p, row, column);
}

template <class T, int C>
void in_tiles(const Product<T>& p) {
  const int64_t strips = (p.columns + tile_columns - 1) / tile_columns;
  parallel(strips, p.rows * p.depth * tile_columns, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      int64_t column = s * tile_columns;
      if (column + tile_columns <= p.columns) strip<T, tile_columns, C>(p, column);
      else
        for (; column < p.columns; ++column) strip<T, 1, C>(p, column);
    }
  });
}

// Three rows at a time, or four where that leaves no rest and the passes over a strip are few.
template <class T>
void multiply(const Product<T>& p) {
  if (p.rows % 4 == 0 && p.rows <= 16) in_tiles<T, 4>(p);
  else in_tiles<T, 3>(p);
}

}  // namespace

bool is_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  const auto like = [&](const at::Tensor& t) { return t.scalar_type() == left.scalar_type() && t.device() == left.device(); };
  return left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0) && like(right) &&
         (!bias.defined() || (bias.dim() == 1 && bias.size(0) == right.size(1) && like(bias)));
}

std::optional<at::Tensor> few_rows(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  if (!is_product(left, right, bias) || left.is_conj() || right.is_conj()) return std::nullopt;
  const int64_t rows = left.size(0), depth = left.size(1), columns = right.size(1);
  const auto type = left.scalar_type();
  const bool fits = rows > 0 && rows <= most_rows(type) && depth > 0 && depth % lanes == 0 && columns > 0 && left.stride(1) == 1 && right.stride(0) == 1 &&
                    (!bias.defined() || bias.is_contiguous());
  if (!fits) return std::nullopt;
  at::Tensor out = at::empty({rows, columns}, left.options());
  by_type("matmul", type, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, at::Half>)
      multiply(Product<T>{left.const_data_ptr<T>(), right.const_data_ptr<T>(), bias.defined() ? bias.const_data_ptr<T>() : nullptr,
                          static_cast<T*>(out.data_ptr()), rows, columns, depth, left.stride(0), right.stride(1)});
  });
  return out;
}

std::optional<at::Tensor> many_rows(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  if (!is_product(left, right, bias)) return std::nullopt;
  at::Tensor out = unwritten({left.size(0), right.size(1)}, {right.size(1), 1}, left.scalar_type(), left.device()), to = cpu_alias(out);
  at::AutoDispatchBelowADInplaceOrView below;
  if (bias.defined()) at::addmm_out(to, cpu_alias(bias), cpu_alias(left), cpu_alias(right));
  else at::mm_out(to, cpu_alias(left), cpu_alias(right));
  return out;
}

}  // namespace ascend_sim
