# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints of models that embed, classify or score, each with what Hugging Face's layers say of one text."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY, HIDDEN, HEADS, INNER, LAYERS, LONGEST = 512, 128, 4, 256, 3, 512
WINDOW = 8  # keys that a token of a windowed layer sees on either side
FIRST_WORD = 8  # smaller token ids are special
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "initializer_range": 0.15,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": LONGEST, "tie_word_embeddings": False}
BERT = {**SIZES, "max_position_embeddings": LONGEST, "pad_token_id": 0}
ROBERTA = {**SIZES, "max_position_embeddings": LONGEST + 2, "pad_token_id": 1, "type_vocab_size": 1}
MODERNBERT = {
    **SIZES, "max_position_embeddings": LONGEST, "pad_token_id": 0, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 3,
    "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
Reference = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A kind of model.

    Args:
        family: names of transformers' class and configuration, without "Config" and the head: "Bert" and "Model".
        sizes: of its configuration.
        task: of vLLM.
        reference: what the model says of the token ids of one text `[1, T]`, in float32: `[width]`, or `[T, width]` of token by token tasks.
        keys: of config.json beside what transformers writes.
        engine: options of the engine.
        renames: regular part of a tensor's name in transformers -> in the checkpoint, where vLLM knows another one.
        parts: further layers of the checkpoint, by name: (inputs, outputs).
    """

    family: tuple[str, str]
    sizes: dict[str, Any]
    task: str
    reference: Reference
    keys: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


def normal(x):
    return nn.functional.normalize(x.float(), dim=-1)


def first(hidden):
    return hidden[0]


def last(hidden):
    return hidden[-1]


def mean(hidden):
    return hidden.float().mean(0)


def states(model, ids, **options):
    """The last hidden states `[T, H]`, from either kind of class."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return base(ids, **options).last_hidden_state[0]


def embeds(pool) -> Reference:
    return lambda model, ids: normal(pool(states(model, ids)))


def embeds_both_ways(pool) -> Reference:
    """With decoders' layers, of which every token sees all."""

    def reference(model, ids):
        seen = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=model.dtype)
        return normal(pool(states(model, ids, attention_mask=seen)))

    return reference


def sigmoid_of_logits(model, ids):
    return model(ids).logits[0].float().sigmoid()


def softmax_of_logits(model, ids):
    return model(ids).logits[0].float().softmax(-1)


def last_logits(model, ids):
    """transformers reads the padding token's place off the ids; without padding it is the last."""
    return model.score(states(model, ids)[-1]).float().softmax(-1)


def rewards(model, ids):
    head = model.score_0(states(model, ids)).relu()
    return model.score_2(head).float()


def process_rewards(model, ids):
    return rewards(model, ids)[ids[0] == FIRST_WORD].softmax(-1)


def colbert(model, ids):
    return normal(model.linear(states(model, ids)))


def gemma(model, ids):
    return normal(model.dense_3(model.dense_2(mean(states(model, ids)).to(model.dtype))))


def splade(model, ids):
    return model(ids).logits[0].float().relu().log1p().amax(0)


