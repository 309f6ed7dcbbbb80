// SPDX-License-Identifier: Apache-2.0
//
// Sixteen floats at a time, by the compiler's vector extension: one AVX-512 register, or several smaller ones where there is no AVX-512.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ascend_sim {

constexpr int64_t lanes = 16;
using Lanes = float __attribute__((vector_size(64)));

template <class T>
inline Lanes vload(const T* from) {
  Lanes out;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&out, from, sizeof out);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    uint16_t __attribute__((vector_size(32))) bits;
    std::memcpy(&bits, from, sizeof bits);
    using Wide = uint32_t __attribute__((vector_size(64)));
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(&out, &wide, sizeof out);
  } else {
    for (int64_t i = 0; i < lanes; ++i) out[i] = static_cast<float>(from[i]);
  }
  return out;
}

inline float total(const Lanes& v) {
  using Half = float __attribute__((vector_size(32)));
  using Quarter = float __attribute__((vector_size(16)));
  Half half[2];
  std::memcpy(half, &v, sizeof v);
  const Half sum = half[0] + half[1];
  Quarter quarter[2];
  std::memcpy(quarter, &sum, sizeof sum);
  const Quarter last = quarter[0] + quarter[1];
  return (last[0] + last[2]) + (last[1] + last[3]);
}

// The totals of sixteen vectors at once: lane i of the result is the total of v[i]. A tree of shuffles, a quarter of the work of sixteen totals.
inline Lanes totals(const Lanes* v) {
  using Order = int __attribute__((vector_size(64)));
  Lanes a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shuffle(v[i], v[i + 8], Order{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
           __builtin_shuffle(v[i], v[i + 8], Order{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shuffle(a[i], a[i + 4], Order{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}) +
           __builtin_shuffle(a[i], a[i + 4], Order{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shuffle(b[i], b[i + 2], Order{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
           __builtin_shuffle(b[i], b[i + 2], Order{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  return __builtin_shuffle(c[0], c[1], Order{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}) +
         __builtin_shuffle(c[0], c[1], Order{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
}

}  // namespace ascend_sim
