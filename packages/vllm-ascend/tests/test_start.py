# SPDX-License-Identifier: Apache-2.0
"""What is refused before worker processes start: vLLM's own configurations, of folders with nothing but a config.json."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm_ascend.attention import probe
from vllm_ascend.attention.limits import Attention, broken, check_cache, kernel_head_size, notices

DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 12, "num_key_value_heads": 3,
    "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512,
    "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 64, "num_attention_heads": 20,
    "num_key_value_heads": 20, "kv_lora_rank": 512, "q_lora_rank": 48, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA4 = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "global_head_dim": 128, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "intermediate_size": 64,
    "hidden_size_per_layer_input": 16, "vocab_size": 512, "vocab_size_per_layer_input": 512, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
ERNIE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "num_hidden_layers": 2, "moe_layer_interval": 1,
    "moe_layer_start_index": 0, "moe_layer_end_index": 1, "use_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
HYBRID = {
    "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "torch_dtype": "bfloat16",
}  # fmt: skip
SHORT_CONVOLUTIONS = {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "vocab_size": 512, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 2, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "vocab_size": 512,
    "max_position_embeddings": 256, "torch_dtype": "bfloat16", "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
W4A16 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False},
        },
    },
}  # fmt: skip


def compressed(base=COMPRESSED, **changes):
    """COMPRESSED, or another, with other weights or activations."""
    (group,) = base["config_groups"].values()
    return base | {
        "config_groups": {"group_0": group | {name: group[name] | changed for name, changed in changes.items()}}
    }


ENCODER = {  # heads of 40, which are filled up to 64
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 480, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 40,
    "position_embedding_type": "absolute", "pad_token_id": 0,
}  # fmt: skip
MODERN = {
    "architectures": ["ModernBertModel"], "model_type": "modernbert", "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512, "head_dim": 64,
    "global_attn_every_n_layers": 2, "local_attention": 16, "pad_token_id": 0,
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
OWN = {"method": "draft_model", "model": "ITSELF", "num_speculative_tokens": 2}  # the folder of the model at hand
GRANITE = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "shared_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "vocab_size": 512, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
EXAMPLE = {
    "kv_connector": "ExampleConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"shared_storage_path": "/tmp"},
}
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20},
}
WHOLE_PROMPTS = {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096, "enable_prefix_caching": False}
# What differs from DENSE; arguments of vLLM; the environment; what the one finding has.
ALONE = {
    "float8 cache": ({}, {"kv_cache_dtype": "fp8"}, {}, "kv_cache_dtype ('fp8') must be 'auto' or the model's dtype, 'bfloat16'"),
    "int8 cache": ({}, {"kv_cache_dtype": "int8_per_token_head"}, {}, "kv_cache_dtype ('int8_per_token_head') must be"),
    "float16 cache": ({}, {"kv_cache_dtype": "float16"}, {}, "kv_cache_dtype ('float16') must be"),
    "block": ({}, {"block_size": 8}, {}, "block_size (8) must be one of 128, 256, 384, 512; 128 is the default"),
    "small block": ({}, {"block_size": 16}, {}, "block_size (16) must be one of 128, 256"),
    "uneven block": ({}, {"block_size": 192}, {}, "block_size (192) must be one of 128, 256"),
    "large block": ({}, {"block_size": 1024}, {}, "block_size (1024) must be one of 128, 256"),
    "float16": ({}, {"dtype": "float16"}, {}, "dtype ('float16') is not one that the NPU's attention kernels take; give --dtype bfloat16"),
    "tokens": ({}, {"max_num_batched_tokens": 65537}, {}, "max_num_batched_tokens (65537) must be at most 65536"),
    "requests": ({**LATENT, "num_attention_heads": 16}, {"max_num_seqs": 4097, "max_num_batched_tokens": 8192}, {}, "max_num_seqs (4097) must be at most 4096"),
    "query heads": ({"num_attention_heads": 65, "num_key_value_heads": 1}, {}, {}, "65 attention heads for each key and value head; the kernel takes at most 64"),
    "sinks and a cap": ({"add_swa_attention_sink_bias": True, "attn_logit_softcapping": 50.0}, {}, {}, "no attention kernel for attention sinks beside a soft cap on attention logits (attn_logit_softcapping 50.0)"),
    "heads with sinks": ({"add_swa_attention_sink_bias": True, "head_dim": 136}, {}, {}, "the model's heads are 136 wide: the kernel takes at most 128"),
    "sinks of latents": ({**LATENT, "num_attention_heads": 16, "attention_sinks": True}, {}, {}, "no attention kernel for attention sinks of encoders and of multi-head latent attention (attention_sinks)"),
    "a capped encoder": ({**ENCODER, "attn_logit_softcapping": 50.0}, {}, {}, "no attention kernel for a soft cap on attention logits"),
    "sparse": ({"index_topk": 2048}, {}, {}, "no attention kernel for sparse attention (index_topk 2048)"),
    "heads of two sizes with sinks": ({**GEMMA4, "attention_sinks": True}, {}, {}, "layers whose heads of keys and values differ (2 of 64, 2 of 128) beside attention sinks"),
    "heads whose blocks differ": ({**GEMMA4, "head_dim": 192, "global_head_dim": 256}, {}, {}, "differ (2 of 192, 2 of 256), and a token's keys have 384, 512 numbers on each of 1 ranks: the smaller numbers must divide the largest one"),
    "heads of two sizes over a connector": (GEMMA4, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with a model whose layers differ in their heads"),
    "wide heads with a window": ({**GEMMA4, "head_dim": 512, "global_head_dim": 256}, {}, {}, "the model has layers with a sliding window and heads 512 wide: the kernel has a window for heads of at most 256"),
    "wide heads, many": ({"head_dim": 512, "num_attention_heads": 128, "num_key_value_heads": 2}, {}, {}, "the queries of a token have 65536 numbers on each rank; the kernel takes at most 65534 of heads so wide"),
    "dynamic rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, {"max_model_len": 512}, {}, "max_model_len (512) must be at most max_position_embeddings (256)"),
    "KV heads": ({}, {"tensor_parallel_size": 2}, {}, "tensor_parallel_size (2) must divide the model's 3 key and value heads, or be a multiple"),
    "head size": ({"head_dim": 520}, {}, {}, "the model's heads are 520 wide: the kernel takes at most 512"),
    "MLA pieces": ({**LATENT, "num_attention_heads": 16, "v_head_dim": 256}, {"max_num_batched_tokens": 65536, "max_num_seqs": 96}, {}, "max_num_batched_tokens (65536) must be at most 64000 with max_num_seqs (96)"),
    "stages of a Granite with experts": (GRANITE, {"pipeline_parallel_size": 2}, {}, "pipeline_parallel_size (2) must be 1 with GraniteMoeHybridForCausalLM that has experts"),
    "stages of a Gemma 4": (GEMMA4, {"pipeline_parallel_size": 2}, {}, "pipeline_parallel_size (2) must be 1 with Gemma4ForCausalLM that has embeddings for each layer (hidden_size_per_layer_input 16)"),
    "stages of keys that layers share": ({**GEMMA4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1}, {"pipeline_parallel_size": 2}, {}, "Gemma4ForCausalLM whose last layers read the keys of earlier ones (num_kv_shared_layers 1)"),
    "stages of a MiniCPM": ({**LATENT, "architectures": ["MiniCPM3ForCausalLM"], "model_type": "minicpm3", "num_attention_heads": 16, "num_key_value_heads": 16, "scale_emb": 1, "scale_depth": 1.0, "dim_model_base": 64}, {"pipeline_parallel_size": 2}, {}, "MiniCPM3ForCausalLM: vLLM 0.32.0 hands on a residual"),
    "stages of an Ernie whose embedding is tied": ({**ERNIE, "tie_word_embeddings": True}, {"pipeline_parallel_size": 2}, {}, "Ernie4_5_MoeForCausalLM whose embedding is its LM head (tie_word_embeddings)"),
    "stages without a plan": ({"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "n_inner": 64}, {"pipeline_parallel_size": 2}, {}, "GPTBigCodeForCausalLM of the Transformers backend, for which transformers has no plan of stages"),
    "a stage without experts": ({**ERNIE, "moe_layer_start_index": 1}, {"pipeline_parallel_size": 2}, {}, "Ernie4_5_MoeForCausalLM: stage 0 would have layers 0 to 0, none of them with experts"),
    "decode context": ({"num_key_value_heads": 1}, {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, {}, "decode_context_parallel_size (2) must be 1"),
    "offloaded cache beyond the host's memory": ({}, {"kv_offloading_size": 1 << 20}, {}, "kv_offloading_size (1048576.0) asks for 1048576.0 GiB of this host's memory, for 1 data parallel replicas on it, and it has "),
    "offloaded cache without a size": ({}, {"kv_transfer_config": OFFLOADING | {"kv_connector_extra_config": {}}}, {}, "kv_transfer_config (connector 'OffloadingConnector') needs the bytes of host memory that it may take: kv_connector_extra_config.cpu_bytes_to_use (None)"),
    "offloaded cache over stages": ({}, {"pipeline_parallel_size": 2, "kv_offloading_size": 0.01}, {}, "kv_offloading_size (0.01) cannot be used with pipeline_parallel_size (2)"),
    "offloaded cache and states": (HYBRID, {"kv_offloading_size": 0.01}, {}, "kv_offloading_size (0.01) cannot be used with FalconH1ForCausalLM"),
    "offloaded cache and sleep": ({}, {"enable_sleep_mode": True, "kv_offloading_size": 0.01}, {}, "kv_offloading_size (0.01) cannot be used with enable_sleep_mode"),
    "offloaded cache in tiers": ({}, {"kv_transfer_config": OFFLOADING | {"kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20, "spec_name": "TieringOffloadingSpec"}}}, {}, "kv_connector_extra_config.spec_name ('TieringOffloadingSpec'): its copies are CUDA's"),
    "offloaded cache in another form": ({}, {"kv_transfer_config": OFFLOADING | {"kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20, "canonical_layout": True}}}, {}, "kv_connector_extra_config.canonical_layout (True)"),
    "offloaded cache beside a connector": ({}, {"kv_transfer_config": {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [OFFLOADING]}}}, {}, "kv_transfer_config (connector 'OffloadingConnector') cannot be used within a MultiConnector"),
    "offloaded cache in a connector's place": ({}, {**WHOLE_PROMPTS, "kv_offloading_size": 0.01, "kv_transfer_config": EXAMPLE}, {}, "kv_offloading_size (0.01) cannot be used with kv_transfer_config (connector 'ExampleConnector'), whose place vLLM gives to OffloadingConnector"),
    "simply offloaded cache by its size": ({}, {"kv_offloading_size": 0.01}, {"VLLM_USE_SIMPLE_KV_OFFLOAD": "1"}, "kv_transfer_config (connector 'SimpleCPUOffloadConnector') cannot be used on an NPU"),
    "NIXL over stages": ({}, {"pipeline_parallel_size": 2, "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}}, {}, "kv_transfer_config (connector 'NixlConnector') cannot be used with pipeline_parallel_size (2)"),
    "simply offloaded cache": ({}, {"kv_transfer_config": {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [{"kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20}}]}}}, {}, "kv_transfer_config (connector 'SimpleCPUOffloadConnector') cannot be used on an NPU"),
    "example of a connector beside cached prefixes": ({}, {**WHOLE_PROMPTS, "enable_prefix_caching": True, "kv_transfer_config": EXAMPLE}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with enable_prefix_caching (True)"),
    "example of a connector": ({}, {"enable_prefix_caching": False, "kv_transfer_config": EXAMPLE}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with enable_chunked_prefill (True)"),
    "example of a connector over ranks": ({"num_key_value_heads": 2}, {**WHOLE_PROMPTS, "tensor_parallel_size": 2, "kv_transfer_config": EXAMPLE}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with tensor_parallel_size (2): vLLM's example stores the keys and values of all ranks under one name"),
    "example of a connector and adapters": ({}, {**WHOLE_PROMPTS, "enable_lora": True, "kv_transfer_config": EXAMPLE}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with LoRA adapters (--enable-lora): vLLM's example finds what it stored by the tokens of a prompt"),
    "profiler": ({}, {"profiler_config": {"profiler": "cuda"}}, {}, "profiler_config.profiler ('cuda') must be 'torch' on an NPU"),
    "what is profiled": ({}, {"profiler_config": {"profiler": "torch", "torch_profiler_dir": "/tmp", "torch_profiler_activities": ["CPU", "CUDA"]}}, {}, "profiler_config.torch_profiler_activities (['CPU', 'CUDA']) must be ['CPU'] on an NPU"),
    "prefill context": ({}, {"prefill_context_parallel_size": 2}, {}, "prefill_context_parallel_size (2) must be 1"),
    "backend": ({}, {"attention_backend": "FLASH_ATTN"}, {}, "attention_config.backend ('FLASH_ATTN') is not a backend of vllm-ascend for this model; leave it out, or give 'ASCEND_ATTN'"),
    "backend of MLA": ({}, {"attention_backend": "ASCEND_MLA"}, {}, "('ASCEND_MLA') is not a backend of vllm-ascend for this model"),
    "backend of a kind": ({}, {"attention_config": {"backend_per_kind": {"sliding_window": "TRITON_ATTN"}}}, {}, "backend_per_kind['sliding_window'] ('TRITON_ATTN')"),
    "drafting method": ({}, {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, {}, "speculative_config.method ('ngram_gpu') is not served by vllm-ascend, which has 'draft_model', 'eagle', 'eagle3', 'medusa', 'mtp', 'ngram', 'suffix'"),
    "many drafts": ({}, {"speculative_config": NGRAM | {"num_speculative_tokens": 129}}, {}, "speculative_config.num_speculative_tokens (129) must be at most 128"),
    "block rejection": ({}, {"speculative_config": NGRAM | {"rejection_sample_method": "block"}}, {}, "speculative_config.rejection_sample_method ('block') must be 'standard' or 'synthetic'"),
    "drafts and states": (HYBRID, {"block_size": 256, "speculative_config": NGRAM}, {}, "speculative decoding (method 'ngram') cannot be used with models with a recurrent state; leave --speculative-config out, or that"),
    "drafts and embeddings": ({}, {"enable_prompt_embeds": True, "speculative_config": NGRAM}, {}, "cannot be used with prompt embeddings (enable_prompt_embeds)"),
    "drafts and stages": ({}, {"pipeline_parallel_size": 2, "speculative_config": OWN}, {}, "pipeline_parallel_size (2) must be 1 with speculative decoding (method 'draft_model'); leave --speculative-config out, or raise tensor_parallel_size instead"),
    "drafts and options": ({}, {"additional_config": {"weight_prefetch_config": {"enabled": True}}, "speculative_config": OWN}, {}, "speculative decoding (method 'draft_model') cannot be used with options of additional_config (weight_prefetch_config); leave --speculative-config out, or that"),
    "drafts over both": (MOE, {"tensor_parallel_size": 2, "data_parallel_size": 2, "speculative_config": OWN | {"draft_tensor_parallel_size": 2}}, {}, "('draft_model') needs tensor_parallel_size (2) or data_parallel_size (2) to be 1"),
    "LoRA and an option": ({"num_key_value_heads": 12}, {"enable_lora": True, "tensor_parallel_size": 2, "additional_config": {"enable_matmul_allreduce": True}}, {}, "option 'enable_matmul_allreduce' (True) cannot be used with LoRA adapters: vLLM's LoRA layers call a layer's product themselves"),
    "LoRA and prefetch": ({}, {"enable_lora": True, "additional_config": {"weight_prefetch_config": {"enabled": True}}}, {}, "option 'weight_prefetch_config' ("),
    "LoRA of latents": ({**LATENT, "num_attention_heads": 16}, {"enable_lora": True, "lora_target_modules": ["o_proj"]}, {}, "LoRA adapters (--enable-lora) cannot be used with multi-head latent attention: its kernels read the weight of kv_b_proj without its adapter; leave --enable-lora out"),
    "LoRA of poolers": ({}, {"enable_lora": True, "runner": "pooling"}, {}, "LoRA adapters (--enable-lora) cannot be used with a pooling model: no test has shown it to be right; leave --enable-lora out"),
    "LoRA of states": (HYBRID, {"enable_lora": True, "dtype": "bfloat16"}, {}, "LoRA adapters (--enable-lora) cannot be used with a model with a recurrent state"),
    "LoRA of embedded prompts": ({}, {"enable_lora": True, "enable_prompt_embeds": True}, {}, "LoRA adapters (--enable-lora) cannot be used with enable_prompt_embeds (True)"),
    "LoRA of experts": (MOE, {"enable_lora": True}, {}, "LoRA adapters (--enable-lora) cannot be used with adapters of routed experts"),
    "sleep of experts that move": (MOE, {"enable_sleep_mode": True, "tensor_parallel_size": 2, "enable_expert_parallel": True, "additional_config": {"eplb_config": {"dynamic_eplb": True}}}, {}, "option 'eplb_config.dynamic_eplb' (True) cannot be used with enable_sleep_mode"),
    "weights from a trainer over NCCL": ({}, {"weight_transfer_config": {"backend": "nccl"}}, {}, "weight_transfer_config.backend ('nccl') needs CUDA; give 'hccl'"),
    "weights from a trainer and experts that move": (MOE, {"weight_transfer_config": {"backend": "hccl"}, "tensor_parallel_size": 2, "enable_expert_parallel": True, "additional_config": {"eplb_config": {"dynamic_eplb": True}}}, {}, "option 'eplb_config.dynamic_eplb' (True) cannot be used with weight_transfer_config"),
    "weights from a trainer and layer sharding": (MOE, {"weight_transfer_config": {"backend": "hccl"}, "tensor_parallel_size": 4, "additional_config": {"flashcomm2_parallel_size": 2, "layer_sharding": ["o_proj"]}}, {}, "option 'layer_sharding' (['o_proj']) cannot be used with weight_transfer_config"),
    "sleep of NCCL": ({}, {"enable_sleep_mode": True, "enable_nccl_comm_suspend": True}, {}, "enable_nccl_comm_suspend (True) is for NCCL"),
    "vLLM's balancing": ({**MOE}, {"eplb_config": {"step_interval": 100, "window_size": 250}}, {}, "--eplb-config.window_size (250), --eplb-config.step_interval (100): vLLM's own balancing of experts does not run on this platform; give its counterpart, --additional-config '{\"eplb_config\": {\"dynamic_eplb\": true, \"expert_heat_collection_interval\": 100, \"load_window\": 2, \"load_weighting\": \"mean\"}}'"),
    "float8 weights": ({}, {"quantization": "fp8"}, {}, "quantization ('fp8') has no kernels in vllm-ascend, which serves ModelSlim's W8A8"),
    "GPTQ in odd groups": ({"quantization_config": GPTQ | {"group_size": 48}}, {"dtype": "bfloat16"}, {}, "quantization ('auto_gptq') with groups of 48 has no kernels in vllm-ascend"),
    "GPTQ of some layers in odd groups": ({"quantization_config": GPTQ | {"dynamic": {"+:.*down.*": {"group_size": 16}}}}, {"dtype": "bfloat16"}, {}, "quantization ('auto_gptq') with groups of 16 has no kernels"),
    "GPTQ's LM head": ({"quantization_config": GPTQ | {"lm_head": True}}, {"dtype": "bfloat16"}, {}, "quantization ('auto_gptq') with a quantised LM head (lm_head) has no kernels"),
    "GPTQ and an option": ({"quantization_config": GPTQ, "num_key_value_heads": 12}, {"dtype": "bfloat16", "tensor_parallel_size": 2, "additional_config": {"enable_matmul_allreduce": True}}, {}, "option 'enable_matmul_allreduce' (True) cannot be used with quantization ('auto_gptq')"),
    "compressed 3 bits": ({"quantization_config": compressed(W4A16, weights={"num_bits": 3})}, {"dtype": "bfloat16"}, {}, "with int3 weights and unquantised activations (target 'Linear') has no kernels"),
    "int8 experts": (MOE, {"quantization": "experts_int8"}, {}, "quantization ('experts_int8') has no kernels"),
    "int8 experts of a dense model": ({}, {"quantization": "experts_int8"}, {}, "quantization ('experts_int8') has no kernels"),
    "int8 weights": ({}, {"quantization": "int8_per_channel_weight_only"}, {}, "quantization ('int8_per_channel_weight_only') has no kernels"),
    "mxfp8": ({}, {"quantization": "mxfp8"}, {}, "quantization ('mxfp8') has no kernels"),
    "compressed experts": ({**MOE, "quantization_config": COMPRESSED}, {"dtype": "bfloat16"}, {}, "quantization ('compressed-tensors') with routed experts has no kernels in vllm-ascend"),
    "compressed int4 weights": ({"quantization_config": compressed(weights={"num_bits": 4, "strategy": "group", "group_size": 128})}, {"dtype": "bfloat16"}, {}, "quantization ('compressed-tensors') with int4 weights and int8 activations (target 'Linear') has no kernels"),
    "compressed activations with a zero point": ({"quantization_config": compressed(input_activations={"symmetric": False})}, {"dtype": "bfloat16"}, {}, "activations static for each tensor, or dynamic and symmetric for each token"),
    "compressed in float8": ({"quantization_config": compressed(weights={"type": "float"}, input_activations={"type": "float"})}, {"dtype": "bfloat16"}, {}, "with float8 weights and float8 activations (target 'Linear') has no kernels"),
    "compressed and an option": ({"quantization_config": COMPRESSED, "num_key_value_heads": 12}, {"dtype": "bfloat16", "tensor_parallel_size": 2, "additional_config": {"enable_matmul_allreduce": True}}, {}, "option 'enable_matmul_allreduce' (True) cannot be used with quantization ('compressed-tensors')"),
    "GPT-OSS as it is published": ({**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}, {"dtype": "bfloat16"}, {}, "mxfp4') has no kernels"),
    "AWQ of experts": ({**MOE, "quantization_config": AWQ}, {"dtype": "bfloat16"}, {}, "quantization ('auto_awq') with routed experts has no kernels in vllm-ascend"),
    "AWQ without zero points": ({"quantization_config": AWQ | {"zero_point": False}}, {"dtype": "bfloat16"}, {}, "quantization ('auto_awq') with symmetric weights of AWQ (zero_point False) has no kernels"),
    "offload": ({}, {"cpu_offload_gb": 1}, {}, "cpu_offload_gb (1.0) needs a view of host memory"),
    "devices": ({"num_key_value_heads": 12}, {"tensor_parallel_size": 4, "data_parallel_size": 3}, {}, "12 NPUs are needed on this host, for 3 data parallel replicas of 4 ranks, and 8 are visible"),
    "V2 runner": ({}, {}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "VLLM_USE_V2_MODEL_RUNNER=1: vllm-ascend serves vLLM's V1 model runner only"),
    "old variable": ({}, {}, {"VLLM_ASCEND_ENABLE_NZ": "2"}, "environment variable VLLM_ASCEND_ENABLE_NZ belongs to the public plugin"),
    "buffer size": ({}, {}, {"HCCL_BUFFSIZE": "lots"}, "environment variable HCCL_BUFFSIZE='lots': must be a whole number of MB above 0"),
    "option": ({}, {"additional_config": {"enable_flashcomm1": True}}, {}, "option 'enable_flashcomm1' (True) needs tensor_parallel_size > 1, got 1"),
    "encoder's head size": ({**ENCODER, "hidden_size": 12 * 264, "head_dim": 264}, {}, {}, "the model's heads are 264 wide: the kernel takes at most 256"),
    "embedding that is not split": ({**ENCODER, "architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}, {"tensor_parallel_size": 2}, {}, "tensor_parallel_size (2) must be 1 for BertForMaskedLM whose embedding is its last layer"),
    "encoder that is not split": (MODERN, {"tensor_parallel_size": 2}, {}, "tensor_parallel_size (2) must be 1 for ModernBertModel"),
    "MLA heads": (LATENT, {}, {}, "multi-head latent attention with 20 heads over tensor_parallel_size 1: the NPU's kernel takes 1, 2, 4,"),
    "MLA rank": ({**LATENT, "num_attention_heads": 16, "kv_lora_rank": 256}, {}, {}, "kv_lora_rank of this model is 256: the NPU's kernel for multi-head latent attention takes 512 only"),
    "MLA connector": ({**LATENT, "num_attention_heads": 16}, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with multi-head latent attention"),
    "short convolutions": (SHORT_CONVOLUTIONS, {}, {}, "Lfm2ForCausalLM has layers of linear attention or a state space of a kind that vllm-ascend does not compute; it serves those of MambaForCausalLM"),
    "states over a connector": (HYBRID, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, {}, "kv_transfer_config (connector 'ExampleConnector') cannot be used with FalconH1ForCausalLM"),
    "states over ranks by tokens": (HYBRID, {"tensor_parallel_size": 2, "additional_config": {"enable_flashcomm1": True}}, {}, "option 'enable_flashcomm1' (True) cannot be used with FalconH1ForCausalLM: its layers of Mamba2 take all tokens on every rank"),
    "top k": ({**MOE, "num_experts_per_tok": 5}, {}, {}, "the model's config asks for 5 experts a token, and its MoE layers have 4"),
    "slots": (MOE, {"tensor_parallel_size": 4, "enable_expert_parallel": True, "additional_config": {"eplb_config": {"num_redundant_experts": 1}}}, {}, "option 'eplb_config.num_redundant_experts' (1)"),
}  # fmt: skip
GOOD = {
    "as it is": ({}, {}, {}),
    "GPTQ": ({"quantization_config": GPTQ}, {"dtype": "bfloat16"}, {}),
    "AWQ": ({"quantization_config": AWQ}, {"dtype": "bfloat16"}, {}),
    "W4A16": ({"quantization_config": W4A16}, {"dtype": "bfloat16"}, {}),
    "stages of an Ernie": (ERNIE, {"pipeline_parallel_size": 2}, {}),
    "stages of a Gemma 4 without what they lack": ({**GEMMA4, "hidden_size_per_layer_input": 0}, {"pipeline_parallel_size": 2}, {}),
    "heads of two sizes": (GEMMA4, {}, {}),
    "heads of two sizes with a cap": ({**GEMMA4, "attn_logit_softcapping": 50.0}, {}, {}),
    "heads of 512": ({"head_dim": 512}, {}, {}),
    "LoRA": ({}, {"enable_lora": True, "additional_config": {"weight_nz_mode": 0}}, {}),
    "LoRA beside experts": (MOE, {"enable_lora": True, "lora_target_modules": ["q_proj", "o_proj"]}, {}),
    "torch's profiler": ({}, {"profiler_config": {"profiler": "torch", "torch_profiler_dir": "/tmp"}}, {}),
    "example of whole prompts": ({}, {**WHOLE_PROMPTS, "kv_transfer_config": EXAMPLE}, {}),
    "offloaded cache": ({}, {"kv_offloading_size": 0.01}, {}),
    "offloaded latents": ({**LATENT, "num_attention_heads": 16}, {"kv_transfer_config": OFFLOADING, "tensor_parallel_size": 2}, {}),
    "NIXL": ({}, {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}}, {}),
    "sleep": ({}, {"enable_sleep_mode": True}, {}),
    "LoRA of int8 weights": ({"quantization_config": COMPRESSED}, {"enable_lora": True, "dtype": "bfloat16"}, {}),
    "weights from a trainer": ({}, {"weight_transfer_config": {"backend": "hccl"}}, {}),
    "compressed-tensors": ({"quantization_config": COMPRESSED}, {"dtype": "bfloat16"}, {}),
    "compressed-tensors, static": ({"quantization_config": compressed(input_activations={"dynamic": False, "strategy": "tensor", "symmetric": False})}, {"dtype": "bfloat16"}, {}),
    "soft cap": ({"attn_logit_softcapping": 50.0}, {}, {}),
    "ALiBi": ({"alibi": True}, {}, {}),
    "sinks": ({"add_swa_attention_sink_bias": True}, {}, {}),
    "GPT-OSS": (GPT_OSS, {"tensor_parallel_size": 2, "enable_expert_parallel": True}, {}),
    "its own cache": ({}, {"kv_cache_dtype": "bfloat16", "block_size": 512, "attention_backend": "ASCEND_ATTN"}, {}),
    "padded heads": ({"head_dim": 24}, {"block_size": 384}, {}),
    "a checkpoint in float16": ({"torch_dtype": "float16"}, {}, {}),
    "heads over ranks": ({"num_attention_heads": 128, "num_key_value_heads": 1}, {"tensor_parallel_size": 2}, {}),
    "MLA prompts": ({**LATENT, "num_attention_heads": 16}, {"max_num_batched_tokens": 65536, "max_num_seqs": 96}, {}),
    "replicated KV heads": ({"num_key_value_heads": 2}, {"tensor_parallel_size": 4}, {}),
    "encoder": (ENCODER, {"attention_backend": "ASCEND_ATTN", "tensor_parallel_size": 2}, {}),
    "ModernBERT on one rank": (MODERN, {}, {}),
    "automatic backend": ({}, {"attention_backend": "auto"}, {}),
    "MLA": ({**LATENT, "num_attention_heads": 16}, {"attention_backend": "ASCEND_MLA", "block_size": 1024, "tensor_parallel_size": 2}, {}),
    "copied weights": ({}, {"cpu_offload_gb": 1}, {"VLLM_WEIGHT_OFFLOADING_DISABLE_UVA": "1"}),
    "experts": (MOE, {"tensor_parallel_size": 2, "enable_expert_parallel": True}, {}),
    "n-grams": ({"num_key_value_heads": 2}, {"speculative_config": NGRAM, "tensor_parallel_size": 2}, {}),
    "a draft model": ({}, {"speculative_config": OWN}, {}),
    "states beside attention": (HYBRID, {"block_size": 256, "tensor_parallel_size": 2}, {}),
}  # fmt: skip
EXPERTS = (MOE, {"tensor_parallel_size": 2, "enable_expert_parallel": True})
ELSEWHERE = {  # the name of another host's chip, and what the one finding has
    "small buffers": (MOE, EXPERTS[1] | {"max_num_seqs": 512}, {"HCCL_BUFFSIZE": "1"}, "Ascend910_9391", "environment variable HCCL_BUFFSIZE (1 MB) must be"),
    "unknown chip": (*EXPERTS, {}, "Ascend1", "experts over 2 ranks (enable_expert_parallel): device_name='Ascend1'"),
    "fused all-reduce": ({}, {"additional_config": {"enable_matmul_allreduce": True}}, {}, "Ascend910_9391", "option 'enable_matmul_allreduce' (True) needs an Atlas A2, on which its kernel (npu_mm_all_reduce_base) runs"),
    "310P": ({}, {}, {}, "Ascend310P3", "this host's chip, Ascend310P3, is of the family Atlas 300I (310P), which vllm-ascend does not support"),
    "950": ({}, {}, {}, "Ascend950PR", "this host's chip, Ascend950PR, is of the family Atlas A5 (950)"),
}  # fmt: skip
FIVE = {
    "kv_cache_dtype": "fp8",
    "block_size": 8,
    "attention_backend": "FLASH_ATTN",
    "profiler_config": {"profiler": "cuda"},
    "additional_config": {"nope": 1},
}
PROCESSES = 2
RUN = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.config import set_current_vllm_config
from vllm_ascend import start
from vllm_ascend.worker import AscendWorker

kept = dict(os.environ)
for name, (folder, arguments, env, chip) in json.load(open(sys.argv[1])).items():
    os.environ.update(env)
    try:
        config = EngineArgs(model=folder, skip_tokenizer_init=True, **arguments).create_engine_config()
        if chip == "worker":
            with set_current_vllm_config(config):
                AscendWorker(config, 0, 0, "tcp://127.0.0.1:1").init_device()
        elif chip:
            start.check(config, start.Host(devices=8, chip=chip))
        said = ""
    except ValueError as error:
        said = str(error)
    os.environ.clear()
    os.environ.update(kept)
    print("answer", json.dumps([name, said]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What vLLM says to each configuration, "" where it is taken; in two processes, which start no other."""
    root = tmp_path_factory.mktemp("configs")
    jobs = {}
    cases = {name: (*case[:3], "") for name, case in (*ALONE.items(), *GOOD.items())}
    cases |= {name: case[:4] for name, case in ELSEWHERE.items()} | {"five": ({}, FIVE, {}, "")}
    cases["float32"] = ({}, {"dtype": "float32"}, {}, "worker")
    for number, (name, (config, arguments, env, chip)) in enumerate(cases.items()):
        folder = root / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config if "architectures" in config else DENSE | config))
        arguments = json.loads(json.dumps(arguments).replace("ITSELF", str(folder)))
        jobs[name] = (str(folder), arguments, env, chip)
    (root / "run.py").write_text(RUN)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

    def ask(number):
        share = root / f"jobs{number}.json"
        share.write_text(json.dumps(dict(list(jobs.items())[number::PROCESSES])))
        command = [sys.executable, str(root / "run.py"), str(share)]
        return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env, check=False)

    with ThreadPoolExecutor(PROCESSES) as pool:
        done = list(pool.map(ask, range(PROCESSES)))
    lines = [line for one in done for line in one.stdout.splitlines() if line.startswith("answer ")]
    found = dict(json.loads(line.partition(" ")[2]) for line in lines)
    assert set(found) == set(jobs), [one.stderr[-4000:] for one in done]
    return found


