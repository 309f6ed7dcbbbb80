// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts: npu_grouped_matmul, a matrix product for each expert's rows. Experts without rows cost nothing.
#include <ATen/ops/mm.h>

#include "matmul.h"
#include "moe.h"

namespace ascend_sim {
namespace {

using Tensors = std::vector<at::Tensor>;
using OptionalTensors = std::optional<at::TensorList>;

// One expert's product, all in host memory: out[m, n] = x[m, k] @ weight[k, n].
struct Product {
  at::Tensor x, weight, out;
  at::Tensor bias, scale, row_scale;  // [n], [n], [m]; undefined where there is none
};

// Few rows by a weight whose rows lie one after the other: the weight is read once, in stretches of columns whose sums stay in the cache. A stretch is
// a thread's share of the columns where that is not too much, so that each thread reads long pieces and has as much to do as any other.
void stream_weight(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& out) {
  constexpr int64_t least = 64, most = 2048, line = 16, together = 8;  // columns; floats in a line of the cache; rows of the weight at a time
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(1), step = weight.stride(0), threads = at::get_num_threads();
  const int64_t share = (columns + threads * line - 1) / (threads * line) * line;
  const int64_t stretch = std::clamp(share, least, most / rows / line * line);
  const float *a = x.const_data_ptr<float>(), *b = weight.const_data_ptr<float>();
  float* c = out.mutable_data_ptr<float>();
  parallel((columns + stretch - 1) / stretch, rows * depth * stretch, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * stretch; first < std::min(end * stretch, columns); first += stretch) {
      const int64_t width = std::min(stretch, columns - first);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(c + r * columns + first, width, 0.0f);
      int64_t k = 0;
      for (; k + together <= depth; k += together) {
        const float* rows_of_b = b + k * step + first;
        if (k + 2 * together <= depth)
          for (int64_t j = together; j < 2 * together; ++j)
            for (int64_t i = 0; i < width; i += line) __builtin_prefetch(rows_of_b + j * step + i, 0, 2);
        for (int64_t r = 0; r < rows; ++r) {
          const float* at = a + r * depth + k;
          float* to = c + r * columns + first;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            float sum = to[i];
            for (int64_t j = 0; j < together; ++j) sum += at[j] * rows_of_b[j * step + i];
            to[i] = sum;
          }
        }
      }
      for (; k < depth; ++k)
        for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) c[r * columns + first + i] += a[r * depth + k] * b[k * step + first + i];
    }
  });
}

void float_product(const at::Tensor& x, const at::Tensor& weight, at::Tensor out) {
  if (x.scalar_type() == at::kHalf) {  // the CPU has no fast product of halves
    out.copy_(at::mm(x.to(at::kFloat), weight.to(at::kFloat)));
  } else if (x.scalar_type() == at::kFloat && x.size(0) <= 8 && weight.stride(1) == 1 && x.is_contiguous() && out.is_contiguous()) {
    stream_weight(x, weight, out);
  } else if (const auto product = few_rows(x, weight)) {
    out.copy_(*product);
  } else {
    at::mm_out(out, x, weight);
  }
}

// out = (accumulated + bias) * scale * row_scale, rounded once.
void dequantise(const Product& p, const at::Tensor& accumulated) {
  const int64_t rows = p.out.size(0), columns = p.out.size(1);
  const int32_t* from = accumulated.const_data_ptr<int32_t>();
  const at::Tensor columns_scale = p.scale.to(at::kFloat).contiguous(), rows_scale = p.row_scale.defined() ? p.row_scale.contiguous() : p.row_scale;
  const float *s = columns_scale.const_data_ptr<float>(), *t = rows_scale.defined() ? rows_scale.const_data_ptr<float>() : nullptr;
  by_type("npu_grouped_matmul", p.out.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(p.out.data_ptr());
    parallel(rows, 4 * columns, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i)
          to[r * columns + i] = static_cast<T>(static_cast<float>(from[r * columns + i]) * s[i] * (t ? t[r] : 1.0f));
    });
  });
}

