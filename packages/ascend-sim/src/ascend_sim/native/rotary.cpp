// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embeddings.
#include <ATen/ops/matmul.h>

#include "kernels.h"

namespace ascend_sim {
namespace {

enum class Mode { half, interleave };

Mode mode_of(const char* op, c10::string_view mode) {
  if (mode == "half") return Mode::half;
  RULE(".mode", mode == "interleave", op, ": rotary_mode must be 'half' or 'interleave', got '", mode, "'");
  return Mode::interleave;
}

// y = x * cos + rotate(x) * sin over one vector of `size` numbers, in float32, rounded once; y may be x. `in` holds `size` floats.
// rotate: half (-x2, x1) of the two halves, interleave (-x[1], x[0], -x[3], x[2], ...).
template <class T, class C>
void rotate(const T* x, const C* cos, const C* sin, T* y, float* in, int64_t size, Mode mode) {
  const int64_t half = size / 2;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) in[i] = static_cast<float>(x[i]);
  if (mode == Mode::half) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      y[i] = static_cast<T>(in[i] * static_cast<float>(cos[i]) - in[half + i] * static_cast<float>(sin[i]));
      y[half + i] = static_cast<T>(in[half + i] * static_cast<float>(cos[half + i]) + in[i] * static_cast<float>(sin[half + i]));
    }
  } else {
    for (int64_t i = 0; i < size; i += 2) {
      y[i] = static_cast<T>(in[i] * static_cast<float>(cos[i]) - in[i + 1] * static_cast<float>(sin[i]));
      y[i + 1] = static_cast<T>(in[i + 1] * static_cast<float>(cos[i + 1]) + in[i] * static_cast<float>(sin[i + 1]));
    }
  }
}

// Offset of the cos/sin row of each of x's rows [d0, d1, d2]: a dimension of length 1 is broadcast.
struct Broadcast {
  int64_t size[3], stride[3];
  Broadcast(const char* op, at::IntArrayRef x, at::IntArrayRef r) {
    int64_t step = r.back();
    for (int64_t i = 2; i >= 0; --i) {
      TORCH_CHECK(r[i] == x[i] || r[i] == 1, op, ": cos and sin of shape ", r, " do not broadcast to ", x);
      size[i] = x[i];
      stride[i] = r[i] == 1 ? 0 : step;
      step *= r[i];
    }
  }
  int64_t operator()(int64_t row) const {
    const int64_t i2 = row % size[2], i1 = row / size[2] % size[1], i0 = row / size[2] / size[1];
    return i0 * stride[0] + i1 * stride[1] + i2 * stride[2];
  }
  int64_t rows() const { return size[0] * size[1] * size[2]; }
};

// All rows of x (contiguous, last dimension rotated) into y; cos and sin share one type, which may differ from x's.
void rotate_all(const char* op, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& y, const Broadcast& where,
                Mode mode) {
  const int64_t size = x.size(-1);
  by_type(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    by_type(op, cos.scalar_type(), [&](auto angle) {
      using C = decltype(angle);
      const T* from = static_cast<const T*>(x.const_data_ptr());
      const C *c = static_cast<const C*>(cos.const_data_ptr()), *s = static_cast<const C*>(sin.const_data_ptr());
      T* to = static_cast<T*>(y.data_ptr());
      parallel(where.rows(), 4 * size, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(size);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t at = where(r);
          rotate(from + r * size, c + at, s + at, to + r * size, scratch.data(), size, mode);
        }
      });
    });
  });
}

// Which of BNSD, BSND and SBND a call may be, by the documented shapes of r1 and limits of the sizes: any will do.
bool documented_shape(at::IntArrayRef x, at::IntArrayRef r, Mode mode, int64_t most) {
  constexpr int layouts[3][3] = {{0, 2, 1}, {0, 1, 2}, {1, 0, 2}};  // where B, S, N are
  for (auto& [b, s, n] : layouts) {
    const bool sequence = r[s] == x[s], shared = sequence && r[n] == 1 && r[b] == 1, per_batch = sequence && r[n] == 1 && r[b] == x[b],
               full = r.slice(0, 3) == x.slice(0, 3);
    if (mode == Mode::half ? (shared || per_batch || full) && x[b] <= most && x[n] <= most : shared && x[b] * x[n] <= most) return true;
  }
  return false;
}

