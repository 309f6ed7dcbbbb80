// SPDX-License-Identifier: Apache-2.0
//
// Layouts, tensors and lengths of an attention call.
#include <set>

#include "attention_arguments.h"

namespace ascend_sim::attention {

Layout layout_of(const Arguments& args) {
  static const std::set<std::string> known = {"BSH",       "BSND",    "BNSD",     "TND",       "NTD",       "BNSD_BSND", "BSH_BNSD",
                                              "BSND_BNSD", "NTD_TND", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND_NTD"};
  static const std::set<std::string> undocumented = {"NTD", "BSH_BNSD", "BSND_BNSD"};
  const std::string& text = args["input_layout"].toStringRef();
  RULE(".layout-name", known.count(text), args.op, ": input_layout '", text,
              "' is not one of BSH, BSND, BNSD, TND, BNSD_BSND, NTD_TND, TND_NTD, BSH_NBSD, BSND_NBSD, BNSD_NBSD");
  STRICT(".layout", !undocumented.count(text), args.op, ": input_layout '", text, "' is not supported on Atlas A2");
  const auto cut = text.find('_');
  Layout layout{text, text.substr(0, cut), cut == std::string::npos ? text : text.substr(cut + 1), false};
  layout.packed = layout.in == "TND" || layout.in == "NTD";
  return layout;
}

Axes axes_of(const std::string& layout, const Sizes& s) {
  const int64_t row = s.size, all = s.heads * s.size;
  if (layout == "BNSD") return {s.tokens * all, row, s.tokens * row};
  if (layout == "NBSD") return {s.tokens * row, row, s.batch * s.tokens * row};
  if (layout == "NTD") return {0, row, s.tokens * row};
  return {s.tokens * all, all, row};  // BSH, BSND, TND
}

std::vector<int64_t> shape_of(const std::string& layout, const Sizes& s) {
  if (layout == "BSH") return {s.batch, s.tokens, s.heads * s.size};
  if (layout == "BSND") return {s.batch, s.tokens, s.heads, s.size};
  if (layout == "BNSD") return {s.batch, s.heads, s.tokens, s.size};
  if (layout == "NBSD") return {s.heads, s.batch, s.tokens, s.size};
  if (layout == "TND") return {s.tokens, s.heads, s.size};
  return {s.heads, s.tokens, s.size};
}

Sizes sizes_of(const Arguments& args, const char* name, const at::Tensor& t, const std::string& layout, int64_t heads) {
  const int64_t dims = layout == "BSND" || layout == "BNSD" ? 4 : 3;
  TORCH_CHECK(t.dim() == dims, args.op, ": ", name, " must have ", dims, " dimensions with layout ", layout, ", got ", t.sizes());
  Sizes s;
  if (layout == "BSH") {
    TORCH_CHECK(t.size(2) % heads == 0, args.op, ": the last dimension of ", name, ", ", t.size(2), ", must be a multiple of its ", heads,
                " heads");
    return {t.size(0), t.size(1), heads, t.size(2) / heads};
  }
  if (layout == "BSND") s = {t.size(0), t.size(1), t.size(2), t.size(3)};
  else if (layout == "BNSD") s = {t.size(0), t.size(2), t.size(1), t.size(3)};
  else if (layout == "TND") s = {1, t.size(0), t.size(1), t.size(2)};
  else s = {1, t.size(1), t.size(0), t.size(2)};
  TORCH_CHECK(s.heads == heads, args.op, ": ", name, " ", t.sizes(), " with layout ", layout, " must have ", heads, " heads, got ", s.heads);
  return s;
}

namespace {

void check_operand(const Arguments& args, const char* name, const at::Tensor& t, at::ScalarType type) {
  TORCH_CHECK(t.defined(), args.op, ": ", name, " is missing");
  TORCH_CHECK(is_float(t.scalar_type()), args.op, ": ", name, " must be float16 or bfloat16 (quantised ones are not simulated), got ",
              t.scalar_type());
  RULE(".one-dtype", t.scalar_type() == type, args.op, ": ", name, " must have the data type of query, ", type, ", got ", t.scalar_type());
  STRICT(".dtype", t.scalar_type() != at::kFloat, args.op, ": ", name, " must be float16 or bfloat16, got ", t.scalar_type());
  STRICT(".contiguous", t.is_contiguous(), args.op, ": ", name, " must be contiguous, got strides ", t.strides(), " of ", t.sizes());
}

Rows query_rows(const Arguments& args, const char* name, const Layout& layout, int64_t heads, Sizes& s, at::ScalarType type) {
  const at::Tensor t = args.tensor(name);
  check_operand(args, name, t, type);
  s = sizes_of(args, name, t, layout.in, heads);
  Rows rows;
  rows.keep = dense(t);
  rows.data = rows.keep.const_data_ptr();
  rows.size = s.size;
  rows.axes = axes_of(layout.in, s);
  return rows;
}

Cache dense_cache(const Arguments& args, const char* name, const Layout& layout, int64_t heads, Sizes& s, at::ScalarType type) {
  const Rows rows = query_rows(args, name, layout, heads, s, type);
  Cache cache;
  cache.keep = rows.keep, cache.data = rows.data, cache.size = rows.size, cache.axes = rows.axes;
  return cache;
}

// [blocks, block_size, heads * size] or [blocks, heads, block_size, size]
Cache paged_cache(const Arguments& args, const char* name, const Layout& layout, int64_t heads, int64_t block, at::ScalarType type) {
  const at::Tensor t = args.tensor(name);
  check_operand(args, name, t, type);
  TORCH_CHECK(
      t.dim() == 3 || t.dim() == 4, args.op, ": paged ", name,
      " must be [blocks, block_size, heads * size] or [blocks, heads, block_size, size] (FRACTAL_NZ with 5 dimensions is not simulated), got ",
      t.sizes());
  const bool flat = t.dim() == 3;
  STRICT(".paged-layout", flat || layout.in == "TND" || layout.in == "BNSD", args.op, ": paged ", name,
         " must be [blocks, block_size, heads * size] with layout ", layout.in, ", got ", t.sizes());
  TORCH_CHECK(t.size(flat ? 1 : 2) == block, args.op, ": paged ", name, " ", t.sizes(), " must have block_size ", block);
  TORCH_CHECK(flat ? t.size(2) % heads == 0 : t.size(1) == heads, args.op, ": paged ", name, " ", t.sizes(), " must have ", heads, " heads");
  STRICT(".paged-width", !flat || t.size(2) <= 65535, args.op, ": heads * size of paged ", name, " must not exceed 65535, got ", t.size(2));
  Cache cache;
  cache.keep = dense(t);
  cache.data = cache.keep.const_data_ptr();
  cache.size = flat ? t.size(2) / heads : t.size(3);
  cache.axes = flat ? Axes{0, heads * cache.size, cache.size} : Axes{0, cache.size, block * cache.size};
  cache.block = block;
  cache.block_stride = block * heads * cache.size;
  return cache;
}

}  // namespace

void read_operands(const Arguments& args, Call& call, const Layout& layout, Sizes& query, Sizes& kv, bool paged) {
  call.query = query_rows(args, "query", layout, call.heads, query, call.type);
  const int64_t block = args.integer("block_size");
  TORCH_CHECK(!paged || block > 0, args.op, ": block_size must be positive with a block_table, got ", block);
  auto read = [&](const char* name, Sizes& s) {
    return paged ? paged_cache(args, name, layout, call.kv_heads, block, call.type)
                 : dense_cache(args, name, layout, call.kv_heads, s, call.type);
  };
  Sizes value, rope;
  call.key = read("key", kv);
  call.value = read("value", value);
  TORCH_CHECK(call.key.size == call.query.size, args.op, ": query and key must have one head size, got ", call.query.size, " and ",
              call.key.size);
  TORCH_CHECK(paged ? call.key.keep.size(0) == call.value.keep.size(0) : kv.batch == value.batch && kv.tokens == value.tokens, args.op,
              ": key and value must have the same tokens, got ", call.key.keep.sizes(), " and ", call.value.keep.sizes());
  RULE(".rope-pair", args["query_rope"].isNone() == args["key_rope"].isNone(), args.op, ": query_rope and key_rope must be given together");
  if (args["query_rope"].isNone()) return;
  call.query_rope = query_rows(args, "query_rope", layout, call.heads, rope, call.type);
  TORCH_CHECK(rope.batch == query.batch && rope.tokens == query.tokens, args.op, ": query_rope must have query's tokens, got ",
              call.query_rope.keep.sizes(), " and ", call.query.keep.sizes());
  call.key_rope = read("key_rope", rope);
  TORCH_CHECK(paged ? call.key_rope.keep.size(0) == call.key.keep.size(0) : rope.batch == kv.batch && rope.tokens == kv.tokens, args.op,
              ": key_rope must have key's tokens, got ", call.key_rope.keep.sizes(), " and ", call.key.keep.sizes());
}

namespace {

// The requests' lengths in batched layouts: None is all of S, one number is for every batch entry.
std::vector<int64_t> batched(const Arguments& args, const std::string& name, int64_t batch, int64_t tokens, bool bounded) {
  auto given = args.integers(name);
  std::vector<int64_t> out = given.value_or(std::vector<int64_t>{tokens});
  TORCH_CHECK(out.size() == 1 || static_cast<int64_t>(out.size()) >= batch, args.op, ": ", name, " must hold 1 number or one for each of the ",
              batch, " batch entries, got ", out.size());
  if (out.size() == 1) out.assign(batch, out[0]);
  out.resize(batch);
  for (int64_t length : out)
    TORCH_CHECK(length >= 0 && (!bounded || length <= tokens), args.op, ": ", name, " must lie in [0, ", tokens, "], got ", length);
  return out;
}

// Cumulative lengths, whose last is T.
std::vector<int64_t> packed(const Arguments& args, const std::string& name, int64_t tokens) {
  auto given = args.integers(name);
  RULE(".tnd-lengths", given && !given->empty(), args.op, ": ", name, " (cumulative) is required with layouts TND and NTD");
  int64_t last = 0;
  for (int64_t end : *given) {
    RULE(".cumulative", end >= last && end <= tokens, args.op, ": ", name, " must be cumulative lengths, rising to T = ", tokens, ", got ", *given);
    last = end;
  }
  STRICT(".last-length", last == tokens, args.op, ": the last number of ", name, " must equal T = ", tokens, " (padding included), got ", last);
  STRICT("npu_fused_infer_attention_score_v2.lengths", given->size() <= 4096 || !args.knows("learnable_sink"), args.op, ": ", name, " must hold at most 4096 numbers, got ", given->size());
  return *given;
}

void read_block_table(const Arguments& args, Call& call) {
  const at::Tensor table = args.tensor("block_table");
  STRICT(".block-table-dtype", table.scalar_type() == at::kInt, args.op, ": block_table must be int32, got ", table.scalar_type());
  RULE(".block-table-rank", table.dim() == 2, args.op, ": block_table must be [batch, blocks], got ", table.sizes());
  call.block_table = dense(table);
  if (table.scalar_type() != at::kInt) {
    at::AutoDispatchBelowADInplaceOrView below;
    call.block_table = cpu_alias(table).to(at::kInt).contiguous();
  }
  const int64_t columns = table.size(1), blocks = call.key.keep.size(0);
  RULE(".block-table-rows", table.size(0) == static_cast<int64_t>(call.requests.size()), args.op, ": block_table must have one row for each of the ",
              call.requests.size(), " requests, got ", table.size(0));
  for (size_t b = 0; b < call.requests.size(); ++b) {
    Request& r = call.requests[b];
    r.blocks = call.block_table.const_data_ptr<int32_t>() + b * columns;
    const int64_t needed = (r.kv_length + call.key.block - 1) / call.key.block;
    RULE(".block-table-columns", needed <= columns, args.op, ": block_table has ", columns, " blocks of ", call.key.block, " tokens a request, too few for ",
                args.names.kv_lengths, "[", b, "] = ", r.kv_length);
    for (int64_t i = 0; i < needed; ++i)
      TORCH_CHECK(r.blocks[i] >= 0 && r.blocks[i] < blocks, args.op, ": block_table[", b, "][", i, "] must lie in [0, ", blocks - 1, "], got ",
                  r.blocks[i]);
  }
}

}  // namespace

void read_requests(const Arguments& args, Call& call, const Layout& layout, const Sizes& query, const Sizes& kv, bool paged) {
  const Names& n = args.names;
  RULE(".paged-lengths", !paged || !args[n.kv_lengths].isNone(), args.op, ": ", n.kv_lengths, " is required with a block_table");
  if (layout.packed) {
    const std::vector<int64_t> ends = packed(args, n.query_lengths, query.tokens);
    const int64_t batch = static_cast<int64_t>(ends.size());
    std::vector<int64_t> kv_ends;
    if (paged) kv_ends = batched(args, n.kv_lengths, batch, 0, false);
    else kv_ends = packed(args, n.kv_lengths, kv.tokens);
    TORCH_CHECK(static_cast<int64_t>(kv_ends.size()) == batch, args.op, ": ", n.query_lengths, " and ", n.kv_lengths,
                " must have one length, got ", batch, " and ", kv_ends.size());
    for (int64_t b = 0, q = 0, k = 0; b < batch; ++b) {
      call.requests.push_back({0, q, ends[b] - q, paged ? 0 : k, paged ? kv_ends[b] : kv_ends[b] - k});
      q = ends[b], k = kv_ends[b];
    }
  } else {
    TORCH_CHECK(paged || kv.batch == query.batch, args.op, ": key and query must have one batch size, got ", kv.batch, " and ", query.batch);
    const std::vector<int64_t> lengths =
        query.tokens == 1 ? std::vector<int64_t>(query.batch, 1) : batched(args, n.query_lengths, query.batch, query.tokens, true);
    const std::vector<int64_t> kv_lengths = batched(args, n.kv_lengths, query.batch, kv.tokens, !paged);
    for (int64_t b = 0; b < query.batch; ++b) call.requests.push_back({b, 0, lengths[b], 0, kv_lengths[b]});
  }
  if (paged) read_block_table(args, call);
}

}  // namespace ascend_sim::attention
