# SPDX-License-Identifier: Apache-2.0
"""The options for linear layers in whole engines: greedy tokens in float32 equal Hugging Face's, and each option does what it is for."""

import pytest

pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}
INSPECT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def tokens(result, run=0):
    return [output["tokens"] for output in result["runs"][run]]


def ops(result, rank=0):
    """Last component of the path -> op, of one worker."""
    return {path.rpartition(".")[2]: op for path, (op, _, _) in result["layers"][rank].items()}


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory, hugging_face):
    """A random Qwen3 of 4 layers, prompts of 5 to 59 tokens, and Hugging Face's greedy tokens for them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3")
    prompts = [[(7 * i * i + 3 * k) % 512 for i in range(5 + 9 * k)] for k in range(7)]
    with torch.inference_mode():
        model = Qwen3ForCausalLM(config).float().eval()
        model.save_pretrained(folder)
        return folder, prompts, hugging_face(model, prompts, GREEDY["max_tokens"])


def test_flashcomm1_and_flashcomm2(tiny_qwen3, run_engines):
    folder, prompts, expected = tiny_qwen3
    options = {"enable_flashcomm1": True, "flashcomm1_dense_threshold": 20, "flashcomm2_parallel_size": 1}
    engine = {"model": str(folder), **SMALL, "tensor_parallel_size": 2, "additional_config": options}
    runs = [{"prompts": prompts, "sampling": GREEDY}, {"prompts": prompts[:1], "sampling": GREEDY}]
    (result,) = run_engines([{"engine": engine, "runs": runs, "inspect": True}], **INSPECT)
    assert tokens(result) == expected
    assert tokens(result, 1) == expected[:1]
    print(result["layers"][0], result["collectives"])
