// SPDX-License-Identifier: Apache-2.0
//
// The product with a weight of int8 or int4, which is dequantised on the way, and the packing of int4. Source: torch_npu/_op_plugin_docs.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "kernels.h"
#include "matmul.h"

namespace ascend_sim {
namespace {

using Optional = std::optional<at::Tensor>;

bool given(const Optional& t) { return t && t->defined(); }

bool is_transposed(const at::Tensor& t) { return t.dim() == 2 && t.t().is_contiguous(); }

// int4 in int32: value i of eight lies in bits 4i to 4i + 3. The documentation only says that the values are interleaved, so this order is the
// simulator's own: both operators here agree on it, and no program may read it.
constexpr int64_t per_word = 8;

void pack(const int32_t* from, int32_t* to, int64_t words) {
  parallel(words, 2 * per_word, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      uint32_t word = 0;
      for (int64_t i = 0; i < per_word; ++i) word |= (static_cast<uint32_t>(from[w * per_word + i]) & 15u) << (4 * i);
      to[w] = static_cast<int32_t>(word);
    }
  });
}

// The shift to the left moves a value's sign to the highest bit, the one to the right repeats it.
void unpack(const int32_t* from, float* to, int64_t words) {
  for (int64_t w = 0; w < words; ++w)
#pragma omp simd
    for (int64_t i = 0; i < per_word; ++i)
      to[w * per_word + i] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(from[w]) << (28 - 4 * i)) >> 28);
}

// A weight [k, n] in host memory. It lies in lines: its rows, or, where it is transposed, its columns.
struct Weight {
  at::Tensor data;           // int8, or int32 with int4
  bool transposed;
  int64_t k, n, group;       // `group` rows have a scale and an offset in common
  at::Tensor scale, offset;  // float32 [groups, n]

  int64_t lines() const { return transposed ? n : k; }
  int64_t length() const { return transposed ? k : n; }

  // Numbers [first, first + width) of a line, dequantised; `first` and `width` are multiples of 8 where the data are int4.
  void dequantise(int64_t line, int64_t first, int64_t width, float* to) const {
    const int64_t start = line * length() + first;
    if (data.scalar_type() == at::kChar) return scaled(data.const_data_ptr<int8_t>() + start, line, first, width, to);
    unpack(data.const_data_ptr<int32_t>() + start / per_word, to, width / per_word);
    scaled(to, line, first, width, to);
  }

 private:
  // `from` may be `to`.
  template <class T>
  void scaled(const T* from, int64_t line, int64_t first, int64_t width, float* to) const {
    if (transposed) scaled_column(from, line, first, width, to);
    else scaled_row(from, line, first, width, to);
  }

  template <class T>
  void scaled_row(const T* from, int64_t row, int64_t first, int64_t width, float* to) const {
    const int64_t at = row / group * n + first;
    const float *s = scale.const_data_ptr<float>() + at, *o = offset.const_data_ptr<float>() + at;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = (static_cast<float>(from[i]) + o[i]) * s[i];
  }

  template <class T>
  void scaled_column(const T* from, int64_t column, int64_t first, int64_t width, float* to) const {
    for (int64_t i = 0; i < width;) {
      const int64_t index = (first + i) / group, end = std::min(width, (index + 1) * group - first);
      const float s = scale.const_data_ptr<float>()[index * n + column], o = offset.const_data_ptr<float>()[index * n + column];
#pragma omp simd
      for (int64_t j = i; j < end; ++j) to[j] = (static_cast<float>(from[j]) + o) * s;
      i = end;
    }
  }
};

// Beyond, a weight that is dequantised as a whole and multiplied by the CPU's library is faster.
constexpr int64_t few = 4;  // rows of x

// Few rows: each column is dequantised into the cache and used at once.
void by_columns(const float* x, int64_t m, const Weight& w, float* out) {
  parallel(w.n, (2 + m) * w.k, [&](int64_t begin, int64_t end) {
    std::vector<float> column(w.k);
    for (int64_t c = begin; c < end; ++c) {
      w.dequantise(c, 0, w.k, column.data());
      for (int64_t r = 0; r < m; ++r) {
        const float *a = x + r * w.k, *b = column.data();
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < w.k; ++i) sum += a[i] * b[i];
        out[r * w.n + c] = sum;
      }
    }
  });
}