CASES = {
    "bert-cls": Case(("Bert", "Model"), BERT, "embed", embeds(first)),
    "bert-mean": Case(("Bert", "Model"), BERT, "embed", embeds(mean), engine={"pooler_config": {"pooling_type": "MEAN"}}),
    "bert-last": Case(("Bert", "Model"), BERT, "embed", embeds(last), engine={"pooler_config": {"pooling_type": "LAST"}}),
    "bert-all": Case(("Bert", "Model"), BERT, "token_embed", lambda model, ids: normal(states(model, ids)), engine={"pooler_config": {"task": "token_embed"}}),
    "roberta": Case(("Roberta", "Model"), ROBERTA, "embed", embeds(first)),
    "xlm-roberta": Case(("XLMRoberta", "Model"), ROBERTA, "embed", embeds(first), keys={"position_embedding_type": "absolute"}),
    "modernbert": Case(("ModernBert", "Model"), MODERNBERT, "embed", embeds(first)),
    "nomic": Case(
        ("NomicBert", "Model"), {**BERT, "type_vocab_size": 2}, "embed", embeds(mean),
        keys={"activation_function": "swiglu", "mlp_fc1_bias": False, "mlp_fc2_bias": False, "qkv_proj_bias": False, "rotary_emb_scale_base": None,
              "rotary_emb_interleaved": False, "layer_norm_epsilon": 1e-12, "n_inner": INNER, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
        engine={"pooler_config": {"pooling_type": "MEAN"}},
    ),
    "gte": Case(("Gte", "Model"), {**BERT, "type_vocab_size": 1}, "embed", embeds(first), keys={"position_embedding_type": "rope"}),
    "qwen3-embedding": Case(("Qwen3", "ForCausalLM"), {**DECODER, "head_dim": 64}, "embed", embeds(last)),
    "gte-qwen2": Case(("Qwen2", "Model"), DECODER, "embed", embeds(last)),
    "gte-qwen2-both-ways": Case(("Qwen2", "Model"), DECODER, "embed", embeds_both_ways(last), keys={"is_causal": False}),
    "llama-both-ways": Case(
        ("Llama", "Model"), DECODER, "embed", embeds_both_ways(mean), keys={"pooling": "avg", "architectures": ["LlamaBidirectionalModel"]},
    ),
    "embedding-gemma": Case(
        ("Gemma3Text", "Model"), {**DECODER, "head_dim": 64, "num_key_value_heads": 1, "use_bidirectional_attention": True, "sliding_window": 2 * WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "query_pre_attn_scalar": 64}, "embed", gemma,
        parts={"dense_2": (HIDDEN, INNER), "dense_3": (INNER, HIDDEN)},
    ),
    "bert-cross-encoder": Case(("Bert", "ForSequenceClassification"), {**BERT, "num_labels": 1}, "classify", sigmoid_of_logits),
    "xlm-roberta-reranker": Case(("XLMRoberta", "ForSequenceClassification"), {**ROBERTA, "num_labels": 1}, "classify", sigmoid_of_logits),
    "modernbert-reranker": Case(
        ("ModernBert", "ForSequenceClassification"), {**MODERNBERT, "num_labels": 1, "classifier_pooling": "mean"}, "classify", sigmoid_of_logits,
    ),
    "bert-classifier": Case(("Bert", "ForSequenceClassification"), {**BERT, "num_labels": 5}, "classify", softmax_of_logits),
    "qwen3-classifier": Case(("Qwen3", "ForSequenceClassification"), {**DECODER, "head_dim": 64, "num_labels": 3}, "classify", last_logits),
    "bert-tokens": Case(("Bert", "ForTokenClassification"), {**BERT, "num_labels": 7}, "token_classify", softmax_of_logits),
    "xlm-roberta-tokens": Case(("XLMRoberta", "ForTokenClassification"), {**ROBERTA, "num_labels": 7}, "token_classify", softmax_of_logits),
    "modernbert-tokens": Case(("ModernBert", "ForTokenClassification"), {**MODERNBERT, "num_labels": 7}, "token_classify", softmax_of_logits),
    "qwen2-reward": Case(
        ("Qwen2", "Model"), DECODER, "token_classify", rewards, keys={"architectures": ["Qwen2ForRewardModel"]},
        renames={"": "model.", "model.score_0": "score.0", "model.score_2": "score.2"}, parts={"score_0": (HIDDEN, HIDDEN), "score_2": (HIDDEN, 1)},
    ),
    "qwen2-process-reward": Case(
        ("Qwen2", "Model"), DECODER, "token_classify", process_rewards, keys={"architectures": ["Qwen2ForProcessRewardModel"]},
        renames={"": "model.", "model.score_0": "score.0", "model.score_2": "score.2"}, parts={"score_0": (HIDDEN, HIDDEN), "score_2": (HIDDEN, 2)},
        engine={"pooler_config": {"pooling_type": "STEP", "step_tag_id": FIRST_WORD}},
    ),
    "colbert": Case(("Bert", "Model"), BERT, "token_embed", colbert, keys={"architectures": ["HF_ColBERT"]}, renames={"": "bert.", "bert.linear": "linear"}, parts={"linear": (HIDDEN, 96)}),
    "colbert-modernbert": Case(
        ("ModernBert", "Model"), MODERNBERT, "token_embed", colbert, keys={"architectures": ["ColBERTModernBertModel"]}, parts={"linear": (HIDDEN, 96)},
    ),
    "bert-masked-lm": Case(("Bert", "ForMaskedLM"), BERT, "token_classify", softmax_of_logits),
    "splade": Case(("Bert", "ForMaskedLM"), {**BERT, "tie_word_embeddings": False}, "embed", splade, keys={"architectures": ["BertSpladeSparseEmbeddingModel"]}),
}  # fmt: skip


def build(case):
    """The model in float32, with random weights that depend on the case alone."""
    import transformers

    torch.manual_seed(0)
    family, head = case.family
    config = getattr(transformers, f"{family}Config")(**case.sizes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    for name, (inputs, outputs) in case.parts.items():
        model.add_module(name, nn.Linear(inputs, outputs, bias=name.startswith("score")))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # transformers begins with biases of zero and norms of one
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def save(case, folder):
    """Write the checkpoint as a hub has it; returns the folder."""
    from safetensors.torch import load_file, save_file

    model = build(case)
    dense = {name: getattr(model, name) for name in case.parts if name.startswith("dense")}
    for name in dense:
        delattr(model, name)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | case.keys
    (folder / "config.json").write_text(json.dumps(config))
    if case.renames:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for old, new in case.renames.items():
            tensors = {new + name.removeprefix(old) if name.startswith(old) else name: x for name, x in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    if dense:
        save_sentence_transformer(folder, dense)
    save_tokenizer(folder)
    return folder


def save_sentence_transformer(folder, dense):
    """The files of sentence-transformers: mean, then the layers, then length one."""
    from safetensors.torch import save_file

    kinds = {
        "0": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Dense": "Dense",
        "4_Normalize": "Normalize",
    }
    modules = [
        {"idx": number, "name": str(number), "path": "" if path == "0" else path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, layer in dense.items():
        path = folder / f"{name.removeprefix('dense_')}_Dense"
        path.mkdir()
        shape = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": False}
        (path / "config.json").write_text(
            json.dumps(shape | {"activation_function": "torch.nn.modules.linear.Identity"})
        )
        save_file({"linear.weight": layer.weight.data}, path / "model.safetensors")


def save_tokenizer(folder):
    """Words w8, w9, ... are the tokens 8, 9, ...; a text or a pair of them gets [CLS] and [SEP] as in BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "<pad>", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    words = special + [f"w{number}" for number in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONGEST,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    ).save_pretrained(folder)


def texts(lengths, seed=0):
    """Token ids of random texts of these lengths, in which about every fourth word ends a step of reasoning."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(FIRST_WORD + 1, VOCABULARY, (length,), generator=generator)
        ids[3::4] = FIRST_WORD
        made.append(ids.tolist())
    return made


def answers(case, model, prompts):
    """The reference of each text, in float64."""
    with torch.inference_mode():
        return [case.reference(model, torch.tensor([ids])).double() for ids in prompts]
