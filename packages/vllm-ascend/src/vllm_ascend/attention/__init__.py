# SPDX-License-Identifier: Apache-2.0
"""Attention backends, one a file."""

__all__ = ["BACKENDS", "COMPOSED", "CROSS", "ENCODER", "PAIRED", "PAIRED_COMPOSED", "SINKS"]

# By whether a layer computes multi-head latent attention: the name in vLLM's table of backends, and the class.
BACKENDS = {
    False: ("ASCEND_ATTN", "vllm_ascend.attention.gqa.AscendAttentionBackend"),
    True: ("ASCEND_MLA", "vllm_ascend.attention.mla.AscendMLABackend"),
}
# Classes for other kinds of layers; in vLLM's table they have the name of the first one above. Layers of encoders have no cache.
ENCODER = "vllm_ascend.attention.encoder.AscendEncoderAttentionBackend"
SINKS = "vllm_ascend.attention.sinks.AscendSinkAttentionBackend"
COMPOSED = "vllm_ascend.attention.composed.AscendComposedAttentionBackend"
CROSS = "vllm_ascend.attention.cross.AscendCrossAttentionBackend"
PAIRED = "vllm_ascend.attention.paired.AscendPairedAttentionBackend"
PAIRED_COMPOSED = "vllm_ascend.attention.paired_composed.AscendPairedComposedAttentionBackend"