@pytest.mark.parametrize("name", [*ALONE, *ELSEWHERE])
def test_each_fault_is_found_before_workers_start(answers, name):
    assert (ALONE | ELSEWHERE)[name][-1] in answers[name]
    assert "things are wrong" not in answers[name]


def test_a_worker_asks_the_kernels_before_it_loads_the_model(answers):
    """On the simulated NPU in its strict mode, as on hardware, they take no float32."""
    assert (
        "an attention kernel of this NPU does not take the model: dtype float32, 12 heads and 3 of"
        in answers["float32"]
    )


@pytest.mark.parametrize("name", GOOD)
def test_what_is_supported_is_taken(answers, name):
    assert answers[name] == ""


def test_five_faults_are_one_error(answers):
    lines = answers["five"].splitlines()
    first = next(index for index, line in enumerate(lines) if "5 things are wrong with this configuration:" in line)
    for number, name in enumerate(("'nope'", "profiler_config", "FLASH_ATTN", "'fp8'", "block_size (8)"), 1):
        assert lines[first + number].startswith(f"{number}. ")
        assert name in lines[first + number]


def of(config=(), **model):
    """`Attention.of` a model about which vLLM says what is given."""
    text = SimpleNamespace(**dict(config))
    known = {
        "uses_alibi": False, "is_mm_prefix_lm": False, "is_encoder_decoder": False, "use_mla": False, "dtype": "torch.bfloat16", "attn_type": "decoder",
        "architectures": ["SomeModel"], "get_head_size": lambda: 64, "get_total_num_kv_heads": lambda: 4,
        "model_arch_config": SimpleNamespace(total_num_attention_heads=8),
    }  # fmt: skip
    return Attention.of(
        SimpleNamespace(
            model_config=SimpleNamespace(hf_text_config=text, **{**known, **model}),
            cache_config=SimpleNamespace(cache_dtype="auto", user_specified_block_size=False, block_size=16),
            parallel_config=SimpleNamespace(tensor_parallel_size=2),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=64),
        )
    )


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (
            {},
            {"architectures": ["GptOssForCausalLM"], "uses_alibi": True},
            "attention sinks beside ALiBi position biases (GptOssForCausalLM)",
        ),
        ({}, {"architectures": ["Step1ForCausalLM"]}, "ALiBi with roots of distances (Step1ForCausalLM)"),
        ({"head_dim": 64, "v_head_dim": 128}, {}, "of keys (64 wide) and of values (128) must be of one size"),
    ],
)
def test_what_a_model_needs_and_no_kernel_has(config, model, message):
    (found,) = broken(of(config, **model))
    assert message in found


