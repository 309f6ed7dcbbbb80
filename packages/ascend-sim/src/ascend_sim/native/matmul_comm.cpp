// SPDX-License-Identifier: Apache-2.0
//
// Matrix products fused with a collective. They are told their group by the name of its HCCL communicator.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "chip.h"
#include "comm.h"
#include "kernels.h"

namespace ascend_sim {

at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b);  // int8_product.cpp

namespace {

using Optional = std::optional<at::Tensor>;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

bool given(const Optional& t) { return t && t->defined(); }

void check_operands(const char* op, const at::Tensor& x1, const at::Tensor& x2, const Optional& bias, c10::string_view reduce_op, int64_t turn) {
  on_device(op, "x1", x1);
  on_device_in_any_format(op, "x2", x2);
  RULE(".x2-rank", x2.dim() == 2, op, ": x2 must have 2 dimensions, got ", x2.sizes());
  RULE(".k", x1.dim() >= 2 && x1.size(-1) == x2.size(0), op, ": x1 ", x1.sizes(), " does not fit x2 ", x2.sizes());
  RULE(".x2-dtype", x1.scalar_type() == x2.scalar_type(), op, ": x1 and x2 must have one data type, got ", x1.scalar_type(), " and ",
       x2.scalar_type());
  RULE(".dtype", x1.scalar_type() == at::kChar || is_float(x1.scalar_type()), op, ": data type must be int8, float16 or bfloat16, got ",
       x1.scalar_type());
  STRICT(".dtype", x1.scalar_type() != at::kFloat, op, ": data type must be int8, float16 or bfloat16, got Float");
  STRICT(".not-empty", x1.numel() && x2.numel(), op, ": x1 and x2 must not be empty, got ", x1.sizes(), " and ", x2.sizes());
  STRICT(".x1-transposed", x1.is_contiguous(), op, ": x1 must not be transposed");
  RULE(".reduce-op", reduce_op == "sum", op, ": reduce_op must be 'sum', got '", reduce_op, "'");
  RULE(".comm-turn", turn == 0, op, ": comm_turn must be 0, got ", turn);
}

// This rank's part of the sum, [m, n] on the CPU in the type of the result, in which the parts are also sent.
at::Tensor partial(const at::Tensor& x1, const at::Tensor& x2, const Optional& bias, const Optional& x1_scale, const Optional& x2_scale,
                   at::ScalarType type) {
  at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = cpu_alias(dense(x1)).view({-1, x1.size(-1)}), w = cpu_alias(x2);
  if (x1.scalar_type() != at::kChar) {
    at::Tensor out = at::mm(x, w);
    return given(bias) ? out.add_(cpu_alias(*bias)) : out;
  }
  at::Tensor sums = int8_product(x, w);
  if (given(bias)) sums.add_(cpu_alias(*bias));
  at::Tensor out = sums.to(at::kFloat).mul_(floats(*x2_scale).view({1, -1}));
  if (given(x1_scale)) out.mul_(floats(*x1_scale).view({-1, 1}));
  return out.to(type);
}

// torch_npu/_op_plugin_docs.py: npu_mm_all_reduce_base: the sum over ranks of x1 x2 + bias (int8: times dequant_scale and pertoken_scale)
at::Tensor mm_all_reduce(const at::Tensor& x1, const at::Tensor& x2, c10::string_view hcom, c10::string_view reduce_op, const Optional& bias,
                         const Optional& antiquant_scale, const Optional& antiquant_offset, const Optional& x3, const Optional& dequant_scale,
                         const Optional& per_token, const Optional& comm_quant_1, const Optional& comm_quant_2, int64_t antiquant_group_size,
                         int64_t comm_turn, at::OptionalIntArrayRef group_sizes, std::optional<int64_t> y_dtype,
                         std::optional<int64_t> x1_dtype, std::optional<int64_t> x2_dtype, std::optional<int64_t> dequant_scale_dtype,
                         std::optional<int64_t> pertoken_scale_dtype, int64_t comm_quant_mode, std::optional<c10::string_view> comm_mode) {
  static Tally& mine = tally("npu::npu_mm_all_reduce_base");
  const char* op = "npu_mm_all_reduce_base";
  check_operands(op, x1, x2, bias, reduce_op, comm_turn);
  STRICT("npu_mm_all_reduce_base.chip", !is_a3(), op, " is for Atlas A2, and this is an Atlas A3");
  RULE("npu_mm_all_reduce_base.rank", x1.dim() <= 3, op, ": x1 must have 2 or 3 dimensions, got ", x1.dim());
  RULE("npu_mm_all_reduce_base.bias-shape", !given(bias) || (bias->dim() == 1 && bias->numel() == x2.size(1)), op, ": bias must be [", x2.size(1), "]");
  const bool plain = !given(antiquant_scale) && !given(antiquant_offset) && !given(x3) && !given(comm_quant_1) && !given(comm_quant_2) &&
                     antiquant_group_size == 0 && !group_sizes && !y_dtype && !x1_dtype && !x2_dtype && !dequant_scale_dtype &&
                     !pertoken_scale_dtype && comm_quant_mode == 0 && !comm_mode;
  TORCH_CHECK(plain, op, ": of the optional arguments only bias, dequant_scale and pertoken_scale are simulated");
  const bool quantised = x1.scalar_type() == at::kChar;
  RULE("npu_mm_all_reduce_base.scales", quantised == given(dequant_scale) && (quantised || !given(per_token)), op, ": int8 needs dequant_scale, and only int8 takes scales");
  at::ScalarType type = x1.scalar_type();
  if (quantised) {
    const int64_t n = x2.size(1), rows = x1.numel() / x1.size(-1);
    const bool one_each = dequant_scale->sizes() == at::IntArrayRef{n} || dequant_scale->sizes() == at::IntArrayRef{1, n};
    RULE("npu_mm_all_reduce_base.dequant-scale-shape", one_each || dequant_scale->sizes() == at::IntArrayRef{1}, op,
         ": dequant_scale must be [1], [", n, "] or [1, ", n, "], got ", dequant_scale->sizes());
    TORCH_CHECK(dequant_scale->scalar_type() == at::kBFloat16 || dequant_scale->scalar_type() == at::kFloat, op,
                ": dequant_scale must be bfloat16 or float32 (packed int64 ones are not simulated), got ", dequant_scale->scalar_type());
    STRICT("npu_mm_all_reduce_base.float32-scale", dequant_scale->scalar_type() == at::kBFloat16 || given(per_token), op,
           ": a float32 dequant_scale needs pertoken_scale");
    RULE("npu_mm_all_reduce_base.pertoken-scale-shape", !given(per_token) || per_token->sizes() == at::IntArrayRef{rows}, op,
         ": pertoken_scale must be [", rows, "], got ", per_token->sizes());
    STRICT("npu_mm_all_reduce_base.pertoken-scale-dtype", !given(per_token) || per_token->scalar_type() == at::kFloat, op,
           ": pertoken_scale must be float32, got ", per_token->scalar_type());
    type = dequant_scale->scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kHalf;  // npu_mm_all_reduce_base's meta function
  }
  STRICT("npu_mm_all_reduce_base.bias-dtype", !given(bias) || bias->scalar_type() == (quantised ? at::kInt : type), op, ": bias must be ",
         quantised ? at::kInt : type, ", got ", bias->scalar_type());
  STRICT("npu_mm_all_reduce_base.int8-k", !quantised || x1.size(-1) <= 65535, op, ": k must be at most 65535 with int8, got ", x1.size(-1));
  const Group group = group_named(op, hcom);
  const int64_t size = group->getSize();
  STRICT("npu_mm_all_reduce_base.ranks", size == 1 || size == 2 || size == 4 || size == 8, op, ": the group must have 1, 2, 4 or 8 ranks, got ", size);
  log_collective(op, *group);
  std::vector<at::Tensor> sum{partial(x1, x2, bias, per_token, dequant_scale, type)};
  count_call(mine, 2 * sum[0].numel() * x1.size(-1));
  count_traffic(op, *group, 2 * static_cast<int64_t>(sum[0].nbytes()) * (size - 1) / size);
  group->getBackend(c10::DeviceType::PrivateUse1)->allreduce(sum)->wait();
  auto shape = x1.sizes().vec();
  shape.back() = x2.size(1);
  return to_npu(sum[0].view(shape), x1.device());
}

// torch_npu/_op_plugin_docs.py: npu_mm_reduce_scatter_base: the same sum, of whose rows this rank gets its own world_size-th part
at::Tensor mm_reduce_scatter(const at::Tensor& x1, const at::Tensor& x2, c10::string_view hcom, int64_t world_size, c10::string_view reduce_op,
                             const Optional& bias, const Optional& x1_scale, const Optional& x2_scale, int64_t comm_turn,
                             std::optional<at::ScalarType> output_dtype, std::optional<c10::string_view> comm_mode) {
  static Tally& mine = tally("npu::npu_mm_reduce_scatter_base");
  const char* op = "npu_mm_reduce_scatter_base";
  check_operands(op, x1, x2, bias, reduce_op, comm_turn);
  RULE("npu_mm_reduce_scatter_base.rank", x1.dim() == 2, op, ": input must have 2 dimensions, got ", x1.dim());
  RULE("npu_mm_reduce_scatter_base.comm-mode", !comm_mode || *comm_mode == "aiv" || *comm_mode == "ai_cpu", op, ": comm_mode must be 'ai_cpu' or 'aiv', got '", *comm_mode, "'");
  const bool quantised = x1.scalar_type() == at::kChar, aiv = comm_mode && *comm_mode == "aiv";
  RULE("npu_mm_reduce_scatter_base.bias", !given(bias), op, ": bias is not supported");
  STRICT("npu_mm_reduce_scatter_base.ai-cpu-k", aiv || (x1.size(1) >= 256 && x1.size(1) < 65535), op, ": k must be 256 to 65534 unless comm_mode is 'aiv', got ", x1.size(1));
  RULE("npu_mm_reduce_scatter_base.scales", quantised == given(x2_scale) && (quantised || (!given(x1_scale) && !output_dtype)), op,
       ": int8 needs x2_scale, and only int8 takes scales and output_dtype");
  at::ScalarType type = x1.scalar_type();
  if (quantised) {
    STRICT("npu_mm_reduce_scatter_base.int8-comm-mode", aiv, op, ": int8 needs comm_mode 'aiv'");
    TORCH_CHECK(x2_scale->scalar_type() == at::kFloat, op, ": x2_scale must be float32 (packed int64 ones are not simulated), got ",
                x2_scale->scalar_type());
    TORCH_CHECK(x2_scale->numel() == x2.size(1) && (!given(x1_scale) || x1_scale->numel() == x1.size(0)), op, ": x2_scale must have ", x2.size(1),
                " numbers and x1_scale ", x1.size(0));
    STRICT("npu_mm_reduce_scatter_base.x2-scale-shape", x2_scale->dim() == 2 && x2_scale->size(0) == 1, op, ": x2_scale must be [1, ", x2.size(1),
           "], got ", x2_scale->sizes());
    STRICT("npu_mm_reduce_scatter_base.x1-scale-shape", !given(x1_scale) || (x1_scale->dim() == 2 && x1_scale->size(1) == 1), op,
           ": x1_scale must be [", x1.size(0), ", 1], got ", x1_scale->sizes());
    STRICT("npu_mm_reduce_scatter_base.x1-scale-dtype", !given(x1_scale) || x1_scale->scalar_type() == at::kFloat, op,
           ": x1_scale must be float32, got ", x1_scale->scalar_type());
    STRICT("npu_mm_reduce_scatter_base.x1-scale", given(x1_scale), op, ": an x2_scale of float32 needs an x1_scale of float32");
    type = output_dtype.value_or(at::kBFloat16);
    RULE("npu_mm_reduce_scatter_base.output-dtype", is_float(type), op, ": output_dtype must be bfloat16 or float16, got ", type);
    STRICT("npu_mm_reduce_scatter_base.output-dtype", type != at::kFloat, op, ": output_dtype must be bfloat16 or float16, got Float");
  }
  const Group group = group_named(op, hcom);
  const int64_t size = group->getSize();
  TORCH_CHECK(world_size == size, op, ": world_size ", world_size, " is not that of the group, ", size);
  const bool sixteen = is_a3() && comm_mode && *comm_mode == "ai_cpu";
  STRICT("npu_mm_reduce_scatter_base.ranks", size == 2 || size == 4 || size == 8 || (sixteen && size == 16), op, ": world_size must be 2, 4, 8",
         sixteen ? " or 16" : "", ", got ", size);
  RULE("npu_mm_reduce_scatter_base.rows", x1.size(0) % size == 0, op, ": the rows of input must be a multiple of world_size ", size, ", got ", x1.size(0));
  log_collective(op, *group);
  at::Tensor sum = partial(x1, x2, bias, x1_scale, x2_scale, type);
  count_call(mine, 2 * sum.numel() * x1.size(1));
  count_traffic(op, *group, static_cast<int64_t>(sum.nbytes()) * (size - 1) / size);
  at::Tensor own = at::empty({sum.size(0) / size, sum.size(1)}, sum.options()), flat_own = own.view({-1}), flat_sum = sum.view({-1});
  group->getBackend(c10::DeviceType::PrivateUse1)->_reduce_scatter_base(flat_own, flat_sum)->wait();
  return to_npu(own, x1.device());
}

}  // namespace

void install_matmul_comm(torch::Library& npu) {
  npu.impl("npu_mm_all_reduce_base", TORCH_FN(mm_all_reduce));
  npu.impl("npu_mm_reduce_scatter_base", TORCH_FN(mm_reduce_scatter));
}

}  // namespace ascend_sim
