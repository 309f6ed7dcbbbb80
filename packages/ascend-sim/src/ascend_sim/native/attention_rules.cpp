// SPDX-License-Identifier: Apache-2.0
//
// Masks, and what the documentation rules out on Atlas A2.
#include <bit>
#include <set>

#include "attention_arguments.h"

namespace ascend_sim::attention {
namespace {

// The documentation of latent attention differs between the two versions of the operator.
bool second_version(const Arguments& args) { return args.knows("learnable_sink"); }

// The compressed mask of sparse modes 2, 3 and 4: 2048 x 2048, ones above the diagonal.
void check_compressed_mask(const Arguments& args, const at::Tensor& mask) {
  RULE(".mask-needed", mask.defined(), args.op, ": sparse_mode ", args.integer("sparse_mode"), " needs the compressed atten_mask of 2048 x 2048");
  int64_t lead = 1;
  for (int64_t i = 0; i + 2 < mask.dim(); ++i) lead *= mask.size(i);
  RULE(".mask-shape", mask.dim() >= 2 && mask.dim() <= 4 && lead == 1 && mask.size(-1) == 2048 && mask.size(-2) == 2048, args.op,
       ": atten_mask of sparse_mode ", args.integer("sparse_mode"), " must be (2048, 2048), (1, 2048, 2048) or (1, 1, 2048, 2048), got ",
       mask.sizes());
  if (!mask.is_contiguous()) return;
  const uint8_t* m = static_cast<const uint8_t*>(mask.const_data_ptr());
  constexpr int64_t n = 2048;
  STRICT(".mask-content", !m[0] && m[1] && m[n - 1] && !m[(n - 1) * n] && !m[n * n - 1] && !m[n], args.op,
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

// Multi-head latent attention in the absorbed form: D = 512, one paged key for all heads.
void check_absorbed(const Arguments& args, const Call& call, const Layout& layout, int64_t longest, bool paged) {
  const int64_t block = args.integer("block_size"), mode = args.integer("sparse_mode");
  static const std::set<std::string> first = {"BSH", "BSND", "BNSD"};
  static const std::set<std::string> second = {"BSH", "BSND", "BNSD", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND", "TND_NTD"};
  STRICT(".latent-layout", (second_version(args) ? second : first).count(layout.name), args.op, ": input_layout ", layout.name,
         " is not supported with D = 512");
  STRICT(".latent-heads", call.heads <= 128 && std::has_single_bit(static_cast<uint64_t>(call.heads)) && (second_version(args) || call.heads >= 32),
         args.op, ": the number of heads must be ", second_version(args) ? "1, 2, 4, ..., 128" : "32, 64 or 128", " with D = 512, got ", call.heads);
  STRICT(".latent-kv-heads", call.kv_heads == 1, args.op, ": key must have 1 head with D = 512, got ", call.kv_heads);
  STRICT(".latent-paged", paged, args.op, ": D = 512 needs a block_table");
  STRICT(".latent-block-size", block == 16 || block == 128 || (mode == 4 && block == 64), args.op,
         ": block_size must be 16 or 128 with D = 512, got ", block);
  STRICT(".latent-queries", mode == 4 || longest <= 16, args.op, ": a request must have at most 16 query tokens with D = 512, got ", longest);
  const bool masked = args.tensor("atten_mask").defined();
  STRICT(".latent-mask", longest > 1 ? masked && (mode == 3 || (mode == 4 && !second_version(args)))
                                     : (mode == 0 && !masked) || (mode == 4 && masked && !second_version(args)),
         args.op, ": with D = 512 sparse_mode must be 0 without atten_mask where every request has one query token, and 3 with it otherwise, got ",
         mode, masked ? " with it" : " without it");
}

// And in the plain form: D = 128, keys and values of new tokens. query_rope and key_rope are more columns of query and key.
void check_rope(const Arguments& args, const Call& call, const Layout& layout, int64_t longest, bool paged) {
  const int64_t size = call.query.size;
  RULE(".rope-sizes", call.query_rope.size == call.key_rope.size, args.op, ": query_rope and key_rope must have one size, got ",
       call.query_rope.size, " and ", call.key_rope.size);
  STRICT(".rope-size", call.query_rope.size == 64, args.op, ": query_rope must be 64 wide, got ", call.query_rope.size);
  STRICT(".rope-head-size", size == 512 || size == 128, args.op, ": D must be 512 or 128 beside query_rope, got ", size);
  if (size == 512) return check_absorbed(args, call, layout, longest, paged);
  STRICT(".plain-layout", layout.name == "TND" || layout.name == "NTD_TND", args.op,
         ": input_layout must be TND or NTD_TND with D = 128 and query_rope, got ", layout.name);
  STRICT(".plain-paged", !paged, args.op, ": D = 128 with query_rope takes no block_table");
  STRICT(".plain-value-size", call.value.size == 128, args.op, ": D of value must be 128 with D = 128 and query_rope, got ", call.value.size);
}

// What TND and its relatives take beside the latent form.
void check_packed(const Arguments& args, const Call& call, const Sizes& query) {
  const int64_t size = call.query.size, most = second_version(args) ? 1 << 20 : 65536;
  STRICT(".tnd-tokens", query.tokens <= most, args.op, ": T must not exceed ", most, ", got ", query.tokens);
  const bool latent = call.query_rope.data && size == 512;
  STRICT(".tnd-dtype", latent || call.type == at::kBFloat16, args.op, ": query must be bfloat16 with layouts TND and NTD, got ", call.type);
  if (call.query_rope.data) return;
  STRICT(".tnd-head-size", size == 64 || size == 128 || size == 192 || size == 256, args.op,
         ": D must be 64, 128, 192 or 256 with layouts TND and NTD, got ", size);
  STRICT(".tnd-value-size", call.value.size == size || (size == 192 && call.value.size == 128), args.op,
         ": D of value must be that of query, or 128 where that is 192, got ", call.value.size, " and ", size);
}

}  // namespace

void read_window(const Arguments& args, Call& call, const Layout& layout, const Sizes& query, const Sizes& kv) {
  const int64_t mode = args.integer("sparse_mode");
  const at::Tensor mask = args.tensor("atten_mask");
  const bool rope = call.query_rope.data != nullptr;
  RULE(".sparse-mode", mode >= 0 && mode <= 4, args.op, ": sparse_mode must be 0, 1, 2, 3 or 4 (9, tree mask, is not simulated), got ", mode);
  if (mask.defined())
    RULE(".mask-dtype", mask.scalar_type() == at::kBool || mask.scalar_type() == at::kChar || mask.scalar_type() == at::kByte, args.op,
         ": atten_mask must be bool, int8 or uint8, got ", mask.scalar_type());
  if (mask.defined()) STRICT(".mask-contiguous", mask.is_contiguous(), args.op, ": atten_mask must be contiguous");
  if (!layout.packed && query.tokens == 1 && !rope && mode >= 2) {  // one query token: sparse_mode is ignored
    STRICT(".band-batched", mode != 4, args.op, ": sparse_mode 4 has no effect when Q_S is 1 and the layout is ", layout.in, " (use TND for a sliding window)");
    return;
  }
  if (mode >= 2) {
    check_compressed_mask(args, mask);
    call.window.after = 0;
    call.window.bottom_right = mode != 2;
    if (mode == 4) {
      call.window.before = args.integer("pre_tokens"), call.window.after = args.integer("next_tokens");
      STRICT(".band", call.window.before + call.window.after >= 0, args.op, ": pre_tokens + next_tokens must be >= 0, got ", call.window.before, " and ",
             call.window.after);
    }
    return;
  }
  RULE(".whole-mask-needed", mode == 0 || mask.defined(), args.op, ": sparse_mode 1 needs a whole atten_mask");
  if (!mask.defined()) return;
  RULE(".tnd-mask", !layout.packed, args.op, ": layout ", layout.in, " with sparse_mode ", mode, " takes no atten_mask");
  const int64_t keys = call.block_table.defined() ? call.block_table.size(1) * call.key.block : kv.tokens;
  call.mask = full_mask(args, mask, query, keys);
  if (mode == 0 && query.tokens > 1) call.window.before = args.integer("pre_tokens"), call.window.after = args.integer("next_tokens");
}

void read_sink(const Arguments& args, Call& call, const Layout& layout) {
  if (!args.knows("learnable_sink")) return;
  const at::Tensor sink = args.tensor("learnable_sink");
  if (!sink.defined()) return;
  RULE(".sink-shape", sink.dim() == 1 && sink.size(0) == call.heads, args.op, ": learnable_sink must hold one number per query head, got ",
       sink.sizes());
  STRICT(".sink-dtype", sink.scalar_type() == at::kBFloat16, args.op, ": learnable_sink must be bfloat16, got ", sink.scalar_type());
  STRICT(".sink-layout", layout.packed && layout.out == "TND", args.op, ": learnable_sink needs layout TND or NTD_TND, got ", layout.in);
  STRICT(".sink-value-size", call.value.size <= 128, args.op, ": learnable_sink needs a head size of value of at most 128, got ", call.value.size);
  call.sink = floats(sink);
}

void check_limits(const Arguments& args, const Call& call, const Layout& layout, const Sizes& query, bool paged) {
  const int64_t size = call.query.size, block = args.integer("block_size"), mode = args.integer("sparse_mode");
  int64_t longest = layout.packed ? 0 : query.tokens;
  if (layout.packed)
    for (const Request& r : call.requests) longest = std::max(longest, r.query_length);
  STRICT(".alignment", size % 16 == 0 && call.value.size % 16 == 0, args.op, ": D must be a multiple of 16, got ", size, " and ",
         call.value.size, " of value");
  STRICT(".head-size", size <= 512, args.op, ": D must not exceed 512, got ", size);
  STRICT(".heads", call.heads <= 256, args.op, ": the number of heads must not exceed 256, got ", call.heads);
  STRICT(".head-ratio", call.heads / call.kv_heads <= 64 || call.query_rope.data, args.op,
         ": the ratio of query to key/value heads must not exceed 64, got ", call.heads / call.kv_heads);
  STRICT(".batch", query.batch <= 65536 && call.requests.size() <= 65536, args.op, ": B must not exceed 65536, got ",
         std::max<size_t>(query.batch, call.requests.size()));
  STRICT(".width", layout.in[0] != 'B' || layout.in[1] != 'S' || query.tokens == 1 || call.heads * size < 65535, args.op,
         ": N * D must be below 65535 with layout ", layout.in, ", got ", call.heads * size);
  if (paged && !call.query_rope.data) {
    STRICT(".block-alignment", block % 16 == 0, args.op, ": block_size must be a multiple of 16, got ", block);
    STRICT(".block-size", longest <= 1 || (block % 128 == 0 && block <= 512), args.op,
           ": block_size must be 128, 256, 384 or 512 where a request has several query tokens, got ", block);
  }
  STRICT(".bnsd-bsnd", layout.in != "BNSD" || layout.out != "BSND" || query.tokens > 1, args.op, ": BNSD_BSND needs Q_S > 1");
  if (layout.packed && mode == 3)
    for (const Request& r : call.requests)
      STRICT(".causal-lengths", r.query_length <= r.kv_length || r.kv_length == 0, args.op,
             ": sparse_mode 3 needs at least as many keys as query tokens in each request, got ", r.kv_length, " and ", r.query_length);
  if (layout.packed) check_packed(args, call, query);
  if (call.query_rope.data) check_rope(args, call, layout, longest, paged);
}

}  // namespace ascend_sim::attention