// torch_npu/_op_plugin_docs.py: npu_rotary_mul
at::Tensor rotary_mul(const at::Tensor& input, const at::Tensor& r1, const at::Tensor& r2, c10::string_view rotary_mode,
                      const std::optional<at::Tensor>& rotate_matrix) {
  static Tally& mine = tally("npu::npu_rotary_mul");
  const char* op = "npu_rotary_mul";
  count_call(mine);
  for (auto& [name, t] : {std::pair{"input", &input}, {"r1", &r1}, {"r2", &r2}}) {
    on_device(op, name, *t);
    RULE("npu_rotary_mul.rank", t->dim() == 4, op, ": ", name, " must have 4 dimensions, got ", t->sizes());
    RULE("npu_rotary_mul.dtype", is_float(t->scalar_type()), op, ": ", name, " must be float16, bfloat16 or float32, got ", t->scalar_type());
  }
  const Mode mode = mode_of(op, rotary_mode);
  const int64_t size = input.size(3);
  RULE("npu_rotary_mul.even-size", size % 2 == 0, op, ": D must be a multiple of 2, got ", size);
  RULE("npu_rotary_mul.r1-size", r1.size(3) == size, op, ": r1 and r2 must end in D = ", size, ", got ", r1.sizes());
  RULE("npu_rotary_mul.r2-shape", r1.sizes() == r2.sizes(), op, ": r1 and r2 must have one shape, got ", r1.sizes(), " and ", r2.sizes());
  RULE("npu_rotary_mul.r2-dtype", r1.scalar_type() == r2.scalar_type(), op, ": r1 and r2 must have one data type, got ", r1.scalar_type(),
       " and ", r2.scalar_type());
  const Broadcast where(op, input.sizes(), r1.sizes());
  STRICT("npu_rotary_mul.size", size < 896, op, ": D must be below 896, got ", size);
  STRICT("npu_rotary_mul.layout", input.numel() == 0 || documented_shape(input.sizes(), r1.sizes(), mode, std::numeric_limits<int64_t>::max()), op,
         ": r1 ", r1.sizes(), " beside input ", input.sizes(), " is none of the documented layouts (",
         mode == Mode::half ? "11SD, B1SD; 1S1D, BS1D; S11D, SB1D; or full" : "11SD; 1S1D; S11D", ")");
  STRICT("npu_rotary_mul.heads", input.numel() == 0 || documented_shape(input.sizes(), r1.sizes(), mode, 999), op, ": ",
         mode == Mode::half ? "B and N must each be" : "B * N must be", " below 1000, got input ", input.sizes(), " and r1 ", r1.sizes());
  at::Tensor out = at::empty(input.sizes(), input.options());
  if (rotate_matrix && rotate_matrix->defined()) {
    RULE("npu_rotary_mul.rotate-shape", rotate_matrix->dim() == 2 && rotate_matrix->size(0) == size && rotate_matrix->size(1) == size, op,
         ": rotate must be [D, D], got ", rotate_matrix->sizes());
    const at::Tensor x = floats(input), turned = at::matmul(x, floats(*rotate_matrix));
    cpu_alias(out).copy_(x * floats(r1) + turned * floats(r2));
    return out;
  }
  rotate_all(op, dense(input), dense(r1), dense(r2), out, where, mode);
  return out;
}

