// SPDX-License-Identifier: Apache-2.0
//
// Activations.
#include <ATen/ops/gelu.h>

#include "kernels.h"

namespace ascend_sim {
namespace {

// A tensor seen as [before, cut, after] around one dimension of even length.
struct Cut {
  int64_t before = 1, cut = 1, after = 1;
  std::vector<int64_t> out;
};

Cut cut_of(const char* op, const at::Tensor& x, int64_t dim) {
  on_device(op, "input", x);
  RULE(".dim", x.dim() >= 1 && dim >= -x.dim() && dim < x.dim(), op, ": dim must lie in [", -x.dim(), ", ", x.dim() - 1, "], got ", dim);
  dim = dim < 0 ? dim + x.dim() : dim;
  RULE(".even", x.size(dim) % 2 == 0, op, ": dimension ", dim, " must be even, got ", x.size(dim));
  Cut shape;
  for (int64_t i = 0; i < x.dim(); ++i) (i < dim ? shape.before : i == dim ? shape.cut : shape.after) *= x.size(i);
  shape.out = x.sizes().vec();
  shape.out[dim] /= 2;
  return shape;
}

// torch_npu/_op_plugin_docs.py: npu_swiglu: A * sigmoid(A) * B, A and B the halves along dim
at::Tensor swiglu(const at::Tensor& input, int64_t dim) {
  static Tally& mine = tally("npu::npu_swiglu");
  const char* op = "npu_swiglu";
  count_call(mine);
  const Cut shape = cut_of(op, input, dim);
  STRICT("npu_swiglu.rank", input.dim() <= 8, op, ": input must have 1 to 8 dimensions, got ", input.dim());
  const at::Tensor x = dense(input);
  at::Tensor out = at::empty(shape.out, input.options());
  const int64_t half = shape.cut * shape.after / 2;
  by_type(op, input.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    parallel(shape.before, 8 * half, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *a = from + 2 * r * half, *b = a + half;
        T* y = to + r * half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const float gate = static_cast<float>(a[i]);
          y[i] = static_cast<T>(gate * sigmoid(gate) * static_cast<float>(b[i]));
        }
      }
    });
  });
  return out;
}

// torch_npu/_op_plugin_docs.py: npu_clipped_swiglu. Rows after sum(group_index) are not computed; they are zero here.
at::Tensor clipped_swiglu(const at::Tensor& input, const std::optional<at::Tensor>& group_index, int64_t dim, double alpha, double limit,
                          double bias, bool interleaved) {
  static Tally& mine = tally("npu::npu_clipped_swiglu");
  const char* op = "npu_clipped_swiglu";
  count_call(mine);
  const Cut shape = cut_of(op, input, dim);
  STRICT("npu_clipped_swiglu.rank", input.dim() > 1, op, ": x must have more than 1 dimension, got ", input.dim());
  STRICT("npu_clipped_swiglu.contiguous", input.is_contiguous(), op, ": x must be contiguous");
  int64_t rows = shape.before;
  if (group_index && group_index->defined()) {
    RULE("npu_clipped_swiglu.group-index-rank", group_index->dim() == 1, op, ": group_index must have 1 dimension, got ", group_index->dim());
    RULE("npu_clipped_swiglu.group-index-dtype", group_index->scalar_type() == at::kLong, op, ": group_index must be int64, got ",
         group_index->scalar_type());
    const at::Tensor groups = dense(*group_index);
    const int64_t* counts = groups.const_data_ptr<int64_t>();
    int64_t sum = 0;
    for (int64_t i = 0; i < groups.numel(); ++i) sum += counts[i];
    rows = std::clamp<int64_t>(sum, 0, rows);
  }
  const at::Tensor x = dense(input);
  at::Tensor out = at::empty(shape.out, input.options());
  const int64_t half = shape.cut * shape.after / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  const float a_ = static_cast<float>(alpha), l_ = static_cast<float>(limit), b_ = static_cast<float>(bias);
  by_type(op, input.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    parallel(rows, 8 * half, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const T* at = from + 2 * r * half + i * step;
          const float gate = std::min(static_cast<float>(at[0]), l_), up = std::clamp(static_cast<float>(at[other]), -l_, l_);
          to[r * half + i] = static_cast<T>(gate * sigmoid(a_ * gate) * (up + b_));
        }
    });
    std::fill(to + rows * half, to + shape.before * half, T(0.0f));
  });
  return out;
}

// Meta: npu_gelu_meta (not in _op_plugin_docs.py): torch.nn.functional.gelu
at::Tensor gelu(const at::Tensor& input, c10::string_view approximate) {
  static Tally& mine = tally("npu::npu_gelu");
  count_call(mine);
  on_device("npu_gelu", "input", input);
  at::AutoDispatchBelowADInplaceOrView below;
  return to_npu(at::gelu(cpu_alias(input), approximate), input.device());
}

}  // namespace

void install_activation(torch::Library& npu) {
  npu.impl("npu_swiglu", TORCH_FN(swiglu));
  npu.impl("npu_clipped_swiglu", TORCH_FN(clipped_swiglu));
  npu.impl("npu_gelu", TORCH_FN(gelu));
}

}  // namespace ascend_sim
