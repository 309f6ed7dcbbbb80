// SPDX-License-Identifier: Apache-2.0
//
// Reference kernels of `npu::` operators, one file per family. What has no kernel here stays torch_npu's own and fails naming its aclnn
// function.
#include "kernels.h"

namespace ascend_sim {

void install_norm(torch::Library& npu);
void install_rotary(torch::Library& npu);
void install_activation(torch::Library& npu);
void install_cache(torch::Library& npu);
void install_attention(torch::Library& npu);
void install_sampling(torch::Library& npu);
void install_format(torch::Library& npu);
void install_moe_gating(torch::Library& npu);
void install_moe_routing(torch::Library& npu);
void install_moe_permute(torch::Library& npu);
void install_grouped_matmul(torch::Library& npu);
void install_swiglu_quant(torch::Library& npu);
void install_moe_dispatch(torch::Library& npu);
void install_moe_combine(torch::Library& npu);
void install_latent(torch::Library& npu);
void install_quant(torch::Library& npu);
void install_weight_quant(torch::Library& npu);
void install_matmul_comm(torch::Library& npu);

void install_kernels() {
  static torch::Library npu(torch::Library::IMPL, "npu", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  install_norm(npu);
  install_rotary(npu);
  install_activation(npu);
  install_cache(npu);
  install_attention(npu);
  install_sampling(npu);
  install_format(npu);
  install_moe_gating(npu);
  install_moe_routing(npu);
  install_moe_permute(npu);
  install_grouped_matmul(npu);
  install_swiglu_quant(npu);
  install_moe_dispatch(npu);
  install_moe_combine(npu);
  install_latent(npu);
  install_quant(npu);
  install_weight_quant(npu);
  install_matmul_comm(npu);
}

}  // namespace ascend_sim