void compute(const Product& p) {
  if (p.x.size(0) == 0 || p.out.numel() == 0) return;
  if (p.x.scalar_type() != at::kChar) {
    float_product(p.x, p.weight, p.out);
    if (p.bias.defined()) at::Tensor(p.out).add_(p.bias);
    return;
  }
  at::Tensor accumulated = int8_product(p.x, p.weight);
  if (p.bias.defined()) accumulated.add_(p.bias);
  if (p.scale.defined()) dequantise(p, accumulated);
  else at::Tensor(p.out).copy_(accumulated);
}

// What the documentation allows beside x of a floating type: weight, result and bias.
void check_float(const char* op, at::ScalarType x, at::ScalarType weight, at::ScalarType out, const OptionalTensors& bias,
                 const OptionalTensors& scale, const OptionalTensors& per_token_scale) {
  RULE("npu_grouped_matmul.weight-dtype", weight == x, op, ": weight must have the data type of x, ", x, " (or both int8), got ", weight);
  RULE("npu_grouped_matmul.float-output", out == x, op, ": output_dtype must be the data type of x, ", x, ", got ", out);
  RULE("npu_grouped_matmul.float-scales", !scale && !per_token_scale, op, ": scale and per_token_scale need x and weight of int8, got ", x);
  if (bias) {
    const at::ScalarType wanted = x == at::kHalf ? at::kHalf : at::kFloat;
    STRICT("npu_grouped_matmul.float-bias", bias->front().scalar_type() == wanted, op, ": bias must be ", wanted, " with x of ", x, ", got ", bias->front().scalar_type());
  }
}

void check_int8(const char* op, at::ScalarType weight, at::ScalarType out, const OptionalTensors& bias, const OptionalTensors& scale,
                const OptionalTensors& per_token_scale) {
  RULE("npu_grouped_matmul.weight-dtype", weight == at::kChar, op, ": weight must be int8 with x of int8, got ", weight);
  RULE("npu_grouped_matmul.int8-bias", !bias || bias->front().scalar_type() == at::kInt, op, ": bias must be int32 with x of int8, got ",
       bias->front().scalar_type());
  TORCH_CHECK(out == at::kInt || is_float(out), op, ": output_dtype must be int32, float16 or bfloat16 with x of int8 (int8 is not simulated), got ",
              out);
  TORCH_CHECK(out != at::kInt || !scale, op, ": scale must be None for output_dtype int32");
  TORCH_CHECK(out == at::kInt || scale, op, ": scale is needed for output_dtype ", out);
  TORCH_CHECK(!per_token_scale || scale, op, ": per_token_scale needs scale");
  if (!scale) return;
  const at::ScalarType type = scale->front().scalar_type();
  TORCH_CHECK(is_float(type), op, ": scale must be bfloat16 or float32 (int64 is not simulated), got ", type);
  STRICT("npu_grouped_matmul.int8-output", (type == at::kBFloat16 && out == at::kBFloat16) || (type == at::kFloat && out == at::kHalf), op,
         ": scale and output_dtype must be bfloat16 and bfloat16 or float32 and float16, got ", type, " and ", out);
  RULE("npu_grouped_matmul.per-token-scale-dtype", !per_token_scale || per_token_scale->front().scalar_type() == at::kFloat, op,
       ": per_token_scale must be float32, got ", per_token_scale->front().scalar_type());
}

// The list as tensors in host memory, on the device as it must be.
Tensors aliases(const char* op, const char* argument, at::TensorList list) {
  Tensors out;
  for (const at::Tensor& t : list) {
    if (std::string_view(argument) == "weight") on_device_in_any_format(op, argument, t);
    else on_device(op, argument, t);
    out.push_back(cpu_alias(t));
  }
  return out;
}

// Expert e's part of a parameter: one tensor for each expert, or one for all with the expert as first dimension. Undefined where there is none.
at::Tensor of_expert(const char* op, const char* argument, const OptionalTensors& list, int64_t e, int64_t experts, bool single, int64_t columns) {
  if (!list) return {};
  const at::Tensor t = cpu_alias(single ? list->front() : (*list)[e]);
  TORCH_CHECK(single ? t.dim() == 2 && t.size(0) == experts && t.size(1) == columns : t.numel() == columns && t.dim() <= 2, op, ": ", argument,
              " must be ", single ? "one tensor [experts, n]" : "a tensor [n] for each weight", ", n = ", columns, ", got ", t.sizes());
  return single ? t[e] : t.reshape({columns});
}