// Few rows: each row of the weight is dequantised in stretches, whose sums stay in the cache.
void by_rows(const float* x, int64_t m, const Weight& w, float* out) {
  constexpr int64_t stretch = 512;
  parallel((w.n + stretch - 1) / stretch, (2 + m) * w.k * stretch, [&](int64_t begin, int64_t end) {
    float row[stretch];
    for (int64_t first = begin * stretch; first < std::min(end * stretch, w.n); first += stretch) {
      const int64_t width = std::min(stretch, w.n - first);
      for (int64_t r = 0; r < m; ++r) std::fill_n(out + r * w.n + first, width, 0.0f);
      for (int64_t i = 0; i < w.k; ++i) {
        w.dequantise(i, first, width, row);
        for (int64_t r = 0; r < m; ++r) {
          const float factor = x[r * w.k + i];
          float* to = out + r * w.n + first;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) to[c] += factor * row[c];
        }
      }
    }
  });
}

at::Tensor whole(const Weight& w) {
  at::Tensor out = at::empty({w.lines(), w.length()}, at::TensorOptions().dtype(at::kFloat));
  float* to = out.data_ptr<float>();
  parallel(w.lines(), 3 * w.length(), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) w.dequantise(line, 0, w.length(), to + line * w.length());
  });
  return w.transposed ? out.t() : out;
}

// float32 [m, n] in host memory
at::Tensor product(const at::Tensor& x, const Weight& w) {
  const int64_t m = x.size(0);
  if (m > few) {
    const at::Tensor weight = whole(w);
    const auto found = few_rows(x, weight);
    return found ? *found : at::mm(x, weight);
  }
  at::Tensor out = at::empty({m, w.n}, at::TensorOptions().dtype(at::kFloat));
  (w.transposed ? by_columns : by_rows)(x.const_data_ptr<float>(), m, w, out.data_ptr<float>());
  return out;
}

// The sums and the bias [n], rounded once.
at::Tensor rounded(const at::Tensor& sums, const at::Tensor& bias, at::ScalarType type, c10::Device device) {
  const int64_t m = sums.size(0), n = sums.size(1);
  at::Tensor out = unwritten({m, n}, {n, 1}, type, device);
  const float *from = sums.const_data_ptr<float>(), *add = bias.const_data_ptr<float>();
  by_type("npu_weight_quant_batchmatmul", type, [&](auto tag) {
    auto* to = static_cast<decltype(tag)*>(out.data_ptr());
    parallel(m, 2 * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < n; ++c) to[r * n + c] = static_cast<decltype(tag)>(from[r * n + c] + add[c]);
    });
  });
  return out;
}

void check_types(const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const Optional& offset, const Optional& bias) {
  const auto type = x.scalar_type(), scales = scale.scalar_type();
  RULE(".dtype", is_float(type), op, ": x must be float16 or bfloat16, got ", type);
  STRICT("npu_weight_quant_batchmatmul.dtype", type != at::kFloat, op, ": x must be float16 or bfloat16, got Float");
  RULE("npu_weight_quant_batchmatmul.weight-dtype", weight.scalar_type() == at::kChar || weight.scalar_type() == at::kInt, op,
       ": weight must be int8, or int32 that holds int4, got ", weight.scalar_type());
  TORCH_CHECK(scales != at::kLong, op, ": antiquant_scale of int64 is not simulated");
  STRICT("npu_weight_quant_batchmatmul.scale-dtype", scales == type, op, ": antiquant_scale must have the data type of x, ", type, ", got ", scales);
  STRICT("npu_weight_quant_batchmatmul.offset-dtype", !given(offset) || offset->scalar_type() == scales, op,
         ": antiquant_offset must have the data type of antiquant_scale, ", scales, ", got ", offset->scalar_type());
  const auto biases = type == at::kHalf ? at::kHalf : at::kFloat;
  STRICT("npu_weight_quant_batchmatmul.bias-dtype", !given(bias) || bias->scalar_type() == biases, op, ": bias must be ", biases, " with x of ", type,
         ", got ", bias->scalar_type());
}

// Which strides the documentation allows: those of a contiguous tensor or of a transposed one.
void check_layouts(const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const Optional& offset, const Optional& bias) {
  const auto check = [&](const char* name, const at::Tensor& t) {
    STRICT("npu_weight_quant_batchmatmul.layout", t.is_contiguous() || is_transposed(t), op, ": ", name,
           " must be contiguous or the transpose of a contiguous tensor, got strides ", t.strides(), " of ", t.sizes());
  };
  check("x", x);
  check("weight", weight);
  check("antiquant_scale", scale);
  if (given(offset)) check("antiquant_offset", *offset);
  STRICT("npu_weight_quant_batchmatmul.bias-layout", !given(bias) || bias->is_contiguous(), op, ": bias must be contiguous, got strides ",
         bias->strides(), " of ", bias->sizes());
  STRICT("npu_weight_quant_batchmatmul.weight-format", !is_fractal(weight), op, ": weight must have the format ND outside of compiled graphs, got FRACTAL_NZ");
}

