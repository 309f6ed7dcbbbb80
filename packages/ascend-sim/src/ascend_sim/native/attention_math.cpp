// SPDX-License-Identifier: Apache-2.0
//
// Attention over dense or paged keys and values. Few query tokens: loops over the pages where they lie. Many: gathered keys and values, and
// matrix products over blocks of query tokens.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include "attention.h"
#include "lanes.h"

namespace ascend_sim::attention {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
// Calls f(pointer to key `s`, s, count) for each stretch of [low, high) that lies in one block.
template <class T, class F>
inline void stretches(const Cache& cache, const Request& r, int64_t head, int64_t low, int64_t high, const F& f) {
  const T* base = static_cast<const T*>(cache.data) + head * cache.axes.head;
  if (!r.blocks) return f(base + r.batch * cache.axes.batch + (r.kv_begin + low) * cache.axes.token, low, high - low);
  for (int64_t s = low; s < high;) {
    const int64_t inside = s % cache.block, count = std::min(high - s, cache.block - inside);
    f(base + r.blocks[s / cache.block] * cache.block_stride + inside * cache.axes.token, s, count);
    s += count;
  }
}

// Softmax of a row of scores in place, unnormalised: returns the sum of the exponentials; `most` becomes the largest score.
inline float exponentials(float* scores, int64_t count, float& most) {
  float top = most;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < count; ++i) top = std::max(top, scores[i]);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += scores[i] = fast_exp(scores[i] - top);
  most = top;
  return sum;
}

// ---- few query tokens ---------------------------------------------------------------------------------------------------------------------

// scores[g][s - low] = q[g] . key[s], G query heads of one kv head
template <class T, int G>
void score(const Call& call, const Request& r, int64_t head, int64_t low, int64_t high, const float* q, float* scores) {
  const int64_t size = call.key.size, width = high - low;
  stretches<T>(call.key, r, head, low, high, [&](const T* key, int64_t first, int64_t count) {
    for (int64_t s = 0; s < count; ++s, key += call.key.axes.token) {
      Lanes sums[G] = {};
      for (int64_t d = 0; d < size; d += lanes) {
        const Lanes k = vload(key + d);
        for (int g = 0; g < G; ++g) sums[g] += k * vload(q + g * size + d);
      }
      for (int g = 0; g < G; ++g) scores[g * width + first - low + s] = total(sums[g]);
    }
  });
}

// out[g][d, d + C * lanes) = sum over s of weights[g][s] * value[s]
template <class T, int G, int C>
void weigh(const Call& call, const Request& r, int64_t head, int64_t low, int64_t high, const float* weights, int64_t d, float* out) {
  const int64_t width = high - low;
  Lanes sums[G][C] = {};
  stretches<T>(call.value, r, head, low, high, [&](const T* value, int64_t first, int64_t count) {
    const float* weight = weights + first - low;
    value += d;
    for (int64_t s = 0; s < count; ++s, value += call.value.axes.token) {
      Lanes v[C];
      for (int c = 0; c < C; ++c) v[c] = vload(value + c * lanes);
      for (int g = 0; g < G; ++g)
        for (int c = 0; c < C; ++c) sums[g][c] += v[c] * weight[g * width + s];
    }
  });
  for (int g = 0; g < G; ++g) std::memcpy(out + g * call.value.size + d, sums[g], sizeof sums[g]);
}

template <class T>
void write(const Call& call, const Request& r, int64_t token, int64_t head, const float* from, float sum, float most) {
  const Axes& axes = call.out.axes;
  T* to = static_cast<T*>(const_cast<void*>(call.out.data)) + r.batch * axes.batch + (r.query_begin + token) * axes.token + head * axes.head;
  const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
#pragma omp simd
  for (int64_t d = 0; d < call.value.size; ++d) to[d] = static_cast<T>(from[d] * inverse);
  if (call.lse) {
    const Axes& l = call.lse_axes;
    call.lse[r.batch * l.batch + (r.query_begin + token) * l.token + head * l.head] = sum > 0 ? most + std::log(sum) : infinity;
  }
}

// The attention sink is one more score, which has no value.
inline void add_sink(const Call& call, int64_t head, float most, float& sum) {
  if (call.sink.defined()) sum += std::exp(call.sink.const_data_ptr<float>()[head] - most);
}

inline float first_score(const Call& call, int64_t head) { return call.sink.defined() ? call.sink.const_data_ptr<float>()[head] : -infinity; }

struct Scratch {
  std::vector<float> q, scores, out;
};