struct Call {
  const char* op;
  Tensors x, weight;
  OptionalTensors bias, scale, per_token_scale;
  at::ScalarType type;  // of the result
  int64_t flops = 0;

  bool single() const { return weight.size() == 1 && weight[0].dim() == 3; }
  int64_t experts() const { return single() ? weight[0].size(0) : static_cast<int64_t>(weight.size()); }
  at::Tensor expert(int64_t e) const { return single() ? weight[0][e] : weight[e]; }

  void run(int64_t e, const at::Tensor& rows, const at::Tensor& row_scale, const at::Tensor& out) {
    const at::Tensor w = expert(e);
    RULE("npu_grouped_matmul.k", w.dim() == 2 && rows.dim() == 2 && w.size(0) == rows.size(1), op, ": x [m, k] and weight [k, n] must have one k, got ",
                rows.sizes(), " and ", w.sizes());
    Product p{rows, w, out, of_expert(op, "bias", bias, e, experts(), single(), w.size(1)),
              of_expert(op, "scale", scale, e, experts(), single(), w.size(1)), row_scale};
    compute(p);
    flops += 2 * rows.size(0) * w.size(0) * w.size(1);
  }
};

void check_limits(const Call& c) {
  STRICT("npu_grouped_matmul.list-length", c.x.size() <= 128 && c.weight.size() <= 128, c.op, ": x and weight must be lists of at most 128 tensors, got ", c.x.size(), " and ",
         c.weight.size());
  for (const Tensors* list : {&c.x, &c.weight})
    for (const at::Tensor& t : *list)
      STRICT("npu_grouped_matmul.inner-size", t.size(-1) < 65536, c.op, ": the last dimension must be below 65536, got ", t.sizes());
  for (const at::Tensor& t : c.x) {
    STRICT("npu_grouped_matmul.x-transposed", t.dim() < 2 || t.stride(-1) == 1 || t.numel() == 0, c.op, ": x must not be transposed, got strides ",
           t.strides(), " of ", t.sizes());
    TORCH_CHECK(t.scalar_type() == c.x[0].scalar_type(), c.op, ": all of x must have one data type, got ", c.x[0].scalar_type(), " and ",
                t.scalar_type());
  }
  for (const at::Tensor& t : c.weight) {
    RULE("npu_grouped_matmul.weight-rank", t.dim() == (c.single() ? 3 : 2), c.op, ": weight must be one tensor [experts, k, n] or tensors [k, n], got ", t.sizes());
    TORCH_CHECK(t.scalar_type() == c.weight[0].scalar_type(), c.op, ": all of weight must have one data type, got ", c.weight[0].scalar_type(),
                " and ", t.scalar_type());
  }
}

// group_type -1: x[i] @ weight[i], a result for each.
Tensors separate(Call& c, int64_t split_item, const std::optional<at::Tensor>& group_list, at::Device device) {
  RULE("npu_grouped_matmul.separate-split-item", split_item == 0 || split_item == 1, c.op, ": split_item must be 0 or 1 with group_type -1, got ", split_item);
  RULE("npu_grouped_matmul.separate-group-list", !group_list, c.op, ": group_list must be None with group_type -1");
  TORCH_CHECK(!c.single() && c.x.size() == c.weight.size(), c.op, ": x and weight must be lists of one length with group_type -1, got ",
              c.x.size(), " and ", c.weight.size());
  Tensors out;
  for (size_t i = 0; i < c.x.size(); ++i) {
    std::vector<int64_t> shape = c.x[i].sizes().vec();
    RULE("npu_grouped_matmul.separate-rank", shape.size() >= 2 && shape.size() <= 6, c.op, ": x must have 2 to 6 dimensions, got ", c.x[i].sizes());
    shape.back() = c.weight[i].size(1);
    out.push_back(at::empty(shape, at::TensorOptions(device).dtype(c.type)));
    const at::Tensor rows = c.x[i].reshape({-1, c.x[i].size(-1)});
    c.run(static_cast<int64_t>(i), rows, c.per_token_scale ? cpu_alias((*c.per_token_scale)[i]) : at::Tensor(),
          cpu_alias(out.back()).view({rows.size(0), shape.back()}));
  }
  return out;
}