def test_limits_of_the_kernels():
    fits = of({"v_head_dim": 128, "kv_lora_rank": 512})  # latent attention that vLLM runs in its plain form
    assert list(broken(fits)) == []
    assert list(broken(replace(fits, heads=0))) == []
    for change, message in (
        ({"heads": 9}, "tensor_parallel_size (2) must divide the model's 9 attention heads"),
        ({"heads": 10}, "10 attention heads must be a multiple of its 4"),
        ({"heads": 520}, "130 attention heads for each key and value head; the kernel takes at most 64"),
        ({"heads": 1024, "kv_heads": 1024}, "512 attention heads a rank; the kernel takes at most 256"),
        ({"head_size": 1024, "value_size": 1024}, "1024 wide"),
        (
            {"heads": 512, "kv_heads": 512, "head_size": 256, "value_size": 256},
            "have 65536 numbers on each rank; the kernel takes at most 65535",
        ),
        ({"dtype": "float16"}, "--dtype bfloat16"),
        ({"latent": (512, 32)}, "qk_rope_head_dim of this model is 32"),
        ({"latent": (512, 64), "heads": 9}, "with 9 heads over tensor_parallel_size 2"),
        ({"chunk": 192}, "attention_chunk_size of this model (192) must be a multiple of block_size (128)"),
        ({"latent": (512, 64), "block_size": 24}, "block_size (24) must be a multiple of 128"),
    ):
        assert any(message in found for found in broken(replace(fits, **change))), message
    assert list(broken(replace(fits, latent=(512, 64), block_size=1024))) == []
    assert list(broken(replace(fits, heads=128, kv_heads=1))) == []  # 64 query heads on each rank


