# SPDX-License-Identifier: Apache-2.0
"""Attention backends, one a file."""

__all__ = ["BACKENDS", "ENCODER"]

# By whether a layer computes multi-head latent attention: the name in vLLM's table of backends, and the class.
BACKENDS = {
    False: ("ASCEND_ATTN", "vllm_ascend.attention.gqa.AscendAttentionBackend"),
    True: ("ASCEND_MLA", "vllm_ascend.attention.mla.AscendMLABackend"),
}
# The class for layers of encoders, which have no cache. In vLLM's table it has the name of the first one above.
ENCODER = "vllm_ascend.attention.encoder.AscendEncoderAttentionBackend"