// group_type 0: the rows of x in groups, one result. Rows after the last group belong to none and are not written. The documentation wants no such
// rows, but production code has them (a range of active experts, the padded result of a dispatch).
Tensors grouped(Call& c, int64_t split_item, const std::optional<at::Tensor>& group_list, int64_t group_list_type, at::Device device) {
  RULE("npu_grouped_matmul.split-item", split_item == 2 || split_item == 3, c.op, ": split_item must be 2 or 3 with group_type 0, got ", split_item);
  TORCH_CHECK(c.x.size() == 1 || static_cast<int64_t>(c.x.size()) == c.experts(), c.op, ": x must hold one tensor or one for each of the ",
              c.experts(), " weights, got ", c.x.size());
  RULE("npu_grouped_matmul.group-list-given", group_list || c.x.size() > 1, c.op, ": group_list is required with one x and group_type 0");
  int64_t rows = 0;
  std::vector<int64_t> ends;
  for (const at::Tensor& t : c.x) {
    RULE("npu_grouped_matmul.rank", t.dim() == 2, c.op, ": x must have 2 dimensions with group_type 0, got ", t.sizes());
    ends.push_back(rows += t.size(0));
  }
  if (group_list) {
    const std::vector<int64_t> given = group_ends(c.op, "group_list", *group_list, group_list_type == 1, rows);
    RULE("npu_grouped_matmul.groups-length", static_cast<int64_t>(given.size()) == c.experts(), c.op,
         ": group_list must hold a number for each of the ", c.experts(), " weights, got ", given.size());
    STRICT("npu_grouped_matmul.more-than-one-count", group_list_type == 0 || given.size() > 1, c.op,
           ": group_list must hold more than one number with group_list_type 1");
    STRICT("npu_grouped_matmul.most-groups", given.size() <= 1024, c.op, ": group_list must hold at most 1024 numbers, got ", given.size());
    RULE("npu_grouped_matmul.groups-of-each-x", c.x.size() == 1 || given == ends, c.op, ": group_list must name the rows of each x, ", ends, ", got ", given);
    ends = given;
  }
  const int64_t columns = c.weight[0].size(-1);
  for (const at::Tensor& w : c.weight)
    RULE("npu_grouped_matmul.one-n", w.size(-1) == columns, c.op, ": all of weight must have one n, got ", columns, " and ", w.size(-1));
  at::Tensor row_scale;
  if (c.per_token_scale) {
    TORCH_CHECK(c.x.size() == 1 && c.per_token_scale->front().numel() == rows, c.op, ": per_token_scale must hold a number for each of the ", rows,
                " rows, got ", c.per_token_scale->front().sizes());
    row_scale = cpu_alias(c.per_token_scale->front()).reshape({rows});
  }
  at::Tensor out = at::empty({rows, columns}, at::TensorOptions(device).dtype(c.type));
  const at::Tensor all = cpu_alias(out);
  for (int64_t e = 0, begin = 0; e < c.experts(); begin = ends[e++]) {
    if (ends[e] == begin) continue;
    const at::Tensor mine = c.x.size() == 1 ? c.x[0].slice(0, begin, ends[e]) : c.x[e];
    c.run(e, mine, row_scale.defined() ? row_scale.slice(0, begin, ends[e]) : row_scale, all.slice(0, begin, ends[e]));
  }
  return {out};
}

