// SPDX-License-Identifier: Apache-2.0
//
// Multi-head latent attention, beside the attention kernel itself: filling the latent cache, and merging partial attentions.
#include "moe.h"

namespace ascend_sim {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

// Where token `t` (of batch entry b, place s) goes in a cache of rows: a row number, or -1 for none.
struct Slots {
  bool norm, blocks;  // cache_mode Norm; PA_BLK_*: one index for a block of tokens
  int64_t sequence, cache_length, block;
  const int64_t* index;
  int64_t of(int64_t b, int64_t s) const {
    if (norm) {
      const int64_t offset = index[b * sequence + s];
      return offset < 0 ? -1 : b * cache_length + offset;
    }
    if (!blocks) return index[b * sequence + s];
    const int64_t first = index[b * ((sequence + block - 1) / block) + s / block];
    return first < 0 ? -1 : first + s % block;
  }
};

// Write `size` numbers as row `slot` of a cache: in a row, or (NZ) in pieces of 16, piece by piece of each block.
template <class T>
void store(T* cache, const T* row, int64_t slot, int64_t size, int64_t block, bool nz) {
  constexpr int64_t piece = 16;
  if (!nz) return void(std::copy(row, row + size, cache + slot * size));
  T* to = cache + slot / block * block * size + slot % block * piece;
  for (int64_t i = 0; i < size; i += piece, to += block * piece) std::copy(row + i, row + i + piece, to);
}

void check_latent(const char* op, const at::Tensor& kv, const at::Tensor& gamma, const at::Tensor& cos, const at::Tensor& sin,
                  const at::Tensor& k_cache, const at::Tensor& ckv_cache) {
  for (auto& [name, t] : {std::pair{"kv", &kv}, {"gamma", &gamma}, {"cos", &cos}, {"sin", &sin}, {"k_cache", &k_cache}, {"ckv_cache", &ckv_cache}}) {
    on_device(op, name, *t);
    TORCH_CHECK(is_float(t->scalar_type()), op, ": ", name, " must be float16 or bfloat16 (int8 caches are not simulated), got ", t->scalar_type());
    STRICT(".dtype", t->scalar_type() != at::kFloat, op, ": ", name, " must be float16 or bfloat16, got ", t->scalar_type());
  }
  TORCH_CHECK(kv.dim() == 4 && kv.size(1) == 1 && gamma.dim() == 1, op, ": kv must be [batch, 1, sequence, size] and gamma [rms_size], got ",
              kv.sizes(), " and ", gamma.sizes());
  const int64_t rope = kv.size(3) - gamma.size(0);
  TORCH_CHECK(rope > 0 && rope % 2 == 0, op, ": kv must be rms_size + an even rope_size wide, got ", kv.size(3), " and gamma ", gamma.sizes());
  STRICT(".sizes", gamma.size(0) == 512 && rope == 64, op, ": rms_size must be 512 and rope_size 64, got ", gamma.size(0), " and ", rope);
  const std::vector<int64_t> angles = {kv.size(0), 1, kv.size(2), rope};
  TORCH_CHECK(cos.sizes() == at::IntArrayRef(angles) && sin.sizes() == cos.sizes(), op, ": cos and sin must be ", angles, ", got ", cos.sizes(),
              " and ", sin.sizes());
  for (auto& [name, t, size] : {std::tuple{"k_cache", &k_cache, rope}, {"ckv_cache", &ckv_cache, gamma.size(0)}}) {
    TORCH_CHECK(t->dim() == 4 && t->size(3) == size && t->is_contiguous() && t->scalar_type() == kv.scalar_type(), op, ": ", name,
                " must be contiguous, of kv's data type, with 4 dimensions, the last ", size, ", got ", t->scalar_type(), " ", t->sizes());
  }
  TORCH_CHECK(k_cache.sizes().slice(0, 3) == ckv_cache.sizes().slice(0, 3), op, ": k_cache and ckv_cache must hold the same tokens, got ",
              k_cache.sizes(), " and ", ckv_cache.sizes());
}

Slots slots_of(const char* op, c10::string_view mode, const at::Tensor& kv, const at::Tensor& k_cache, const at::Tensor& index) {
  const bool norm = mode == "Norm", blocks = mode == "PA_BLK_BNSD" || mode == "PA_BLK_NZ";
  TORCH_CHECK(norm || blocks || mode == "PA" || mode == "PA_BNSD" || mode == "PA_NZ", op,
              ": cache_mode must be 'Norm', 'PA', 'PA_BNSD', 'PA_NZ', 'PA_BLK_BNSD' or 'PA_BLK_NZ', got '", mode, "'");
  TORCH_CHECK(index.scalar_type() == at::kLong, op, ": index must be int64, got ", index.scalar_type());
  Slots slots{norm, blocks, kv.size(2), k_cache.size(2), k_cache.size(1), index.const_data_ptr<int64_t>()};
  TORCH_CHECK(norm ? k_cache.size(0) == kv.size(0) && k_cache.size(1) == 1 : k_cache.size(2) == 1, op, ": k_cache must be ",
              norm ? "[batch, 1, cache_length, rope_size]" : "[blocks, block_size, 1, rope_size]", ", got ", k_cache.sizes());
  const int64_t wanted = kv.size(0) * (blocks ? (kv.size(2) + slots.block - 1) / slots.block : kv.size(2));
  TORCH_CHECK(index.numel() == wanted, op, ": index must hold ", wanted, " numbers with cache_mode ", mode, ", got ", index.numel());
  const int64_t limit = norm ? slots.cache_length : k_cache.size(0) * slots.block;
  for (int64_t i = 0; i < wanted; ++i)
    TORCH_CHECK(slots.index[i] < limit, op, ": index must lie below ", limit, ", got ", slots.index[i]);
  return slots;
}

// y = rms_norm(x) * gamma, then k = the rotation of the rest: its even, then its odd numbers, turned by halves (as npu_interleave_rope).
void latent_row(const float* x, const float* gamma, const float* cos, const float* sin, int64_t size, int64_t rope, float epsilon, float* y, float* k) {
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
  const float rstd = 1.0f / std::sqrt(sum / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < size; ++i) y[i] = x[i] * rstd * gamma[i];
  for (int64_t i = 0, half = rope / 2; i < half; ++i) {
    const float even = x[size + 2 * i], odd = x[size + 2 * i + 1];
    k[i] = even * cos[i] - odd * sin[i];
    k[half + i] = odd * cos[half + i] + even * sin[half + i];
  }
}

// torch_npu's documentation of npu_kv_rmsnorm_rope_cache (not in _op_plugin_docs.py): kv is [rms part, rope part]; ckv_cache takes the norm of the
// first, k_cache the rotation of the second, both in place. A negative index is skipped: vLLM pads with -1.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kv_rmsnorm_rope_cache(
    const at::Tensor& kv, const at::Tensor& gamma, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& index, const at::Tensor& k_cache,
    const at::Tensor& ckv_cache, const MaybeTensor& k_rope_scale, const MaybeTensor& c_kv_scale, const MaybeTensor& k_rope_offset,
    const MaybeTensor& c_kv_offset, const MaybeTensor& v, double epsilon, c10::string_view cache_mode, bool is_output_kv) {
  static Tally& mine = tally("npu::npu_kv_rmsnorm_rope_cache");
  const char* op = "npu_kv_rmsnorm_rope_cache";
  count_call(mine);
  TORCH_CHECK(!k_rope_scale && !c_kv_scale && !k_rope_offset && !c_kv_offset && !v, op, ": quantised caches and v are not simulated");
  check_latent(op, kv, gamma, cos, sin, k_cache, ckv_cache);
  on_device(op, "index", index);
  const at::Tensor places = dense(index);
  const Slots slots = slots_of(op, cache_mode, kv, k_cache, places);
  const bool nz = cache_mode == "PA_NZ" || cache_mode == "PA_BLK_NZ";
  const int64_t batch = kv.size(0), sequence = kv.size(2), size = gamma.size(0), rope = kv.size(3) - size, limit = k_cache.numel() / rope;
  const at::Tensor x = floats(kv), g = floats(gamma), c = floats(cos), s = floats(sin);
  at::Tensor k_out = zeros({batch, 1, sequence, rope}, kv.options()), y_out = zeros({batch, 1, sequence, size}, kv.options());
  by_type(op, kv.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    std::vector<float> y(size), k(rope);
    std::vector<T> y_row(size), k_row(rope);
    for (int64_t t = 0; t < batch * sequence; ++t) {
      latent_row(x.const_data_ptr<float>() + t * (size + rope), g.const_data_ptr<float>(), c.const_data_ptr<float>() + t * rope,
                 s.const_data_ptr<float>() + t * rope, size, rope, static_cast<float>(epsilon), y.data(), k.data());
      std::copy(y.begin(), y.end(), y_row.begin());
      std::copy(k.begin(), k.end(), k_row.begin());
      if (is_output_kv) {
        std::copy(y_row.begin(), y_row.end(), static_cast<T*>(y_out.data_ptr()) + t * size);
        std::copy(k_row.begin(), k_row.end(), static_cast<T*>(k_out.data_ptr()) + t * rope);
      }
      const int64_t slot = slots.of(t / sequence, t % sequence);
      if (slot < 0) continue;
      TORCH_CHECK(slot < limit, op, ": index names row ", slot, " of a cache of ", limit);
      store(static_cast<T*>(k_cache.data_ptr()), k_row.data(), slot, rope, slots.block, nz);
      store(static_cast<T*>(ckv_cache.data_ptr()), y_row.data(), slot, size, slots.block, nz);
    }
  });
  return {k_cache, ckv_cache, k_out, y_out};
}

