// SPDX-License-Identifier: Apache-2.0
//
// Quantisation to int8 and the int8 matrix product. Sources: torch_npu/_op_plugin_docs.py and the meta function of each operator.
#include <ATen/ops/empty.h>

#include "kernels.h"

namespace ascend_sim {

at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b);  // int8_product.cpp

namespace {

using Optional = std::optional<at::Tensor>;

bool given(const Optional& t) { return t && t->defined(); }

// Rounded to the nearest, ties to even, and kept within the type.
template <class T>
T saturated(float value) {
  return static_cast<T>(std::clamp<float>(std::nearbyint(value), std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

// A tensor seen as [before, axis, after]; `scales` has one number for each index of the axis, or one for all.
struct Axis {
  int64_t before = 1, axis = 1, after = 1;
};

Axis axis_of(const at::Tensor& x, int64_t dim) {
  Axis shape;
  for (int64_t i = 0; i < x.dim(); ++i) (i < dim ? shape.before : i == dim ? shape.axis : shape.after) *= x.size(i);
  return shape;
}

// Whether t has one number, or one for each index of dimension `dim` of x.
bool fits_axis(const at::Tensor& t, const at::Tensor& x, int64_t dim) {
  bool fits = t.dim() == 1 ? t.size(0) == 1 || t.size(0) == x.size(dim) : t.dim() == x.dim();
  for (int64_t i = 0; fits && t.dim() > 1 && i < t.dim(); ++i) fits = t.size(i) == 1 || (i == dim && t.size(i) == x.size(i));
  return fits;
}

// The types that documentation allows together; dividing and multiplying are two kernels.
void check_quantize_types(const at::Tensor& x, const at::Tensor& scales, const Optional& zero_points, bool div_mode) {
  const char* op = "npu_quantize";
  const auto type = scales.scalar_type();
  RULE("npu_quantize.scales-dtype", is_float(type), op, ": scales must be float32, float16 or bfloat16, got ", type);
  STRICT("npu_quantize.divisors-dtype", !div_mode || type != at::kHalf, op, ": scales must be float32 or bfloat16 with div_mode=True, got ", type);
  STRICT("npu_quantize.factors-dtype", div_mode || x.scalar_type() == at::kFloat || type == x.scalar_type(), op,
         ": scales must have the data type of input with div_mode=False, got ", type, " and ", x.scalar_type());
  if (!given(zero_points)) return;
  const auto zero = zero_points->scalar_type();
  STRICT("npu_quantize.zero-points-dtype", !div_mode || zero == at::kChar || zero == at::kByte || zero == at::kInt || zero == at::kBFloat16, op,
         ": zero_points must be int8, uint8, int32 or bfloat16 with div_mode=True, got ", zero);
  STRICT("npu_quantize.zero-points-as-scales", div_mode || (zero == type && zero_points->sizes() == scales.sizes()), op,
         ": zero_points must have the data type and shape of scales with div_mode=False, got ", zero, " ", zero_points->sizes(), " and ", type, " ",
         scales.sizes());
}

template <class T, class From>
void quantize_rows(const From* from, T* to, const Axis& shape, const at::Tensor& scales, const at::Tensor& zeros, bool div_mode) {
  const float *scale = scales.const_data_ptr<float>(), *zero = zeros.const_data_ptr<float>();
  const bool one_scale = scales.numel() == 1, one_zero = zeros.numel() == 1;
  parallel(shape.before * shape.axis, 4 * shape.after, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row % shape.axis;
      const float s = scale[one_scale ? 0 : at], z = zero[one_zero ? 0 : at];
      for (int64_t i = row * shape.after; i < (row + 1) * shape.after; ++i) {
        const float x = static_cast<float>(from[i]);
        to[i] = saturated<T>((div_mode ? x / s : x * s) + z);
      }
    }
  });
}

// torch_npu/_op_plugin_docs.py: npu_quantize: round(x / scales + zero_points), or x * scales with div_mode=False
at::Tensor quantize(const at::Tensor& input, const at::Tensor& scales, const Optional& zero_points, int64_t dtype, int64_t axis, bool div_mode) {
  static Tally& mine = tally("npu::npu_quantize");
  count_call(mine);
  on_device("npu_quantize", "input", input);
  on_device("npu_quantize", "scales", scales);
  const auto target = static_cast<at::ScalarType>(dtype);
  const bool to_int8 = target == at::kQInt8 || target == at::kChar;
  TORCH_CHECK(to_int8 || (div_mode && (target == at::kQUInt8 || target == at::kByte)), "npu_quantize: dtype must be qint8",
              div_mode ? " or quint8" : " with div_mode=False", ", others are not simulated; got ", target);
  // With div_mode=False the axis is -2 or, for every larger number, the last one.
  const int64_t dim = div_mode ? (axis < 0 ? axis + input.dim() : axis) : axis == -2 ? input.dim() - 2 : input.dim() - 1;
  RULE("npu_quantize.axis", dim >= 0 && dim < input.dim() && axis < input.dim() && (div_mode || axis >= -2), "npu_quantize", ": axis ", axis,
       " does not fit an input of ", input.dim(), " dimensions");
  RULE("npu_quantize.scales-shape", fits_axis(scales, input, dim), "npu_quantize", ": scales must have 1 or ", input.size(dim),
       " numbers along axis ", dim, " of input ", input.sizes(), ", got ", scales.sizes());
  if (given(zero_points)) {
    on_device("npu_quantize", "zero_points", *zero_points);
    RULE("npu_quantize.zero-points-shape", fits_axis(*zero_points, input, dim), "npu_quantize", ": zero_points must have 1 or ", input.size(dim),
         " numbers along axis ", dim, " of input ", input.sizes(), ", got ", zero_points->sizes());
  }
  check_quantize_types(input, scales, zero_points, div_mode);
  const Axis shape = axis_of(input, dim);
  const at::Tensor x = dense(input), scale = floats(scales);
  const at::Tensor zero = given(zero_points) ? floats(*zero_points) : at::zeros({1}, at::TensorOptions().dtype(at::kFloat));
  at::Tensor out = at::empty(input.sizes(), input.options().dtype(to_int8 ? at::kChar : at::kByte));
  by_type("npu_quantize", input.scalar_type(), [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(x.const_data_ptr());
    if (to_int8) quantize_rows(from, static_cast<int8_t*>(out.data_ptr()), shape, scale, zero, div_mode);
    else quantize_rows(from, static_cast<uint8_t*>(out.data_ptr()), shape, scale, zero, div_mode);
  });
  return out;
}

// Which row of smooth_scales a token has: the first whose end, group_index[i], lies after it. One row without groups.
std::vector<int64_t> smooth_rows(const Optional& smooth, const Optional& group_index, int64_t tokens, int64_t width) {
  if (!given(smooth)) {
    TORCH_CHECK(!given(group_index), "npu_dynamic_quant: group_index needs smooth_scales");
    return {};
  }
  const char* op = "npu_dynamic_quant";
  on_device(op, "smooth_scales", *smooth);
  const bool grouped = given(group_index);
  RULE("npu_dynamic_quant.smooth-scales-shape", smooth->dim() == (grouped ? 2 : 1) && smooth->size(-1) == width, op, ": smooth_scales must be [",
       grouped ? "groups, " : "", width, "], got ", smooth->sizes());
  std::vector<int64_t> rows(tokens, 0);
  if (!grouped) return rows;
  on_device(op, "group_index", *group_index);
  RULE("npu_dynamic_quant.group-index-dtype", group_index->scalar_type() == at::kInt, op, ": group_index must be int32, got ",
       group_index->scalar_type());
  RULE("npu_dynamic_quant.group-index-shape", group_index->dim() == 1 && group_index->size(0) == smooth->size(0), op, ": group_index must have ",
       smooth->size(0), " numbers, one a row of smooth_scales, got ", group_index->sizes());
  const at::Tensor ends = dense(*group_index);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  const int64_t groups = ends.numel();
  RULE("npu_dynamic_quant.group-index", std::is_sorted(end, end + groups) && groups && end[groups - 1] == tokens, op,
       ": group_index must ascend to the number of tokens, ", tokens);
  for (int64_t token = 0, group = 0; token < tokens; rows[token++] = group)
    while (token >= end[group]) ++group;
  return rows;
}

// torch_npu/_op_plugin_docs.py: npu_dynamic_quant: a scale for each token, max|x| / 127, so that its numbers fill int8.
std::tuple<at::Tensor, at::Tensor> dynamic_quant(const at::Tensor& input, const Optional& smooth_scales, const Optional& group_index,
                                                 std::optional<int64_t> dst_type, c10::string_view quant_mode, double dst_type_max) {
  static Tally& mine = tally("npu::npu_dynamic_quant");
  const char* op = "npu_dynamic_quant";
  count_call(mine);
  on_device(op, "x", input);
  TORCH_CHECK(!dst_type || static_cast<at::ScalarType>(*dst_type) == at::kChar,
              "npu_dynamic_quant: dst_type must be int8, others are not simulated; got ", dst_type.value_or(1));
  TORCH_CHECK(quant_mode == "pertoken" && dst_type_max == 0.0, "npu_dynamic_quant: quant_mode must be 'pertoken' and dst_type_max 0, others are "
              "not simulated; got '", quant_mode, "' and ", dst_type_max);
  RULE("npu_dynamic_quant.rank", input.dim() > 1, op, ": x must have more than 1 dimension, got ", input.dim());
  STRICT("npu_dynamic_quant.dtype", input.scalar_type() != at::kFloat, op, ": x must be float16 or bfloat16, got Float");
  STRICT("npu_dynamic_quant.smooth-scales-dtype", !given(smooth_scales) || smooth_scales->scalar_type() == input.scalar_type(), op,
         ": smooth_scales must have the data type of x, got ", smooth_scales->scalar_type());
  const int64_t width = input.size(-1);
  TORCH_CHECK(width > 0, "npu_dynamic_quant: the last dimension of x must not be empty");
  const int64_t tokens = input.numel() / width;
  const std::vector<int64_t> rows = smooth_rows(smooth_scales, group_index, tokens, width);
  const at::Tensor x = dense(input), smooth = rows.empty() ? at::Tensor() : floats(*smooth_scales);
  at::Tensor out = at::empty(input.sizes(), input.options().dtype(at::kChar));
  at::Tensor scales = at::empty(input.sizes().slice(0, input.dim() - 1), input.options().dtype(at::kFloat));
  by_type("npu_dynamic_quant", input.scalar_type(), [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(x.const_data_ptr());
    int8_t* to = static_cast<int8_t*>(out.data_ptr());
    float* scale = static_cast<float*>(scales.data_ptr());
    parallel(tokens, 8 * width, [&](int64_t begin, int64_t end) {
      std::vector<float> row(width);
      for (int64_t t = begin; t < end; ++t) {
        const float* factor = rows.empty() ? nullptr : smooth.const_data_ptr<float>() + rows[t] * width;
        float largest = 0;
        for (int64_t i = 0; i < width; ++i) {
          row[i] = static_cast<float>(from[t * width + i]) * (factor ? factor[i] : 1.0f);
          largest = std::max(largest, std::abs(row[i]));
        }
        scale[t] = largest / 127.0f;
        for (int64_t i = 0; i < width; ++i) to[t * width + i] = largest > 0 ? saturated<int8_t>(row[i] / scale[t]) : int8_t{0};
      }
    });
  });
  return {out, scales};
}

struct Epilogue {
  at::Tensor scale, offset, per_token, int_bias, float_bias;
};

// Table 1 of the documentation (A2 and A3): which types of scale, bias and per-token scale go with which output.
void check_product_types(at::ScalarType out, const at::Tensor& scale, const Optional& offset, const Optional& per_token, const Optional& bias) {
  const char* op = "npu_quant_matmul";
  TORCH_CHECK(out == at::kChar || is_float(out), op, ": output_dtype must be int8, float16 or bfloat16, others are not simulated; got ", out);
  TORCH_CHECK(scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kBFloat16, op,
              ": scale must be float32 or bfloat16 (packed int64 ones are not simulated), got ", scale.scalar_type());
  STRICT("npu_quant_matmul.offset-dtype", !given(offset) || offset->scalar_type() == at::kFloat, op, ": offset must be float32, got ",
         offset->scalar_type());
  RULE("npu_quant_matmul.offset", !given(offset) || out == at::kChar, op, ": offset is for int8 output only, got ", out);
  STRICT("npu_quant_matmul.output-dtype", out != at::kFloat, op, ": output_dtype must be int8, float16 or bfloat16, got Float");
  STRICT("npu_quant_matmul.scale-dtype", scale.scalar_type() == at::kFloat || out == at::kBFloat16, op,
         ": a bfloat16 scale is for bfloat16 output only, got ", out);
  STRICT("npu_quant_matmul.pertoken-scale-dtype", !given(per_token) || per_token->scalar_type() == at::kFloat, op,
         ": pertoken_scale must be float32, got ", per_token->scalar_type());
  STRICT("npu_quant_matmul.pertoken-output", !given(per_token) || out != at::kChar, op, ": pertoken_scale is for floating-point output only");
  if (!given(bias)) return;
  const auto type = bias->scalar_type();
  const bool allowed = type == at::kInt || ((given(per_token) || out == at::kBFloat16) && (type == at::kFloat || type == out));
  STRICT("npu_quant_matmul.bias-dtype", allowed, op, ": a bias of ", type, " does not go with ", out, " output", given(per_token) ? "" : " without pertoken_scale");
}

template <class T>
void finish(const at::Tensor& sums, T* to, const Epilogue& by) {
  const int64_t m = sums.size(0), n = sums.size(1);
  const auto at_or = [](const at::Tensor& t, int64_t i, float otherwise) {
    return t.defined() ? t.const_data_ptr<float>()[t.numel() == 1 ? 0 : i] : otherwise;
  };
  const int32_t *sum = sums.const_data_ptr<int32_t>(), *whole = by.int_bias.defined() ? by.int_bias.const_data_ptr<int32_t>() : nullptr;
  parallel(m, 4 * n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float token = by.per_token.defined() ? by.per_token.const_data_ptr<float>()[r] : 1.0f;
      for (int64_t c = 0; c < n; ++c) {
        const int32_t value = sum[r * n + c] + (whole ? whole[c] : 0);
        const float scaled = static_cast<float>(value) * at_or(by.scale, c, 1) * token;
        const float result = scaled + at_or(by.offset, c, 0) + (by.float_bias.defined() ? by.float_bias.const_data_ptr<float>()[c] : 0.0f);
        if constexpr (std::is_same_v<T, int8_t>) to[r * n + c] = saturated<int8_t>(result);
        else to[r * n + c] = static_cast<T>(result);
      }
    }
  });
}

