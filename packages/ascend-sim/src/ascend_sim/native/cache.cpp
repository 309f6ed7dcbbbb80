// SPDX-License-Identifier: Apache-2.0
//
// Reading and writing a paged key/value cache.
#include "kernels.h"

namespace ascend_sim {
namespace {

using Optional = std::optional<at::Tensor>;

bool given(const Optional& t) { return t && t->defined(); }

at::Tensor longs(const at::Tensor& t) {
  at::AutoDispatchBelowADInplaceOrView below;
  return cpu_alias(t).to(at::kLong).contiguous();
}

void check_unique(const char* op, const int64_t* slots, int64_t count) {
  std::vector<int64_t> sorted(slots, slots + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  STRICT(".slot-unique", twice == sorted.end(), op, ": slot_mapping must not hold a slot twice, got ", *twice);
}

// One of key and value: rows [T, N, D] into [blocks, block_size, N, D] ("Norm") or [blocks, N * D / last, block_size, last] ("PA_NZ").
void scatter(const char* which, const at::Tensor& rows, const at::Tensor& cache, const at::Tensor& slots, bool nz) {
  const char* op = "npu_scatter_pa_kv_cache";
  RULE(".rank", rows.dim() == 3, op, ": ", which, " must be [tokens, heads, size] (the compressed 4-dimensional case is not simulated), got ",
              rows.sizes());
  RULE(".cache-rank", cache.dim() == 4, op, ": ", which, "_cache must have 4 dimensions, got ", cache.sizes());
  RULE(".cache-dtype", rows.scalar_type() == cache.scalar_type(), op, ": ", which, " and ", which, "_cache must have one data type, got ",
              rows.scalar_type(), " and ", cache.scalar_type());
  RULE(".slots", slots.numel() == rows.size(0), op, ": slot_mapping must hold one slot per token, got ", slots.numel(), " slots and ", rows.size(0),
              " tokens");
  const int64_t width = rows.size(1) * rows.size(2);
  TORCH_CHECK(!nz || cache.size(1) * cache.size(3) == width, op, ": PA_NZ cache must be [blocks, heads * size / last, block_size, last], got ",
              cache.sizes());
  RULE(".cache-shape", nz || cache.sizes().slice(2) == rows.sizes().slice(1), op, ": ", which, "_cache must be [blocks, block_size, heads, size] of ",
              which, " ", rows.sizes(), ", got ", cache.sizes());
  STRICT(".contiguous", rows.is_contiguous(), op, ": ", which, " must be contiguous");
  RULE(".cache-contiguous", cache.is_contiguous(), op, ": ", which, "_cache must be contiguous");
  const int64_t block = nz ? cache.size(2) : cache.size(1), limit = cache.size(0) * block, item = cache.element_size();
  const int64_t pieces = nz ? cache.size(1) : 1, piece = (nz ? cache.size(3) : width) * item;
  const at::Tensor source = dense(rows);
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(cache.data_ptr());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < slots.numel(); ++t) {
    RULE(".slot-most", slot[t] < limit, op, ": slot_mapping must lie below num_blocks * block_size = ", limit, ", got ", slot[t], " for token ", t);
    STRICT(".slot-least", slot[t] >= 0, op, ": slot_mapping must not be negative, got ", slot[t], " for token ", t);
  }
  if (strict()) check_unique(op, slot, slots.numel());
  for (int64_t t = 0; t < slots.numel(); ++t) {
    if (slot[t] < 0) continue;
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t row = nz ? (slot[t] / block * pieces + p) * block + slot[t] % block : slot[t];
      std::memcpy(to + row * piece, from + (t * pieces + p) * piece, piece);
    }
  }
}

// torch_npu/_op_plugin_docs.py: npu_scatter_pa_kv_cache, scenarios 1 (PA_NZ) and 2 (Norm). Relaxed mode skips negative slots, as a kernel source does.
void scatter_pa_kv_cache(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_cache, at::Tensor& value_cache,
                         const at::Tensor& slot_mapping, const Optional& compress_lens, const Optional& compress_seq_offsets,
                         const Optional& seq_lens, std::optional<c10::string_view> cache_mode) {
  static Tally& mine = tally("npu::npu_scatter_pa_kv_cache");
  const char* op = "npu_scatter_pa_kv_cache";
  count_call(mine);
  for (auto& [name, t] : {std::pair{"key", &key}, {"value", &value}, {"slot_mapping", &slot_mapping}}) on_device(op, name, *t);
  on_device(op, "key_cache", key_cache);
  on_device(op, "value_cache", value_cache);
  for (auto& [name, t] : {std::pair{"compress_lens", &compress_lens}, {"compress_seq_offsets", &compress_seq_offsets}, {"seq_lens", &seq_lens}})
    TORCH_CHECK(!given(*t), op, ": ", name, " (compressed cache) is not simulated");
  const bool nz = cache_mode && *cache_mode == "PA_NZ";
  RULE(".cache-mode", nz || !cache_mode || *cache_mode == "Norm", op, ": cache_mode must be 'Norm' or 'PA_NZ', got '", *cache_mode, "'");
  RULE(".slot-dtype", slot_mapping.scalar_type() == at::kInt || slot_mapping.scalar_type() == at::kLong, op,
       ": slot_mapping must be int32 or int64, got ", slot_mapping.scalar_type());
  RULE(".slot-rank", slot_mapping.dim() == 1, op, ": slot_mapping must have 1 dimension, got ", slot_mapping.sizes());
  STRICT(".slot-contiguous", slot_mapping.is_contiguous(), op, ": slot_mapping must be contiguous");
  RULE(".leading-sizes", key.dim() == value.dim() &&
       key.sizes().slice(0, std::min<size_t>(2, key.dim())) == value.sizes().slice(0, std::min<size_t>(2, value.dim())),
       op, ": key and value must agree in their first two dimensions, got ", key.sizes(), " and ", value.sizes());
  STRICT(".one-dtype", key.scalar_type() == value.scalar_type(), op, ": key and value must have one data type, got ", key.scalar_type(), " and ",
         value.scalar_type());
  const at::Tensor slots = longs(slot_mapping);
  scatter("key", key, key_cache, slots, nz);
  scatter("value", value, value_cache, slots, nz);
}

struct Gather {
  std::vector<int64_t> first, lengths;  // of each sequence, in tokens
  at::Tensor tables;
};

void gather(const char* which, const at::Tensor& cache, const at::Tensor& out, const Gather& plan) {
  const char* op = "npu_gather_pa_kv_cache";
  TORCH_CHECK(cache.dim() == 4 && out.dim() == 3 && cache.sizes().slice(2) == out.sizes().slice(1), op, ": ", which,
              "_cache must be [blocks, block_size, heads, size] and ", which, " [tokens, heads, size], got ", cache.sizes(), " and ",
              out.sizes());
  RULE(".one-dtype", cache.scalar_type() == out.scalar_type(), op, ": ", which, " and ", which, "_cache must have one data type");
  RULE(".contiguous", cache.is_contiguous() && out.is_contiguous(), op, ": ", which, " and ", which, "_cache must be contiguous");
  const int64_t block = cache.size(1), row = out.size(1) * out.size(2) * out.element_size(), columns = plan.tables.size(1);
  const char* from = static_cast<const char*>(cache.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t* table = plan.tables.const_data_ptr<int64_t>();
  int64_t written = 0;
  for (size_t b = 0; b < plan.lengths.size(); ++b)
    for (int64_t t = 0; t < plan.lengths[b]; ++t, ++written) {
      const int64_t at = plan.first[b] + t, column = at / block;
      TORCH_CHECK(column < columns, op, ": block_tables has ", columns, " blocks a sequence, too few for token ", at, " of sequence ", b);
      const int64_t id = table[b * columns + column];
      TORCH_CHECK(id >= 0 && id < cache.size(0), op, ": block_tables must lie in [0, ", cache.size(0) - 1, "], got ", id);
      TORCH_CHECK(written < out.size(0), op, ": ", which, " has ", out.size(0), " rows, fewer than the sequences' tokens");
      std::memcpy(to + written * row, from + (id * block + at % block) * row, row);
    }
}

// aclnnGatherPaKvCache, "Norm" format (not in _op_plugin_docs.py): the sequences' tokens, one after the other, into key and value, in place.
// seq_lens: lengths, or with is_seq_lens_cumsum B + 1 prefix sums; seq_offset: the first token of each sequence.
void gather_pa_kv_cache(const at::Tensor& key_cache, const at::Tensor& value_cache, const at::Tensor& block_tables, const at::Tensor& seq_lens,
                        at::Tensor& key, at::Tensor& value, const Optional& seq_offset, bool is_seq_lens_cumsum) {
  static Tally& mine = tally("npu::npu_gather_pa_kv_cache");
  const char* op = "npu_gather_pa_kv_cache";
  count_call(mine);
  for (auto& [name, t] :
       {std::pair{"key_cache", &key_cache}, {"value_cache", &value_cache}, {"block_tables", &block_tables}, {"seq_lens", &seq_lens}})
    on_device(op, name, *t);
  on_device(op, "key", key);
  on_device(op, "value", value);
  RULE(".block-table-rank", block_tables.dim() == 2, op, ": block_tables must be [sequences, blocks], got ", block_tables.sizes());
  STRICT(".block-table-dtype", block_tables.scalar_type() == at::kInt || block_tables.scalar_type() == at::kLong, op, ": block_tables must be int32 or int64, got ",
         block_tables.scalar_type());
  const int64_t batch = block_tables.size(0);
  TORCH_CHECK(seq_lens.dim() == 1 && seq_lens.numel() == batch + is_seq_lens_cumsum, op, ": seq_lens must hold ", batch + is_seq_lens_cumsum,
              " numbers, got ", seq_lens.sizes());
  Gather plan;
  plan.tables = longs(block_tables);
  const at::Tensor lengths = longs(seq_lens), offsets = given(seq_offset) ? longs(*seq_offset) : at::Tensor();
  TORCH_CHECK(!offsets.defined() || offsets.numel() == batch, op, ": seq_offset must hold one number per sequence, got ", offsets.numel());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* values = lengths.const_data_ptr<int64_t>();
    plan.lengths.push_back(is_seq_lens_cumsum ? values[b + 1] - values[b] : values[b]);
    plan.first.push_back(offsets.defined() ? offsets.const_data_ptr<int64_t>()[b] : 0);
    TORCH_CHECK(plan.lengths[b] >= 0 && plan.first[b] >= 0, op, ": negative length or offset of sequence ", b);
    STRICT(".offset", plan.first[b] % key_cache.size(1) == 0, op, ": seq_offset must be a multiple of block_size ", key_cache.size(1), ", got ",
           plan.first[b]);
  }
  gather("key", key_cache, key, plan);
  gather("value", value_cache, value, plan);
}

}  // namespace

void install_cache(torch::Library& npu) {
  npu.impl("npu_scatter_pa_kv_cache", TORCH_FN(scatter_pa_kv_cache));
  npu.impl("npu_gather_pa_kv_cache", TORCH_FN(gather_pa_kv_cache));
}

}  // namespace ascend_sim
