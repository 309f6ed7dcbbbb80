// SPDX-License-Identifier: Apache-2.0
//
// One attention call, after reading and checking its arguments (attention.cpp) and before the arithmetic (attention_math.cpp).
#pragma once
#include "kernels.h"

namespace ascend_sim::attention {

// Elements from one batch entry, token and head to the next; the innermost dimension is contiguous.
struct Axes {
  int64_t batch = 0, token = 0, head = 0;
};

// Key, value or key_rope. Paged: `block` tokens to a block, found by the request's row of the block table. Dense: one endless block.
struct Cache {
  at::Tensor keep;
  const void* data = nullptr;
  int64_t size = 0;  // of one head's vector
  Axes axes;
  int64_t block = std::numeric_limits<int64_t>::max(), block_stride = 0;
};

struct Rows {
  at::Tensor keep;
  const void* data = nullptr;
  int64_t size = 0;
  Axes axes;
};

struct Request {
  int64_t batch, query_begin, query_length, kv_begin, kv_length;
  const int32_t* blocks = nullptr;
};

// Query token i of a request sees the keys [i + shift - before, i + shift + after], and of those what the mask leaves.
struct Window {
  int64_t before = std::numeric_limits<int32_t>::max(), after = std::numeric_limits<int32_t>::max();
  bool bottom_right = false;  // shift = kv_length - query_length, else 0
  std::pair<int64_t, int64_t> of(const Request& r, int64_t i) const {
    const int64_t middle = i + (bottom_right ? r.kv_length - r.query_length : 0);
    const int64_t low = std::clamp<int64_t>(middle - before, 0, r.kv_length), high = std::clamp<int64_t>(middle + after + 1, 0, r.kv_length);
    return {low, std::max(low, high)};
  }
};

struct Mask {
  at::Tensor keep;
  const uint8_t* data = nullptr;  // nonzero: not seen
  int64_t batch_stride = 0, row_stride = 0;
};

struct Call {
  at::ScalarType type;
  int64_t heads = 0, kv_heads = 0;
  float scale = 1;
  Rows query, query_rope, out;  // without rope its data is null
  Cache key, key_rope, value;
  std::vector<Request> requests;
  at::Tensor block_table;
  Window window;
  Mask mask;
  at::Tensor sink;  // float32 [heads] or undefined
  float* lse = nullptr;
  Axes lse_axes;
};

// Fill `out` and `lse` of every request's query tokens. A token that sees nothing gets zeros and lse +inf, as on the hardware.
// Returns the floating-point operations of the two matrix products.
int64_t attend(const Call& call);

}  // namespace ascend_sim::attention