// k and n of a weight: int32 has int4 along the lines in which it lies.
std::pair<int64_t, int64_t> sizes_of(const at::Tensor& weight) {
  const int64_t values = weight.scalar_type() == at::kInt ? per_word : 1;
  return weight.is_contiguous() ? std::pair{weight.size(0), weight.size(1) * values} : std::pair{weight.size(0) * values, weight.size(1)};
}

void check_sizes(const char* op, const at::Tensor& x, const at::Tensor& weight, int64_t k, int64_t n) {
  RULE("npu_weight_quant_batchmatmul.k", x.size(1) == k, op, ": x ", x.sizes(), " does not fit a weight of ", k, " rows and ", n, " columns, ",
       weight.scalar_type(), " ", weight.sizes());
  STRICT("npu_weight_quant_batchmatmul.not-empty", x.numel() && weight.numel(), op, ": x and weight must not be empty, got ", x.sizes(), " and ",
         weight.sizes());
  STRICT("npu_weight_quant_batchmatmul.size", k <= 65535 && n <= 65535, op, ": k and n must be at most 65535, got ", k, " and ", n);
  STRICT("npu_weight_quant_batchmatmul.transposed-rows", x.is_contiguous() || x.size(0) <= 65535, op,
         ": a transposed x must have at most 65535 rows, got ", x.size(0));
}

// How many rows of the weight have a scale in common: all, or a group's where the scale has several rows.
int64_t group_rows(const char* op, const at::Tensor& scale, const Optional& offset, int64_t group, int64_t k, int64_t n) {
  const bool grouped = scale.dim() == 2 && scale.size(0) > 1;
  STRICT("npu_weight_quant_batchmatmul.group-size", !grouped || (group >= 32 && group < k && group % 32 == 0), op,
         ": antiquant_group_size must be a multiple of 32 from 32 to k - 1, ", k - 1, ", where antiquant_scale has several rows, got ", group);
  const int64_t rows = grouped && group > 0 ? (k + group - 1) / group : 1;
  const bool fits = grouped ? scale.size(0) == rows && scale.size(1) == n
                            : scale.dim() >= 1 && scale.dim() <= 2 && (scale.numel() == 1 || (scale.size(-1) == n && scale.numel() == n));
  RULE("npu_weight_quant_batchmatmul.scale-shape", fits, op, ": antiquant_scale must be [1], [1, 1], [", n, "], [1, ", n,
       "], or with groups [k / antiquant_group_size, rounded up, ", n, "], got ", scale.sizes(), " and groups of ", group);
  RULE("npu_weight_quant_batchmatmul.offset-shape", !given(offset) || offset->sizes() == scale.sizes(), op,
       ": antiquant_offset must have the shape of antiquant_scale, ", scale.sizes(), ", got ", offset->sizes());
  return grouped ? group : std::max<int64_t>(1, k);
}

void check_places(const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const Optional& offset, const Optional& bias) {
  on_device(op, "x", x);
  on_device_in_any_format(op, "weight", weight);
  on_device(op, "antiquant_scale", scale);
  if (given(offset)) on_device(op, "antiquant_offset", *offset);
  if (given(bias)) on_device(op, "bias", *bias);
}

// Scales or offsets as float32 [groups, n], one row where there are no groups.
at::Tensor by_group(const at::Tensor& t, int64_t n) {
  const at::Tensor numbers = floats(t);
  return numbers.numel() == 1 ? numbers.reshape({1}).expand({n}).contiguous() : numbers;
}