// Rotate `x` in place.
void rotate_in_place(const char* op, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, Mode mode) {
  std::vector<int64_t> four = x.sizes().vec(), angles = cos.sizes().vec();
  if (four.size() == 3) four.insert(four.begin(), 1), angles.insert(angles.begin(), 1);
  const Broadcast where(op, four, angles);
  const at::Tensor from = dense(x);
  rotate_all(op, from, cos, sin, from, where, mode);
  if (!x.is_contiguous()) {
    at::AutoDispatchBelowADInplaceOrView below;
    cpu_alias(x).copy_(from);
  }
}

// torch_npu/_op_plugin_docs.py: npu_apply_rotary_pos_emb. It updates query and key in place and returns them.
std::tuple<at::Tensor, at::Tensor> apply_rotary_pos_emb(const at::Tensor& query, const at::Tensor& key, const at::Tensor& cos,
                                                        const at::Tensor& sin, c10::string_view layout, c10::string_view rotary_mode) {
  static Tally& mine = tally("npu::npu_apply_rotary_pos_emb");
  const char* op = "npu_apply_rotary_pos_emb";
  count_call(mine);
  RULE("npu_apply_rotary_pos_emb.layout", layout == "BSND" || layout == "SBND" || layout == "BNSD" || layout == "TND", op,
       ": layout must be BSND or TND, got ", layout);
  STRICT("npu_apply_rotary_pos_emb.layout", layout == "BSND" || layout == "TND", op, ": layout must be BSND or TND, got ", layout);
  STRICT("npu_apply_rotary_pos_emb.mode", rotary_mode == "half", op, ": rotary_mode must be 'half', got '", rotary_mode, "'");
  const Mode mode = mode_of(op, rotary_mode);
  const int64_t dims = layout == "TND" ? 3 : 4, heads = layout == "BNSD" ? 1 : dims - 2;
  for (auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"cos", &cos}, {"sin", &sin}}) {
    on_device(op, name, *t);
    RULE("npu_apply_rotary_pos_emb.rank", t->dim() == dims, op, ": ", name, " must have ", dims, " dimensions with layout ", layout, ", got ",
         t->sizes());
    RULE("npu_apply_rotary_pos_emb.one-size", t->size(-1) == query.size(-1), op, ": the last dimension of ", name, " must be D = ",
         query.size(-1), ", got ", t->size(-1));
    STRICT("npu_apply_rotary_pos_emb.one-dtype", t->scalar_type() == query.scalar_type(), op,
           ": query, key, cos and sin must have one data type, got ", query.scalar_type(), " and ", name, " ", t->scalar_type());
    STRICT("npu_apply_rotary_pos_emb.not-empty", t->numel() > 0, op, ": ", name, " must not be empty");
    for (int64_t i = 0; i + 1 < dims; ++i)
      RULE("npu_apply_rotary_pos_emb.tokens", i == heads || t->size(i) == query.size(i) || (layout != "BSND" && layout != "TND" && t->size(i) == 1),
           op, ": dimension ", i, " of ", name, " must equal query's ", query.size(i), ", got ", t->size(i));
  }
  RULE("npu_apply_rotary_pos_emb.angle-heads", cos.size(heads) == 1 && sin.size(heads) == 1, op, ": cos and sin must have 1 head, got ",
       cos.sizes(), " and ", sin.sizes());
  TORCH_CHECK(query.size(-1) % 2 == 0, op, ": D must be even, got ", query.size(-1));
  STRICT("npu_apply_rotary_pos_emb.size", query.size(-1) == 64 || query.size(-1) == 128, op, ": D must be 64 or 128, got ", query.size(-1));
  TORCH_CHECK(cos.scalar_type() == sin.scalar_type(), op, ": cos and sin must have one data type");
  const at::Tensor c = dense(cos), s = dense(sin);
  rotate_in_place(op, query, c, s, mode);
  rotate_in_place(op, key, c, s, mode);
  return {query, key};
}

