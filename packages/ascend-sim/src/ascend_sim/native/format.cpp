// SPDX-License-Identifier: Apache-2.0
//
// Formats and prefetching. A tensor keeps the format that it was cast to, which torch_npu has in the storage and get_npu_format reads; its numbers
// lie as in ND all the same.
#include <torch_npu/csrc/core/NPUStorageImpl.h>

#include "kernels.h"

namespace ascend_sim {
namespace {

torch_npu::NPUStorageDesc& described(const at::Tensor& t) {
  return static_cast<torch_npu::NPUStorageImpl*>(t.storage().unsafeGetStorageImpl())->npu_desc_;
}

}  // namespace

bool is_fractal(const at::Tensor& t) { return described(t).npu_format_ == ACL_FORMAT_FRACTAL_NZ; }

namespace {

void check_format(const char* op, const at::Tensor& input, int64_t format, std::optional<int64_t> customize,
                  std::optional<int64_t> input_dtype) {
  constexpr int64_t nd = 2, nz = 29;
  on_device_in_any_format(op, "input", input);
  TORCH_CHECK(format == nd || format == nz || format == 0, op, ": acl_format ", format,
              " is not simulated (0 NCHW, 2 ND and 29 FRACTAL_NZ are)");
  TORCH_CHECK(!customize && !input_dtype, op, ": customize_dtype and input_dtype are not simulated");
  TORCH_CHECK(format != nz || input.dim() >= 2, op, ": FRACTAL_NZ needs 2 or more dimensions, got ", input.dim());
}

// torch_npu/_op_plugin_docs.py: npu_format_cast: a copy with the same numbers in another format.
at::Tensor format_cast(const at::Tensor& input, int64_t acl_format, std::optional<int64_t> customize_dtype, std::optional<int64_t> input_dtype) {
  static Tally& mine = tally("npu::npu_format_cast");
  count_call(mine);
  check_format("npu_format_cast", input, acl_format, customize_dtype, input_dtype);
  at::Tensor out = to_npu(dense(input), input.device());
  described(out).npu_format_ = static_cast<aclFormat>(acl_format);
  return out;
}

at::Tensor format_cast_like(const at::Tensor& input, const at::Tensor& other, std::optional<int64_t> customize_dtype,
                            std::optional<int64_t> input_dtype) {
  return format_cast(input, described(other).npu_format_, customize_dtype, input_dtype);
}

at::Tensor& format_cast_(at::Tensor& input, int64_t acl_format, std::optional<int64_t> customize_dtype, std::optional<int64_t> input_dtype) {
  static Tally& mine = tally("npu::npu_format_cast_");
  count_call(mine);
  check_format("npu_format_cast_", input, acl_format, customize_dtype, input_dtype);
  described(input).npu_format_ = static_cast<aclFormat>(acl_format);
  return input;
}

at::Tensor& format_cast_like_(at::Tensor& input, const at::Tensor& other, std::optional<int64_t> customize_dtype, std::optional<int64_t> input_dtype) {
  return format_cast_(input, described(other).npu_format_, customize_dtype, input_dtype);
}

// torch_npu/_op_plugin_docs.py: npu_prefetch
void prefetch(const at::Tensor& input, const std::optional<at::Tensor>&, int64_t max_size, int64_t offset) {
  static Tally& mine = tally("npu::npu_prefetch");
  count_call(mine);
  const char* op = "npu_prefetch";
  on_device_in_any_format(op, "input", input);
  RULE("npu_prefetch.max-size", max_size > 0, op, ": max_size must be greater than 0, got ", max_size);
  const int64_t bytes = input.numel() * input.element_size();
  RULE("npu_prefetch.offset", offset >= 0 && offset < std::max<int64_t>(1, bytes), op, ": offset must lie in the tensor's ", bytes, " bytes, got ",
              offset);
}

}  // namespace

void install_format(torch::Library& npu) {
  npu.impl("npu_format_cast", TORCH_FN(format_cast));
  npu.impl("npu_format_cast.Tensor", TORCH_FN(format_cast_like));
  npu.impl("npu_format_cast_.acl_format", TORCH_FN(format_cast_));
  npu.impl("npu_format_cast_", TORCH_FN(format_cast_like_));
  npu.impl("npu_prefetch", TORCH_FN(prefetch));
}

}  // namespace ascend_sim