def test_a_cache_of_more_numbers_than_the_kernel_counts():
    check_cache(2**31 // 1024 - 1, 128, 8)
    with pytest.raises(ValueError, match="give --num-gpu-blocks-override 2097151 or less"):
        check_cache(2**31 // 1024, 128, 8)


@pytest.mark.parametrize(
    ("size", "padded"), [(40, 64), (64, 64), (72, 128), (80, 128), (112, 128), (160, 192), (200, 256)]
)
def test_heads_are_padded_to_the_next_size(size, padded):
    assert kernel_head_size(size) == padded
    said = list(notices(of(get_head_size=lambda: size)))
    assert [padded == 256] * len(said) == [True] * (padded == 256)


GROUPED = Attention(heads=8, kv_heads=4, head_size=64, value_size=64, ranks=2)
ENCODING = replace(GROUPED, cached=False, head_size=24, value_size=24)
ABSORBED = Attention(heads=8, kv_heads=8, head_size=576, value_size=576, latent=(512, 64), ranks=2)


@pytest.mark.parametrize(
    "attention",
    [
        GROUPED,
        ABSORBED,
        ENCODING,
        replace(ENCODING, head_size=256),
        replace(GROUPED, heads=0),
        replace(GROUPED, head_size=40, kv_heads=1),
        replace(GROUPED, head_size=512),
    ],
)
def test_the_kernels_take_a_model(attention):
    probe.check(attention, torch.device("npu"))


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        (replace(GROUPED, dtype="float32"), "query must be float16 or bfloat16, got Float"),
        (replace(ABSORBED, dtype="float32"), "query must be float16 or bfloat16, got Float"),
        (replace(ENCODING, dtype="float32"), "query must be float16 or bfloat16, got Float"),
    ],
)
def test_what_a_kernel_refuses_is_said_before_the_model_is_loaded(attention, said):
    """By the simulated NPU in its strict mode, and in the kernel's own words."""
    with pytest.raises(ValueError, match=said) as caught:
        probe.check(attention, torch.device("npu"))
    assert f"dtype {attention.dtype}, 8 heads" in str(caught.value)
    assert "\n" not in str(caught.value)