// aclnnInterleaveRope (not in _op_plugin_docs.py; DeepSeek): x's even then odd numbers, then the "half" rotation. x [B, N, S, D], cos and sin
// [B, 1 or N, 1 or S, D].
at::Tensor interleave_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  static Tally& mine = tally("npu::npu_interleave_rope");
  const char* op = "npu_interleave_rope";
  count_call(mine);
  for (auto& [name, t] : {std::pair{"x", &x}, {"cos", &cos}, {"sin", &sin}}) {
    on_device(op, name, *t);
    TORCH_CHECK(t->dim() == 4, op, ": ", name, " must have 4 dimensions, got ", t->sizes());
    STRICT("npu_interleave_rope.dtype", t->scalar_type() == x.scalar_type() && (x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16),
           op, ": ", name, " must be float16 or bfloat16, one for all, got ", t->scalar_type());
  }
  const int64_t size = x.size(3), half = size / 2;
  TORCH_CHECK(size % 2 == 0 && cos.size(3) == size && cos.sizes() == sin.sizes(), op, ": cos and sin must end in the even D = ", size, ", got ",
              cos.sizes(), " and ", sin.sizes());
  STRICT("npu_interleave_rope.size", size == 64, op, ": D must be 64, got ", size);
  const Broadcast where(op, x.sizes(), cos.sizes());
  const at::Tensor from = dense(x), c = floats(cos), s = floats(sin);
  at::Tensor out = at::empty(x.sizes(), x.options());
  by_type(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(where.rows(), 6 * size, [&](int64_t begin, int64_t end) {
      std::vector<float> sorted(size), scratch(size), turned(size);
      for (int64_t r = begin; r < end; ++r) {
        const T* in = static_cast<const T*>(from.const_data_ptr()) + r * size;
        for (int64_t i = 0; i < half; ++i) sorted[i] = static_cast<float>(in[2 * i]), sorted[half + i] = static_cast<float>(in[2 * i + 1]);
        rotate(sorted.data(), c.const_data_ptr<float>() + where(r), s.const_data_ptr<float>() + where(r), turned.data(), scratch.data(), size,
               Mode::half);
        std::copy(turned.begin(), turned.end(), static_cast<T*>(out.data_ptr()) + r * size);
      }
    });
  });
  return out;
}

struct Sections {
  std::vector<int64_t> sizes;  // of rotary_dim / 2; empty: one position per token
  bool interleaved = false;
  // Which of the three positions (time, height, width) turns frequency i.
  int64_t of(int64_t i) const {
    if (sizes.empty()) return 0;
    if (interleaved) return i % 3 && i < 3 * sizes[i % 3] ? i % 3 : 0;
    return i < sizes[0] ? 0 : i < sizes[0] + sizes[1] ? 1 : 2;
  }
};

Sections sections_of(const char* op, at::OptionalIntArrayRef given, std::optional<c10::string_view> cache_mode, int64_t half) {
  Sections sections;
  TORCH_CHECK(!cache_mode || *cache_mode == "default" || *cache_mode == "interleave", op,
              ": cache_mode must be 'default' or 'interleave', got '", *cache_mode, "'");
  sections.interleaved = cache_mode && *cache_mode == "interleave";
  if (!given || std::all_of(given->begin(), given->end(), [](int64_t size) { return size == 0; })) return sections;
  sections.sizes = given->vec();
  RULE("npu_mrope.sections", sections.sizes.size() == 3 && sections.sizes[0] + sections.sizes[1] + sections.sizes[2] == half, op,
       ": the 3 numbers of mrope_section must add up to rotary_dim / 2 = ", half, ", got ", *given);
  return sections;
}