// torch_npu/_op_plugin_docs.py: npu_weight_quant_batchmatmul: x @ ((weight + antiquant_offset) * antiquant_scale) + bias
at::Tensor weight_quant_batchmatmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const Optional& offset, const Optional& quant_scale,
                                    const Optional& quant_offset, const Optional& bias, int64_t group_size, int64_t inner_precise,
                                    std::optional<int64_t> weight_dtype) {
  static Tally& mine = tally("npu::npu_weight_quant_batchmatmul");
  const char* op = "npu_weight_quant_batchmatmul";
  check_places(op, x, weight, scale, offset, bias);
  TORCH_CHECK(!given(quant_scale) && !given(quant_offset) && !weight_dtype, op, ": quant_scale, quant_offset and weight_dtype are not simulated");
  RULE("npu_weight_quant_batchmatmul.rank", x.dim() == 2 && weight.dim() == 2, op, ": x and weight must have 2 dimensions, got ", x.sizes(), " and ",
       weight.sizes());
  RULE("npu_weight_quant_batchmatmul.inner-precise", inner_precise == 0 || inner_precise == 1, op, ": inner_precise must be 0 or 1, got ", inner_precise);
  check_types(op, x, weight, scale, offset, bias);
  check_layouts(op, x, weight, scale, offset, bias);
  TORCH_CHECK(weight.scalar_type() != at::kInt || weight.is_contiguous() || is_transposed(weight), op,
              ": a weight of int4 must be contiguous or transposed, got strides ", weight.strides(), " of ", weight.sizes());
  const auto [k, n] = sizes_of(weight);
  check_sizes(op, x, weight, k, n);
  const int64_t group = group_rows(op, scale, offset, group_size, k, n), m = x.size(0);
  RULE("npu_weight_quant_batchmatmul.bias-shape", !given(bias) || bias->numel() == 1 || (bias->dim() <= 2 && bias->numel() == n && bias->size(-1) == n), op,
       ": bias must be [1], [", n, "] or [1, ", n, "], got ", bias->sizes());
  count_call(mine, 2 * m * k * n);
  at::AutoDispatchBelowADInplaceOrView below;
  const bool transposed = !weight.is_contiguous() && is_transposed(weight);
  const at::Tensor scales = by_group(scale, n);
  const at::Tensor offsets = given(offset) ? by_group(*offset, n) : at::zeros_like(scales);
  const at::Tensor lines = cpu_alias(transposed ? weight.t() : weight).contiguous();
  const at::Tensor sums = product(floats(x), Weight{lines, transposed, k, n, group, scales, offsets});
  return rounded(sums, given(bias) ? by_group(*bias, n) : at::zeros({n}, at::TensorOptions().dtype(at::kFloat)), x.scalar_type(), x.device());
}

// torch_npu/_op_plugin_docs.py: npu_convert_weight_to_int4pack: eight values of int4 in an int32. inner_k_tiles is reserved there and does nothing.
at::Tensor convert_weight_to_int4pack(const at::Tensor& weight, int64_t) {
  static Tally& mine = tally("npu::npu_convert_weight_to_int4pack");
  const char* op = "npu_convert_weight_to_int4pack";
  count_call(mine);
  on_device_in_any_format(op, "weight", weight);
  RULE("npu_convert_weight_to_int4pack.dtype", weight.scalar_type() == at::kInt, op, ": weight must be int32, got ", weight.scalar_type());
  RULE("npu_convert_weight_to_int4pack.rank", weight.dim() == 2, op, ": weight must have 2 dimensions, got ", weight.sizes());
  RULE("npu_convert_weight_to_int4pack.aligned", weight.size(1) % per_word == 0, op, ": the last dimension of weight must be a multiple of 8, got ",
       weight.sizes());
  STRICT("npu_convert_weight_to_int4pack.layout", weight.is_contiguous(), op, ": weight must be contiguous, got strides ", weight.strides(), " of ",
         weight.sizes());
  const at::Tensor values = dense(weight);
  const int32_t* from = values.const_data_ptr<int32_t>();
  const auto wrong = std::find_if(from, from + values.numel(), [](int32_t value) { return value < -8 || value > 7; });
  RULE("npu_convert_weight_to_int4pack.values", wrong == from + values.numel(), op, ": the values of weight must be from -8 to 7, got ", *wrong);
  const int64_t words = weight.size(1) / per_word;
  at::Tensor out = unwritten({weight.size(0), words}, {words, 1}, at::kInt, weight.device());
  pack(from, static_cast<int32_t*>(out.data_ptr()), out.numel());
  return out;
}

}  // namespace

void install_weight_quant(torch::Library& npu) {
  npu.impl("npu_weight_quant_batchmatmul", TORCH_FN(weight_quant_batchmatmul));
  npu.impl("npu_convert_weight_to_int4pack", TORCH_FN(convert_weight_to_int4pack));
}

}  // namespace ascend_sim
