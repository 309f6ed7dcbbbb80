// SPDX-License-Identifier: Apache-2.0
//
// Products with a weight matrix for the few rows of a decoding step, where the CPU's BLAS leaves most of the memory bandwidth unused.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace ascend_sim {

// left [M, K] @ right [K, N] (+ bias [N]) -> [M, N] on their device, summed in float32 and rounded once; nullopt where the shapes, types or strides are
// not those it is made for: up to 128 rows of float32 or 8 of bfloat16, and a `right` that is the transpose of rows of K contiguous elements.
std::optional<at::Tensor> few_rows(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias = {});

}  // namespace ascend_sim