// torch_npu/_op_plugin_docs.py: npu_mrope
std::tuple<at::Tensor, at::Tensor> mrope(const at::Tensor& positions, const at::Tensor& query, const at::Tensor& key,
                                         const at::Tensor& cos_sin_cache, int64_t head_size, at::OptionalIntArrayRef mrope_section,
                                         std::optional<c10::string_view> rotary_mode, std::optional<c10::string_view> cache_mode) {
  static Tally& mine = tally("npu::npu_mrope");
  const char* op = "npu_mrope";
  count_call(mine);
  for (auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"cos_sin_cache", &cos_sin_cache}}) {
    on_device(op, name, *t);
    RULE("npu_mrope.rank", t->dim() == 2, op, ": ", name, " must have 2 dimensions, got ", t->sizes());
  }
  on_device(op, "positions", positions);
  RULE("npu_mrope.positions-dtype", positions.scalar_type() == at::kInt || positions.scalar_type() == at::kLong, op,
       ": positions must be int32 or int64, got ", positions.scalar_type());
  TORCH_CHECK(head_size > 0, op, ": head_size must be positive, got ", head_size);
  const int64_t rotary = cos_sin_cache.size(1), half = rotary / 2, tokens = query.size(0), align = query.scalar_type() == at::kFloat ? 16 : 32;
  const Mode mode = mode_of(op, rotary_mode.value_or("half"));
  const Sections sections = sections_of(op, mrope_section, cache_mode, half);
  const bool three = !sections.sizes.empty();
  RULE("npu_mrope.positions-shape", positions.dim() == (three ? 2 : 1) && positions.size(-1) == tokens && (!three || positions.size(0) == 3), op,
       ": positions must be ", three ? "[3, tokens]" : "[tokens]", ", got ", positions.sizes());
  TORCH_CHECK(rotary % 2 == 0 && rotary <= head_size && query.size(1) % head_size == 0 && key.size(1) % head_size == 0 && key.size(0) == tokens,
              op, ": query and key must be [tokens, heads * head_size] with head_size >= rotary_dim ", rotary, ", got ", query.sizes(), ", ",
              key.sizes(), " and head_size ", head_size);
  STRICT("npu_mrope.rotary-size", rotary % align == 0, op, ": rotary_dim must be a multiple of ", align, ", got ", rotary);
  at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor where = cpu_alias(positions).to(at::kLong).contiguous(), table = floats(cos_sin_cache);
  at::Tensor angles = at::empty({2, tokens, rotary}, table.options());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < half; ++i) {
      const int64_t position = where.const_data_ptr<int64_t>()[sections.of(i) * tokens + t];
      RULE("npu_mrope.positions", position >= 0 && position < cos_sin_cache.size(0), op, ": positions must lie in [0, ",
           cos_sin_cache.size(0) - 1, "], got ", position);
      const int64_t first = mode == Mode::half ? i : 2 * i, second = mode == Mode::half ? half + i : 2 * i + 1;
      for (int64_t part = 0; part < 2; ++part) {
        float* row = angles.data_ptr<float>() + (part * tokens + t) * rotary;
        row[first] = row[second] = table.const_data_ptr<float>()[position * rotary + part * half + i];
      }
    }
  auto turn = [&](const at::Tensor& given) {
    at::Tensor out = to_npu(dense(given), given.device());
    const int64_t heads = given.size(1) / head_size;
    by_type(op, given.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      std::vector<float> scratch(rotary);
      for (int64_t r = 0; r < tokens * heads; ++r) {
        T* x = static_cast<T*>(out.data_ptr()) + r * head_size;
        const float* cos = angles.const_data_ptr<float>() + r / heads * rotary;
        rotate(x, cos, cos + tokens * rotary, x, scratch.data(), rotary, mode);
      }
    });
    return out;
  };
  return {turn(query), turn(key)};
}

}  // namespace

void install_rotary(torch::Library& npu) {
  npu.impl("npu_rotary_mul", TORCH_FN(rotary_mul));
  npu.impl("npu_apply_rotary_pos_emb", TORCH_FN(apply_rotary_pos_emb));
  npu.impl("npu_interleave_rope", TORCH_FN(interleave_rope));
  npu.impl("npu_mrope", TORCH_FN(mrope));
}

}  // namespace ascend_sim
