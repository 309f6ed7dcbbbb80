// SPDX-License-Identifier: Apache-2.0
//
// Masks, and what the documentation rules out on Atlas A2.
#include <bit>

#include "attention_arguments.h"
#include "unnamed.h"

namespace ascend_sim::attention {
namespace {

// The compressed mask of sparse modes 2, 3 and 4: 2048 x 2048, ones above the diagonal.
void check_compressed_mask(const Arguments& args, const at::Tensor& mask) {
  TORCH_CHECK(mask.defined(), args.op, ": sparse_mode ", args.integer("sparse_mode"), " needs the compressed atten_mask of 2048 x 2048");
  int64_t lead = 1;
  for (int64_t i = 0; i + 2 < mask.dim(); ++i) lead *= mask.size(i);
  TORCH_CHECK(mask.dim() >= 2 && mask.dim() <= 4 && lead == 1 && mask.size(-1) == 2048 && mask.size(-2) == 2048, args.op,
              ": atten_mask of sparse_mode ", args.integer("sparse_mode"), " must be (2048, 2048), (1, 2048, 2048) or (1, 1, 2048, 2048), got ",
              mask.sizes());
  if (!mask.is_contiguous()) return;
  const uint8_t* m = static_cast<const uint8_t*>(mask.const_data_ptr());
  constexpr int64_t n = 2048;
  STRICT(!m[0] && m[1] && m[n - 1] && !m[(n - 1) * n] && !m[n * n - 1] && !m[n], args.op,
         ": the compressed atten_mask must be 1 above the diagonal and 0 elsewhere");
}

// A whole mask [.., Q_S, KV_S] of sparse modes 0 and 1.
Mask full_mask(const Arguments& args, const at::Tensor& given, const Sizes& query, int64_t keys) {
  const at::Tensor mask = dense(given);
  const int64_t batch = mask.dim() == 4 || mask.dim() == 3 ? mask.size(0) : query.tokens == 1 ? mask.size(0) : 1;
  const int64_t rows = mask.dim() == 2 && query.tokens == 1 ? 1 : mask.size(-2);
  TORCH_CHECK(
      mask.dim() >= 2 && mask.dim() <= 4 && (batch == 1 || batch == query.batch) && (mask.dim() < 4 || mask.size(1) == 1) &&
          rows >= query.tokens && mask.size(-1) >= keys,
      args.op,
      ": atten_mask of sparse_mode 0 or 1 must be (Q_S, KV_S), (1, Q_S, KV_S), (1, 1, Q_S, KV_S) or (B, 1, Q_S, KV_S) of at least Q_S = ",
      query.tokens, " and KV_S = ", keys, ", got ", given.sizes());
  Mask out;
  out.keep = mask;
  out.data = static_cast<const uint8_t*>(mask.const_data_ptr());
  out.row_stride = mask.size(-1);
  out.batch_stride = batch == 1 ? 0 : rows * mask.size(-1);
  return out;
}

// Multi-head latent attention: query_rope and key_rope are more columns of query and key.
void check_rope(const Arguments& args, const Call& call, bool paged) {
  const int64_t size = call.query.size, block = args.integer("block_size"), mode = args.integer("sparse_mode");
  TORCH_CHECK(call.query_rope.size == call.key_rope.size, args.op, ": query_rope and key_rope must have one size, got ", call.query_rope.size,
              " and ", call.key_rope.size);
  STRICT(call.query_rope.size == 64, args.op, ": query_rope must be 64 wide, got ", call.query_rope.size);
  STRICT(size == 512 || size == 128, args.op, ": D must be 512 or 128 beside query_rope, got ", size);
  STRICT(mode != 1 && mode != 2, args.op, ": sparse_mode must be 0, 3 or 4 beside query_rope, got ", mode);
  if (size != 512) {
    STRICT(!paged, args.op, ": D = 128 with query_rope takes no block_table");
    return;
  }
  STRICT(call.heads <= 128 && std::has_single_bit(static_cast<uint64_t>(call.heads)), args.op,
         ": the number of heads must be 1, 2, 4, ..., 128 with D = 512, got ", call.heads);
  STRICT(call.kv_heads == 1, args.op, ": key must have 1 head with D = 512, got ", call.kv_heads);
  STRICT(paged, args.op, ": D = 512 needs a block_table");
  STRICT(block == 16 || block == 128 || (mode == 4 && block == 64), args.op, ": block_size must be 16 or 128 with D = 512, got ", block);
  for (const Request& r : call.requests)
    STRICT(mode == 4 || r.query_length <= 16, args.op, ": a request must have at most 16 query tokens with D = 512, got ", r.query_length);
}

}  // namespace

void read_window(const Arguments& args, Call& call, const Layout& layout, const Sizes& query, const Sizes& kv) {
  const int64_t mode = args.integer("sparse_mode");
  const at::Tensor mask = args.tensor("atten_mask");
  const bool rope = call.query_rope.data != nullptr;
  TORCH_CHECK(mode >= 0 && mode <= 4, args.op, ": sparse_mode must be 0, 1, 2, 3 or 4 (9, tree mask, is not simulated), got ", mode);
  if (mask.defined())
    TORCH_CHECK(mask.scalar_type() == at::kBool || mask.scalar_type() == at::kChar || mask.scalar_type() == at::kByte, args.op,
                ": atten_mask must be bool, int8 or uint8, got ", mask.scalar_type());
  if (mask.defined()) STRICT(mask.is_contiguous(), args.op, ": atten_mask must be contiguous");
  if (!layout.packed && query.tokens == 1 && !rope && mode >= 2) {  // one query token: sparse_mode is ignored
    STRICT(mode != 4, args.op, ": sparse_mode 4 has no effect when Q_S is 1 and the layout is ", layout.in, " (use TND for a sliding window)");
    return;
  }
  if (mode >= 2) {
    check_compressed_mask(args, mask);
    call.window.after = 0;
    call.window.bottom_right = mode != 2;
    if (mode == 4) {
      call.window.before = args.integer("pre_tokens"), call.window.after = args.integer("next_tokens");
      STRICT(call.window.before + call.window.after >= 0, args.op, ": pre_tokens + next_tokens must be >= 0, got ", call.window.before, " and ",
             call.window.after);
    }
    return;
  }
  TORCH_CHECK(mode == 0 || mask.defined(), args.op, ": sparse_mode 1 needs a whole atten_mask");
  if (!mask.defined()) return;
  TORCH_CHECK(!layout.packed, args.op, ": layout ", layout.in, " with sparse_mode ", mode, " takes no atten_mask");
  const int64_t keys = call.block_table.defined() ? call.block_table.size(1) * call.key.block : kv.tokens;
  call.mask = full_mask(args, mask, query, keys);
  if (mode == 0 && query.tokens > 1) call.window.before = args.integer("pre_tokens"), call.window.after = args.integer("next_tokens");
}

void read_sink(const Arguments& args, Call& call, const Layout& layout) {
  if (!args.knows("learnable_sink")) return;
  const at::Tensor sink = args.tensor("learnable_sink");
  if (!sink.defined()) return;
  TORCH_CHECK(sink.dim() == 1 && sink.size(0) == call.heads, args.op, ": learnable_sink must hold one number per query head, got ",
              sink.sizes());
  STRICT(sink.scalar_type() == at::kBFloat16, args.op, ": learnable_sink must be bfloat16, got ", sink.scalar_type());
  STRICT(layout.packed && layout.out == "TND", args.op, ": learnable_sink needs layout TND or NTD_TND, got ", layout.in);
  STRICT(call.value.size <= 128, args.op, ": learnable_sink needs a head size of value of at most 128, got ", call.value.size);
  call.sink = floats(sink);
}

void check_limits(const Arguments& args, const Call& call, const Layout& layout, const Sizes& query, bool paged) {
  const int64_t size = call.query.size, block = args.integer("block_size"), mode = args.integer("sparse_mode");
  STRICT(size % 16 == 0 && call.value.size % 16 == 0, args.op, ": D must be a multiple of 16, got ", size, " and ", call.value.size,
         " of value");
  STRICT(size <= 512, args.op, ": D must not exceed 512, got ", size);
  STRICT(call.heads <= 256, args.op, ": the number of heads must not exceed 256, got ", call.heads);
  STRICT(call.heads / call.kv_heads <= 64 || call.query_rope.data, args.op, ": the ratio of query to key/value heads must not exceed 64, got ",
         call.heads / call.kv_heads);
  STRICT(!layout.packed || query.tokens <= 1 << 20, args.op, ": T must not exceed 1M, got ", query.tokens);
  STRICT(query.batch <= 65536, args.op, ": B must not exceed 65536, got ", query.batch);
  STRICT(layout.in[0] != 'B' || layout.in[1] != 'S' || query.tokens == 1 || call.heads * size < 65535, args.op,
         ": N * D must be below 65535 with layout ", layout.in, ", got ", call.heads * size);
  if (paged) STRICT(block % 16 == 0 && block <= 512, args.op, ": block_size must be a multiple of 16, at most 512, got ", block);
  STRICT(layout.in != "BNSD" || layout.out != "BSND" || query.tokens > 1, args.op, ": BNSD_BSND needs Q_S > 1");
  if (layout.packed && mode == 3)
    for (const Request& r : call.requests)
      STRICT(r.query_length <= r.kv_length || r.kv_length == 0, args.op,
             ": sparse_mode 3 needs at least as many keys as query tokens in each request, got ", r.kv_length, " and ", r.query_length);
  if (call.query_rope.data) check_rope(args, call, paged);
}

}  // namespace ascend_sim::attention