// torch_npu/_op_plugin_docs.py: npu_attention_update: out = sum of out_i * exp(lse_i - lse), lse = log(sum(exp(lse_i))). A part that saw nothing has
// lse +inf, as npu_fused_infer_attention_score writes it, and takes no part.
std::tuple<at::Tensor, at::Tensor> attention_update(at::TensorList lse, at::TensorList local_out, int64_t update_type) {
  static Tally& mine = tally("npu::npu_attention_update");
  const char* op = "npu_attention_update";
  constexpr float infinity = std::numeric_limits<float>::infinity();
  count_call(mine);
  TORCH_CHECK(!lse.empty() && lse.size() == local_out.size(), op, ": lse and local_out must be lists of one length, got ", lse.size(), " and ",
              local_out.size());
  RULE(".update-type", update_type == 0 || update_type == 1, op, ": update_type must be 0 or 1, got ", update_type);
  STRICT(".parts", lse.size() <= 16, op, ": lse and local_out must hold at most 16 tensors, got ", lse.size());
  const size_t parts = lse.size();
  std::vector<at::Tensor> weights, rows;
  for (size_t i = 0; i < parts; ++i) {
    on_device(op, "lse", lse[i]);
    on_device(op, "local_out", local_out[i]);
    TORCH_CHECK(lse[i].dim() == 1 && lse[i].scalar_type() == at::kFloat && lse[i].sizes() == lse[0].sizes(), op,
                ": lse must be float32 with 1 dimension, all of one shape, got ", lse[i].scalar_type(), " ", lse[i].sizes());
    TORCH_CHECK(local_out[i].dim() == 2 && local_out[i].size(0) == lse[0].size(0) && local_out[i].sizes() == local_out[0].sizes() &&
                    local_out[i].scalar_type() == local_out[0].scalar_type(),
                op, ": local_out must be [", lse[0].size(0), ", size], all of one shape and data type, got ", local_out[i].sizes());
    STRICT(".contiguous", lse[i].is_contiguous() && local_out[i].is_contiguous(), op, ": lse and local_out must be contiguous");
    weights.push_back(dense(lse[i]));
    rows.push_back(dense(local_out[i]));
  }
  const int64_t count = lse[0].size(0), size = local_out[0].size(1);
  STRICT(".head-size", size % 8 == 0 && size >= 8 && size <= 512, op, ": the head size must be a multiple of 8 in [8, 512], got ", size);
  at::Tensor out = at::empty(local_out[0].sizes(), local_out[0].options()), merged = zeros({count}, lse[0].options());
  by_type(op, out.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(count, 4 * static_cast<int64_t>(parts) * size, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(size);
      for (int64_t r = begin; r < end; ++r) {
        float most = -infinity, total = 0;
        auto of = [&](size_t i) { return static_cast<const float*>(weights[i].const_data_ptr())[r]; };
        for (size_t i = 0; i < parts; ++i)
          if (of(i) != infinity) most = std::max(most, of(i));
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (size_t i = 0; i < parts; ++i) {
          if (of(i) == infinity || most == -infinity) continue;
          const float weight = std::exp(of(i) - most);
          const T* row = static_cast<const T*>(rows[i].const_data_ptr()) + r * size;
          total += weight;
          for (int64_t d = 0; d < size; ++d) sum[d] += weight * static_cast<float>(row[d]);
        }
        for (int64_t d = 0; d < size; ++d) static_cast<T*>(out.data_ptr())[r * size + d] = static_cast<T>(total > 0 ? sum[d] / total : 0.0f);
        if (update_type == 1) static_cast<float*>(merged.data_ptr())[r] = total > 0 ? most + std::log(total) : infinity;
      }
    });
  });
  return {out, merged};
}

}  // namespace

void install_latent(torch::Library& npu) {
  npu.impl("npu_kv_rmsnorm_rope_cache", TORCH_FN(kv_rmsnorm_rope_cache));
  npu.impl("npu_attention_update", TORCH_FN(attention_update));
}

}  // namespace ascend_sim
