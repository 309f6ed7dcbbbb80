// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts with int8 weights: what lies between the two grouped matrix products, alone and fused with the first.
#include "moe.h"

namespace ascend_sim {
namespace {

// How two halves become one row: half 0 of x is the gate, or half 1; or gate and value alternate, clamped (the variant of GPT-OSS).
struct Glu {
  bool left = true, variant = false;
  float limit = 7, alpha = 1.702f, bias = 1;
};

void glu(const Glu& g, const float* x, int64_t half, float* out) {
  if (!g.variant) {
    const float *gate = g.left ? x : x + half, *value = g.left ? x + half : x;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) out[i] = gate[i] * sigmoid(gate[i]) * value[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float gate = std::min(x[2 * i], g.limit), value = std::clamp(x[2 * i + 1], -g.limit, g.limit);
    out[i] = gate * sigmoid(g.alpha * gate) * (value + g.bias);
  }
}

// Rows [begin, end): y = quantise(glu((x + bias) * weight_scale * activation_scale) * quant_scale); null where there is none.
struct Stage {
  int64_t width;  // of x
  Glu glu;
  const int32_t* bias = nullptr;
  const float *weight_scale = nullptr, *quant_scale = nullptr;
};

template <class T>
void run_rows(const Stage& s, const T* x, const float* activation_scale, int64_t rows, int8_t* out, float* scales) {
  const int64_t half = s.width / 2;
  parallel(rows, 12 * s.width, [&](int64_t begin, int64_t end) {
    std::vector<float> row(s.width), y(half);
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x + r * s.width;
      const float factor = activation_scale ? activation_scale[r] : 1.0f;
      for (int64_t i = 0; i < s.width; ++i) row[i] = s.bias ? static_cast<float>(from[i] + static_cast<T>(s.bias[i])) : static_cast<float>(from[i]);
      if (s.weight_scale)
        for (int64_t i = 0; i < s.width; ++i) row[i] *= s.weight_scale[i] * factor;
      glu(s.glu, row.data(), half, y.data());
      if (s.quant_scale)
        for (int64_t i = 0; i < half; ++i) y[i] *= s.quant_scale[i];
      scales[r] = quantise(y.data(), half, out + r * half);
    }
  });
}

// A parameter with a row of `columns` numbers for each group, as float32; a vector is one row.
at::Tensor by_group(const char* op, const char* argument, const std::optional<at::Tensor>& given, int64_t groups, int64_t columns) {
  if (!given || !given->defined()) return {};
  on_device(op, argument, *given);
  RULE(".parameters-dtype", is_float(given->scalar_type()), op, ": ", argument, " must be float16, bfloat16 or float32, got ",
       given->scalar_type());
  RULE(".parameters-shape", given->numel() == groups * columns && given->size(-1) == columns, op, ": ", argument, " must be [groups = ", groups, ", ", columns,
              "], got ", given->sizes());
  return floats(*given);
}

// torch_npu/_op_plugin_docs.py: npu_dequant_swiglu_quant. Rows after the last group are not written.
std::tuple<at::Tensor, at::Tensor> dequant_swiglu_quant(
    const at::Tensor& x, const std::optional<at::Tensor>& weight_scale, const std::optional<at::Tensor>& activation_scale,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& quant_scale, const std::optional<at::Tensor>& quant_offset,
    const std::optional<at::Tensor>& group_index, bool activate_left, int64_t quant_mode, std::optional<int64_t> dst_type,
    std::optional<int64_t> round_mode, std::optional<int64_t> activate_dim, int64_t swiglu_mode, double clamp_limit, double glu_alpha,
    double glu_bias) {
  static Tally& mine = tally("npu::npu_dequant_swiglu_quant");
  const char* op = "npu_dequant_swiglu_quant";
  count_call(mine);
  on_device(op, "x", x);
  const at::ScalarType type = x.scalar_type();
  RULE("npu_dequant_swiglu_quant.shape", x.dim() == 2 && x.size(1) % 2 == 0 && x.size(1) > 0, op, ": x must be [tokens, 2H], got ", x.sizes());
  RULE("npu_dequant_swiglu_quant.dtype", type == at::kInt || is_float(type), op, ": x must be int32 or bfloat16, got ", type);
  STRICT("npu_dequant_swiglu_quant.dtype", type == at::kInt || type == at::kBFloat16 || type == at::kHalf, op, ": x must be int32, bfloat16 or float16, got ", type);
  TORCH_CHECK(quant_mode == 1, op, ": quant_mode must be 1 (dynamic; static is not simulated), got ", quant_mode);
  TORCH_CHECK(!quant_offset, op, ": quant_offset needs static quantisation, which is not simulated");
  TORCH_CHECK(dst_type.value_or(static_cast<int64_t>(at::kChar)) == static_cast<int64_t>(at::kChar) && round_mode.value_or(0) == 0, op,
              ": dst_type must be int8 and round_mode 0 (other ones are not simulated)");
  TORCH_CHECK(activate_dim.value_or(-1) == -1 || *activate_dim == 1, op, ": activate_dim must be the last (others are not simulated), got ",
              activate_dim.value_or(-1));
  RULE("npu_dequant_swiglu_quant.swiglu-mode", swiglu_mode == 0 || swiglu_mode == 1, op, ": swiglu_mode must be 0 or 1, got ", swiglu_mode);
  const int64_t rows = x.size(0), width = x.size(1), half = width / 2;
  if (type == at::kInt) {
    RULE("npu_dequant_swiglu_quant.int32-weight-scale", weight_scale.has_value(), op, ": weight_scale is required with x of int32");
    STRICT("npu_dequant_swiglu_quant.int32-activation-scale", activation_scale.has_value(), op, ": activation_scale is required with x of int32");
  } else {
    RULE("npu_dequant_swiglu_quant.float-scales", !weight_scale && !activation_scale && !bias, op, ": weight_scale, activation_scale and bias must be None with x of ", type);
  }
  std::vector<int64_t> ends = {rows};
  if (group_index && group_index->defined()) {
    RULE("npu_dequant_swiglu_quant.grouped-bias", !bias, op, ": bias must be None with group_index");
    ends = group_ends(op, "group_index", *group_index, true, rows);
    STRICT("npu_dequant_swiglu_quant.size", half <= 10496, op, ": H must be at most 10496 with group_index, got ", half);
    STRICT("npu_dequant_swiglu_quant.alignment", half % 64 == 0, op, ": H must be a multiple of 64 with group_index, got ", half);
  }
  const int64_t groups = static_cast<int64_t>(ends.size());
  const at::Tensor weights = by_group(op, "weight_scale", weight_scale, groups, width), smooth = by_group(op, "quant_scale", quant_scale, groups, half);
  STRICT("npu_dequant_swiglu_quant.weight-scale-dtype", !weight_scale || weight_scale->scalar_type() == at::kFloat, op,
         ": weight_scale must be float32, got ", weight_scale->scalar_type());
  at::Tensor activations, added;
  if (activation_scale && activation_scale->defined()) {
    RULE("npu_dequant_swiglu_quant.activation-scale-dtype", activation_scale->scalar_type() == at::kFloat, op,
         ": activation_scale must be float32, got ", activation_scale->scalar_type());
    RULE("npu_dequant_swiglu_quant.activation-scale-shape", activation_scale->numel() == rows, op, ": activation_scale must be [", rows, "], got ",
         activation_scale->sizes());
    activations = floats(*activation_scale);
  }
  if (bias && bias->defined()) {
    RULE("npu_dequant_swiglu_quant.bias-dtype", bias->scalar_type() == at::kInt, op, ": bias must be int32, got ", bias->scalar_type());
    TORCH_CHECK(bias->numel() == width, op, ": bias must be [", width, "], got ", bias->sizes());
    added = dense(*bias);
  }
  const at::Tensor from = dense(x);
  at::Tensor y = at::empty({rows, half}, x.options().dtype(at::kChar)), scale = at::empty({rows}, x.options().dtype(at::kFloat));
  Stage stage{width, {activate_left, swiglu_mode == 1, static_cast<float>(clamp_limit), static_cast<float>(glu_alpha), static_cast<float>(glu_bias)}};
  stage.bias = added.defined() ? static_cast<const int32_t*>(added.const_data_ptr()) : nullptr;
  auto run = [&](auto tag) {
    using T = decltype(tag);
    for (int64_t g = 0, begin = 0; g < groups; begin = ends[g++]) {
      stage.weight_scale = weights.defined() ? weights.const_data_ptr<float>() + g * width : nullptr;
      stage.quant_scale = smooth.defined() ? smooth.const_data_ptr<float>() + g * half : nullptr;
      run_rows(stage, static_cast<const T*>(from.const_data_ptr()) + begin * width,
               activations.defined() ? activations.const_data_ptr<float>() + begin : nullptr, ends[g] - begin,
               static_cast<int8_t*>(y.data_ptr()) + begin * half, static_cast<float*>(scale.data_ptr()) + begin);
    }
  };
  if (type == at::kInt) run(int32_t{});
  else by_type(op, type, run);
  return {y, scale};
}

// torch_npu/_op_plugin_docs.py: npu_grouped_matmul_swiglu_quant. Rows after group_list[-1] are not written.
std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_matmul_swiglu_quant(const at::Tensor& x, const at::Tensor& weight,
                                                                           const at::Tensor& group_list, const at::Tensor& weight_scale,
                                                                           const at::Tensor& x_scale, const std::optional<at::Tensor>& bias,
                                                                           const std::optional<at::Tensor>& offset) {
  static Tally& mine = tally("npu::npu_grouped_matmul_swiglu_quant");
  const char* op = "npu_grouped_matmul_swiglu_quant";
  on_device(op, "x", x);
  on_device_in_any_format(op, "weight", weight);
  STRICT("npu_grouped_matmul_swiglu_quant.weight-format", is_fractal(weight), op, ": weight must have the format FRACTAL_NZ; npu_format_cast(weight, 29) converts it");
  on_device(op, "x_scale", x_scale);
  TORCH_CHECK(!bias && !offset, op, ": bias and offset must be None");
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kChar, op, ": x must be int8 [m, k], got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == at::kChar && weight.size(1) == x.size(1) && weight.size(2) % 2 == 0, op,
              ": weight must be int8 [experts, k = ", x.size(1), ", n], n even, got ", weight.scalar_type(), " ", weight.sizes());
  const int64_t rows = x.size(0), experts = weight.size(0), columns = weight.size(2);
  TORCH_CHECK(x_scale.dim() == 1 && x_scale.size(0) == rows && x_scale.scalar_type() == at::kFloat, op, ": x_scale must be float32 [m = ", rows,
              "], got ", x_scale.scalar_type(), " ", x_scale.sizes());
  const std::vector<int64_t> ends = group_ends(op, "group_list", group_list, false, rows);
  TORCH_CHECK(static_cast<int64_t>(ends.size()) == experts, op, ": group_list must hold a number for each of the ", experts, " experts, got ",
              ends.size());
  at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor scales = by_group(op, "weight_scale", weight_scale, experts, columns), from = cpu_alias(x), with = cpu_alias(weight),
                   rows_scale = floats(x_scale);
  at::Tensor y = at::empty({rows, columns / 2}, x.options()), scale = at::empty({rows}, x.options().dtype(at::kFloat));
  for (int64_t e = 0, begin = 0; e < experts; begin = ends[e++]) {
    if (ends[e] == begin) continue;
    Stage stage{columns, {}};
    stage.weight_scale = scales.const_data_ptr<float>() + e * columns;
    const at::Tensor product = int8_product(from.slice(0, begin, ends[e]), with[e]);
    run_rows(stage, product.const_data_ptr<int32_t>(), rows_scale.const_data_ptr<float>() + begin, ends[e] - begin,
             static_cast<int8_t*>(y.data_ptr()) + begin * columns / 2, static_cast<float*>(scale.data_ptr()) + begin);
  }
  count_call(mine, 2 * (ends.empty() ? 0 : ends.back()) * x.size(1) * columns);
  return {y, scale, zeros({}, x.options().dtype(at::kFloat))};
}

}  // namespace

void install_swiglu_quant(torch::Library& npu) {
  npu.impl("npu_dequant_swiglu_quant", TORCH_FN(dequant_swiglu_quant));
  npu.impl("npu_grouped_matmul_swiglu_quant", TORCH_FN(grouped_matmul_swiglu_quant));
}

}  // namespace ascend_sim