// torch_npu/_op_plugin_docs.py: npu_grouped_matmul
Tensors grouped_matmul(at::TensorList x, at::TensorList weight, OptionalTensors bias, OptionalTensors scale, OptionalTensors offset,
                       OptionalTensors antiquant_scale, OptionalTensors antiquant_offset, OptionalTensors per_token_scale,
                       const std::optional<at::Tensor>& group_list, OptionalTensors activation_input, OptionalTensors activation_quant_scale,
                       OptionalTensors activation_quant_offset, std::optional<int64_t> split_item, std::optional<int64_t> group_type,
                       std::optional<int64_t> group_list_type, std::optional<int64_t> act_type, at::OptionalIntArrayRef,
                       std::optional<int64_t> output_dtype, std::optional<int64_t> x_dtype, std::optional<int64_t> weight_dtype,
                       std::optional<int64_t> scale_dtype, std::optional<int64_t> per_token_scale_dtype) {
  static Tally& mine = tally("npu::npu_grouped_matmul");
  const char* op = "npu_grouped_matmul";
  auto given = [](OptionalTensors& list) { return list && !list->empty() ? list : OptionalTensors(); };
  TORCH_CHECK(!given(offset) && !given(antiquant_scale) && !given(antiquant_offset) && !given(activation_input) &&
                  !given(activation_quant_scale) && !given(activation_quant_offset),
              op, ": offset, antiquant_* and activation_* are not simulated");
  TORCH_CHECK(act_type.value_or(0) == 0, op, ": act_type is not simulated, got ", *act_type);
  TORCH_CHECK(!x_dtype && !weight_dtype && !scale_dtype && !per_token_scale_dtype, op, ": x_dtype, weight_dtype and scale dtypes are not simulated");
  TORCH_CHECK(!x.empty() && !weight.empty(), op, ": x and weight must not be empty lists");
  const int64_t kind = group_list_type.value_or(0), type = group_type.value_or(-2);
  RULE("npu_grouped_matmul.group-list-type", kind == 0 || kind == 1, op, ": group_list_type must be 0 (cumulative counts) or 1 (counts), got ", kind);
  RULE("npu_grouped_matmul.group-type", type == 0 || type == -1, op, ": group_type must be 0 or -1, got ", group_type ? std::to_string(*group_type) : "None");
  TORCH_CHECK(!output_dtype || (*output_dtype >= 0 && *output_dtype < static_cast<int64_t>(at::ScalarType::NumOptions)), op,
              ": output_dtype ", output_dtype.value_or(0), " is not simulated");
  at::AutoDispatchBelowADInplaceOrView below;
  Call call{op, aliases(op, "x", x), aliases(op, "weight", weight), given(bias), given(scale), given(per_token_scale),
            output_dtype ? static_cast<at::ScalarType>(*output_dtype) : x[0].scalar_type()};
  for (auto& [name, list] : {std::pair{"bias", &call.bias}, {"scale", &call.scale}})
    RULE("npu_grouped_matmul.parameters-length", !*list || (*list)->size() == weight.size(), op, ": ", name, " must be a list as long as weight, ", weight.size(), ", got ",
                (*list)->size());
  RULE("npu_grouped_matmul.per-token-scale-length", !call.per_token_scale || call.per_token_scale->size() == x.size(), op, ": per_token_scale must be a list as long as x, ", x.size(),
              ", got ", call.per_token_scale->size());
  check_limits(call);
  const at::ScalarType from = call.x[0].scalar_type(), with = call.weight[0].scalar_type();
  RULE("npu_grouped_matmul.dtype", is_float(from) || from == at::kChar, op, ": x must be float16, bfloat16, float32 or int8, got ", from);
  if (from == at::kChar) check_int8(op, with, call.type, call.bias, call.scale, call.per_token_scale);
  else check_float(op, from, with, call.type, call.bias, call.scale, call.per_token_scale);
  Tensors out = type == -1 ? separate(call, split_item.value_or(0), group_list, x[0].device())
                           : grouped(call, split_item.value_or(0), group_list, kind, x[0].device());
  count_call(mine, call.flops);
  return out;
}

}  // namespace

void install_grouped_matmul(torch::Library& npu) { npu.impl("npu_grouped_matmul", TORCH_FN(grouped_matmul)); }

}  // namespace ascend_sim
