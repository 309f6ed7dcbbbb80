// SPDX-License-Identifier: Apache-2.0
//
// Products with a weight matrix: for the few rows of a decoding step, where the CPU's BLAS leaves most of the memory bandwidth unused, and for many.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace ascend_sim {

// Whether left [M, K] @ right [K, N] (+ bias [N]) is a product of one type on one device.
bool is_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias = {});

// left [M, K] @ right [K, N] (+ bias [N]) -> [M, N] on their device, summed in float32 and rounded once; nullopt where the shapes, types or strides are
// not those it is made for: up to 128 rows of float32 or 8 of bfloat16, and a `right` that is the transpose of rows of K contiguous elements.
std::optional<at::Tensor> few_rows(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias = {});

// The same by PyTorch's product, written into device memory at once; nullopt for what is no product.
std::optional<at::Tensor> many_rows(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias);

}  // namespace ascend_sim