// G query heads from `first`, one token, one kv head.
template <class T, int G>
void decode_heads(const Call& call, const Request& r, int64_t token, int64_t first, int64_t head, Scratch& scratch) {
  const auto [low, high] = call.window.of(r, token);
  const int64_t size = call.key.size, width = high - low;
  scratch.q.resize(G * size);
  scratch.scores.resize(G * width);
  scratch.out.resize(G * call.value.size);
  float sums[G], most[G];
  const Axes& axes = call.query.axes;
  const T* q = static_cast<const T*>(call.query.data) + r.batch * axes.batch + (r.query_begin + token) * axes.token + first * axes.head;
  for (int g = 0; g < G; ++g)
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) scratch.q[g * size + d] = static_cast<float>(q[g * axes.head + d]) * call.scale;
  score<T, G>(call, r, head, low, high, scratch.q.data(), scratch.scores.data());
  for (int g = 0; g < G; ++g) {
    most[g] = first_score(call, first + g);
    sums[g] = width ? exponentials(scratch.scores.data() + g * width, width, most[g]) : 0;
    if (width) add_sink(call, first + g, most[g], sums[g]);
  }
  int64_t d = 0;
  for (; d + 4 * lanes <= call.value.size; d += 4 * lanes)
    weigh<T, G, 4>(call, r, head, low, high, scratch.scores.data(), d, scratch.out.data());
  for (; d < call.value.size; d += lanes) weigh<T, G, 1>(call, r, head, low, high, scratch.scores.data(), d, scratch.out.data());
  for (int g = 0; g < G; ++g) write<T>(call, r, token, first + g, scratch.out.data() + g * call.value.size, sums[g], most[g]);
}

template <class T>
void decode(const Call& call, const std::vector<std::pair<const Request*, int64_t>>& tokens) {
  const int64_t group = call.heads / call.kv_heads;
  int64_t keys = 0;
  for (auto& [r, token] : tokens) keys += r->kv_length;
  const int64_t units = static_cast<int64_t>(tokens.size()) * call.kv_heads;
  const int64_t work = keys / std::max<int64_t>(1, tokens.size()) * group * (call.key.size + call.value.size) / 8;
  parallel(units, work, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto& [r, token] = tokens[unit / call.kv_heads];
      const int64_t head = unit % call.kv_heads;
      for (int64_t first = head * group, left = group; left > 0;) {
        switch (std::min<int64_t>(left, 4)) {
          case 4: decode_heads<T, 4>(call, *r, token, first, head, scratch); break;
          case 3: decode_heads<T, 3>(call, *r, token, first, head, scratch); break;
          case 2: decode_heads<T, 2>(call, *r, token, first, head, scratch); break;
          default: decode_heads<T, 1>(call, *r, token, first, head, scratch);
        }
        const int64_t done = std::min<int64_t>(left, 4);
        first += done, left -= done;
      }
    }
  });
}

// ---- many query tokens --------------------------------------------------------------------------------------------------------------------

// Keys or values [low, high) of all kv heads as float32 [kv_heads, high - low, width], written from column `at` on.
template <class T>
void gather(const Call& call, const Cache& cache, const Request& r, int64_t low, int64_t high, float* to, int64_t width, int64_t at) {
  parallel(call.kv_heads, (high - low) * cache.size, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      stretches<T>(cache, r, head, low, high, [&](const T* from, int64_t first, int64_t count) {
        for (int64_t s = 0; s < count; ++s, from += cache.axes.token) {
          float* row = to + (head * (high - low) + first - low + s) * width + at;
#pragma omp simd
          for (int64_t d = 0; d < cache.size; ++d) row[d] = static_cast<float>(from[d]);
        }
      });
  });
}

// Query tokens [begin, end), scaled, as float32 [kv_heads * group, end - begin, width] from column `at` on.
template <class T>
void gather_queries(const Call& call, const Rows& rows, const Request& r, int64_t begin, int64_t end, float* to, int64_t width, int64_t at) {
  parallel(call.heads, (end - begin) * rows.size, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head)
      for (int64_t t = begin; t < end; ++t) {
        const T* from =
            static_cast<const T*>(rows.data) + r.batch * rows.axes.batch + (r.query_begin + t) * rows.axes.token + head * rows.axes.head;
        float* row = to + (head * (end - begin) + t - begin) * width + at;
#pragma omp simd
        for (int64_t d = 0; d < rows.size; ++d) row[d] = static_cast<float>(from[d]) * call.scale;
      }
  });
}