// torch_npu/_op_plugin_docs.py: npu_quant_matmul: (x1 x2 + int32 bias) * scale * pertoken_scale, + offset or floating-point bias.
at::Tensor quant_matmul(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& scale, const Optional& offset, const Optional& per_token,
                        const Optional& bias, std::optional<int64_t> output_dtype, std::optional<int64_t> x1_dtype,
                        std::optional<int64_t> x2_dtype, std::optional<int64_t> pertoken_scale_dtype, std::optional<int64_t> scale_dtype,
                        at::OptionalIntArrayRef group_sizes, const Optional& y_scale) {
  static Tally& mine = tally("npu::npu_quant_matmul");
  const char* op = "npu_quant_matmul";
  on_device(op, "x1", x1);
  on_device_in_any_format(op, "x2", x2);
  on_device(op, "scale", scale);
  TORCH_CHECK(!x1_dtype && !x2_dtype && !pertoken_scale_dtype && !scale_dtype && !group_sizes && !given(y_scale), op,
              ": x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes and y_scale are not simulated");
  RULE("npu_quant_matmul.dtype", x1.scalar_type() == at::kChar && x2.scalar_type() == at::kChar, op,
       ": x1 and x2 must be int8 (int4 is not simulated), got ", x1.scalar_type(), " and ", x2.scalar_type());
  RULE("npu_quant_matmul.rank", x1.dim() >= 2 && x1.dim() <= 6, op, ": x1 must have 2 to 6 dimensions, got ", x1.sizes());
  TORCH_CHECK(x2.dim() == 2, op, ": x2 must have 2 dimensions (batches of weights are not simulated), got ", x2.sizes());
  const int64_t k = x1.size(-1), n = x2.size(1), m = k ? x1.numel() / k : 0;
  RULE("npu_quant_matmul.k", k == x2.size(0), op, ": x1 ", x1.sizes(), " does not fit x2 ", x2.sizes());
  STRICT("npu_quant_matmul.not-empty", x1.numel() && x2.numel(), op, ": x1 and x2 must not be empty, got ", x1.sizes(), " and ", x2.sizes());
  STRICT("npu_quant_matmul.size", k <= 65535 && n <= 65535, op, ": the last dimensions of x1 and x2 must be at most 65535, got ", k, " and ", n);
  RULE("npu_quant_matmul.scale-shape", scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == n), op, ": scale must be [1] or [", n,
       "], got ", scale.sizes());
  RULE("npu_quant_matmul.offset-shape", !given(offset) || (offset->dim() == 1 && (offset->numel() == 1 || offset->numel() == n)), op,
       ": offset must be [1] or [", n, "]");
  RULE("npu_quant_matmul.pertoken-scale-shape", !given(per_token) || (per_token->dim() == 1 && per_token->numel() == m), op,
       ": pertoken_scale must be [", m, "]");
  RULE("npu_quant_matmul.bias-shape", !given(bias) || (bias->dim() == 1 && bias->numel() == n), op, ": bias must be [", n, "]");
  const auto type = output_dtype ? static_cast<at::ScalarType>(*output_dtype) : at::kChar;
  check_product_types(type, scale, offset, per_token, bias);
  count_call(mine, 2 * m * k * n);
  at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor sums = int8_product(cpu_alias(dense(x1)).view({m, k}), cpu_alias(x2));
  Epilogue by{.scale = floats(scale)};
  if (given(offset)) by.offset = floats(*offset);
  if (given(per_token)) by.per_token = floats(*per_token);
  if (given(bias)) (bias->scalar_type() == at::kInt ? by.int_bias = cpu_alias(*bias).contiguous() : by.float_bias = floats(*bias));
  auto shape = x1.sizes().vec();
  shape.back() = n;
  at::Tensor out = at::empty(shape, x1.options().dtype(type));
  if (type == at::kChar) finish(sums, static_cast<int8_t*>(out.data_ptr()), by);
  else by_type(op, type, [&](auto tag) { finish(sums, static_cast<decltype(tag)*>(out.data_ptr()), by); });
  return out;
}

}  // namespace

void install_quant(torch::Library& npu) {
  npu.impl("npu_quantize", TORCH_FN(quantize));
  npu.impl("npu_dynamic_quant", TORCH_FN(dynamic_quant));
  npu.impl("npu_quant_matmul", TORCH_FN(quant_matmul));
}

}  // namespace ascend_sim
