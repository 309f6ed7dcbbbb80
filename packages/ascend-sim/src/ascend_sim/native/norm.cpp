// SPDX-License-Identifier: Apache-2.0
//
// Normalisations.
#include <ATen/ops/native_layer_norm.h>

#include "kernels.h"

namespace ascend_sim {
namespace {

struct Shape {
  int64_t rows = 1, columns = 1;
  std::vector<int64_t> rstd;
};

// Rows and columns of a normalisation over the last gamma.dim() dimensions (meta: npu_rms_norm_meta).
Shape shape_of(const char* op, const at::Tensor& x, const at::Tensor& gamma) {
  on_device(op, "input", x);
  on_device(op, "gamma", gamma);
  const int64_t lead = x.dim() - gamma.dim();
  RULE(".gamma-shape", gamma.dim() >= 1 && lead >= 0 && x.sizes().slice(lead) == gamma.sizes(), op,
       ": gamma must have the shape of input's last dimensions, got gamma ", gamma.sizes(), " and input ", x.sizes());
  STRICT(".rank", x.dim() >= 2 && x.dim() <= 8, op, ": input must have 2 to 8 dimensions, got ", x.dim());
  STRICT(".gamma-dtype", gamma.scalar_type() == x.scalar_type(), op, ": gamma must have the data type of input, got ", gamma.scalar_type(),
         " and ", x.scalar_type());
  Shape shape;
  shape.columns = gamma.numel();
  shape.rstd.assign(x.dim(), 1);
  for (int64_t i = 0; i < lead; ++i) shape.rows *= shape.rstd[i] = x.size(i);
  return shape;
}

// y = x / sqrt(mean(x^2) + epsilon) * gamma, in float32, rounded once. `scratch` holds one row.
template <class T>
float normalise(const T* x, const float* gamma, T* y, float* scratch, int64_t columns, float epsilon) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) {
    const float value = static_cast<float>(x[i]);
    scratch[i] = value;
    sum += value * value;
  }
  const float rstd = 1.0f / std::sqrt(sum / static_cast<float>(columns) + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) y[i] = static_cast<T>(scratch[i] * rstd * gamma[i]);
  return rstd;
}

const float* gamma_floats(const at::Tensor& gamma, at::Tensor& keep) {
  keep = gamma.scalar_type() == at::kFloat && gamma.is_contiguous() ? gamma : floats(gamma);
  return keep.const_data_ptr<float>();
}

// torch_npu/_op_plugin_docs.py: npu_rms_norm
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& input, const at::Tensor& gamma, double epsilon) {
  static Tally& mine = tally("npu::npu_rms_norm");
  count_call(mine);
  const Shape shape = shape_of("npu_rms_norm", input, gamma);
  const at::Tensor x = dense(input);
  at::Tensor y = at::empty(input.sizes(), input.options()), rstd = at::empty(shape.rstd, input.options().dtype(at::kFloat)), keep;
  const float* weight = gamma_floats(gamma, keep);
  by_type("npu_rms_norm", input.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.data_ptr());
    float* inverse = static_cast<float*>(rstd.data_ptr());
    parallel(shape.rows, 2 * shape.columns, [&](int64_t begin, int64_t end) {
      std::vector<float> row(shape.columns);
      for (int64_t r = begin; r < end; ++r)
        inverse[r] = normalise(from + r * shape.columns, weight, to + r * shape.columns, row.data(), shape.columns, static_cast<float>(epsilon));
    });
  });
  return {y, rstd};
}

// y = rms_norm(x1 + x2); the sum, rounded to the inputs' type, is the third result. Meta: npu_add_rms_norm_meta; not in _op_plugin_docs.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                                                            double epsilon) {
  static Tally& mine = tally("npu::npu_add_rms_norm");
  count_call(mine);
  const char* op = "npu_add_rms_norm";
  on_device(op, "x2", x2);
  const Shape shape = shape_of(op, x1, gamma);
  RULE(".x2-shape", x1.sizes() == x2.sizes(), op, ": x1 and x2 must have one shape, got ", x1.sizes(), " and ", x2.sizes());
  RULE(".x2-dtype", x1.scalar_type() == x2.scalar_type(), op, ": x1 and x2 must have one data type, got ", x1.scalar_type(), " and ",
       x2.scalar_type());
  const at::Tensor a = dense(x1), b = dense(x2);
  at::Tensor y = at::empty(x1.sizes(), x1.options()), sum = at::empty(x1.sizes(), x1.options());
  at::Tensor rstd = at::empty(shape.rstd, x1.options().dtype(at::kFloat)), keep;
  const float* weight = gamma_floats(gamma, keep);
  by_type(op, x1.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *left = static_cast<const T*>(a.const_data_ptr()), *right = static_cast<const T*>(b.const_data_ptr());
    T *to = static_cast<T*>(y.data_ptr()), *added = static_cast<T*>(sum.data_ptr());
    float* inverse = static_cast<float*>(rstd.data_ptr());
    parallel(shape.rows, 3 * shape.columns, [&](int64_t begin, int64_t end) {
      std::vector<float> row(shape.columns);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * shape.columns;
#pragma omp simd
        for (int64_t i = 0; i < shape.columns; ++i)
          added[at + i] = static_cast<T>(static_cast<float>(left[at + i]) + static_cast<float>(right[at + i]));
        inverse[r] = normalise(added + at, weight, to + at, row.data(), shape.columns, static_cast<float>(epsilon));
      }
    });
  });
  return {y, rstd, sum};
}

// torch_npu/_op_plugin_docs.py: npu_layer_norm_eval ("the same as torch.nn.functional.layer_norm")
at::Tensor layer_norm_eval(const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& bias, double eps) {
  static Tally& mine = tally("npu::npu_layer_norm_eval");
  count_call(mine);
  on_device("npu_layer_norm_eval", "input", input);
  at::AutoDispatchBelowADInplaceOrView below;
  auto alias = [](const std::optional<at::Tensor>& t) { return t && t->defined() ? std::optional<at::Tensor>(cpu_alias(*t)) : std::nullopt; };
  return to_npu(std::get<0>(at::native_layer_norm(cpu_alias(input), normalized_shape, alias(weight), alias(bias), eps)), input.device());
}

}  // namespace

void install_norm(torch::Library& npu) {
  npu.impl("npu_rms_norm", TORCH_FN(rms_norm));
  npu.impl("npu_add_rms_norm", TORCH_FN(add_rms_norm));
  npu.impl("npu_layer_norm_eval", TORCH_FN(layer_norm_eval));
}

}  // namespace ascend_sim