// Softmax of one row of scores over the keys [low, high), of which token t sees some: what it does not see becomes 0.
float soften(const Call& call, const Request& r, int64_t head, int64_t t, float* scores, int64_t low, int64_t high, float& most) {
  auto [from, to] = call.window.of(r, t);
  from = std::max(from, low), to = std::min(to, high);
  if (to <= from) {
    std::fill(scores, scores + (high - low), 0.0f);
    return 0;
  }
  most = first_score(call, head);
  const uint8_t* mask = call.mask.data ? call.mask.data + r.batch * call.mask.batch_stride + t * call.mask.row_stride : nullptr;
  bool any = !mask;
  if (mask)
    for (int64_t s = from; s < to; ++s) {
      if (mask[s]) scores[s - low] = -infinity;
      else any = true;
    }
  float sum = 0;
  if (any) {
    sum = exponentials(scores + from - low, to - from, most);
    add_sink(call, head, most, sum);
  } else {
    from = to = low;
  }
  if (mask && any)
    for (int64_t s = from; s < to; ++s)
      if (mask[s]) sum -= scores[s - low], scores[s - low] = 0;  // the exponential's lower clamp
  std::fill(scores, scores + (from - low), 0.0f);
  std::fill(scores + (to - low), scores + (high - low), 0.0f);
  return sum;
}

template <class T>
void prefill(const Call& call, const Request& r) {
  const int64_t group = call.heads / call.kv_heads, width = call.key.size + call.key_rope.size;
  const int64_t least = call.window.of(r, 0).first, length = std::max<int64_t>(1, r.kv_length);
  const int64_t chunk = std::clamp<int64_t>((int64_t{1} << 22) / (length * call.heads), 16, 256);
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const int64_t kept = r.kv_length - least;
  at::Tensor keys = at::empty({call.kv_heads, kept, width}, options), values = at::empty({call.kv_heads, kept, call.value.size}, options);
  gather<T>(call, call.key, r, least, r.kv_length, keys.data_ptr<float>(), width, 0);
  if (call.key_rope.data) gather<T>(call, call.key_rope, r, least, r.kv_length, keys.data_ptr<float>(), width, call.key.size);
  gather<T>(call, call.value, r, least, r.kv_length, values.data_ptr<float>(), call.value.size, 0);
  for (int64_t begin = 0; begin < r.query_length; begin += chunk) {
    const int64_t end = std::min(begin + chunk, r.query_length), count = end - begin;
    const int64_t low = std::max(least, call.window.of(r, begin).first), high = std::max(low, call.window.of(r, end - 1).second);
    at::Tensor queries = at::empty({call.kv_heads, group * count, width}, options);
    gather_queries<T>(call, call.query, r, begin, end, queries.data_ptr<float>(), width, 0);
    if (call.query_rope.data) gather_queries<T>(call, call.query_rope, r, begin, end, queries.data_ptr<float>(), width, call.query.size);
    at::Tensor scores = at::bmm(queries, keys.narrow(1, low - least, high - low).transpose(1, 2)).contiguous();
    std::vector<float> sums(call.heads * count), most(call.heads * count);
    parallel(call.heads * count, 2 * (high - low), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        sums[row] = soften(call, r, row / count, begin + row % count, scores.data_ptr<float>() + row * (high - low), low, high, most[row]);
    });
    const at::Tensor result = at::bmm(scores, values.narrow(1, low - least, high - low)).contiguous();
    for (int64_t row = 0; row < call.heads * count; ++row)
      write<T>(call, r, begin + row % count, row / count, result.const_data_ptr<float>() + row * call.value.size, sums[row], most[row]);
  }
}

template <class T>
int64_t run(const Call& call) {
  const bool direct = !call.query_rope.data && !call.mask.data && call.key.size % lanes == 0 && call.value.size % lanes == 0;
  std::vector<std::pair<const Request*, int64_t>> tokens;
  std::vector<const Request*> prompts;
  int64_t pairs = 0;
  for (const Request& r : call.requests) {
    for (int64_t t = 0; t < r.query_length; ++t) {
      const auto [low, high] = call.window.of(r, t);
      pairs += high - low;
    }
    if (direct && r.query_length <= 4)
      for (int64_t t = 0; t < r.query_length; ++t) tokens.emplace_back(&r, t);
    else if (r.query_length) prompts.push_back(&r);
  }
  const auto some = [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below;  // it holds for one thread
    for (int64_t i = begin; i < end; ++i) prefill<T>(call, *prompts[i]);
  };
  const int64_t count = prompts.size();
  if (count < at::get_num_threads()) some(0, count);  // each is spread over the cores
  else at::parallel_for(0, count, 1, some);
  decode<T>(call, tokens);
  return 2 * pairs * call.heads * (call.key.size + call.key_rope.size + call.value.size);
}

}  // namespace

int64_t attend(const Call& call) {
  at::AutoDispatchBelowADInplaceOrView below;
  int64_t flops = 0;
  by_type("npu_fused_infer_attention_score", call.type, [&](auto tag) { flops = run<decltype(tag)>(call); });
  return flops;
}

}  // namespace ascend_sim::attention
