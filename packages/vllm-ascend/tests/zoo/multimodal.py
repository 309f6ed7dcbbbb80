# SPDX-License-Identifier: Apache-2.0
"""Models of images, video and audio, with their processors built in code. Widths of towers follow the published models' head sizes where they are odd (72, 80)."""

from dataclasses import replace

from zoo.entries import SIZES, VOCABULARY, Entry

IMAGES = {"image": 3}
TEXT_MODEL = {name: size for name, size in SIZES.items() if name != "pad_token_id"}
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}}
IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"] + [
    f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)
]


def tokenizer(specials, **named):
    """A tokenizer of 512 words, `w44` and the like, whose special tokens come first; `named` are attributes that processors ask for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first = ["<pad>", "<s>", "</s>", "<unk>", *specials]
    words = [*first, *(f"w{n}" for n in range(len(first), VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(first)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[word for word in specials if word not in named.values()], extra_special_tokens=named,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )  # fmt: skip


def ids_of(tokens, *names):
    return [tokens.convert_tokens_to_ids(name) for name in names]


def qwen_processor(prefix, **options):
    import transformers

    tokens = tokenizer(QWEN)
    pixels = {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 36}}
    images = transformers.Qwen2VLImageProcessor(**pixels, **options)
    video_class = "Qwen3VLVideoProcessor" if prefix == "Qwen3VL" else "Qwen2VLVideoProcessor"
    videos = getattr(transformers, video_class)(**pixels, **options)
    processor_class = getattr(transformers, f"{prefix}Processor")
    return processor_class(
        image_processor=images, tokenizer=tokens, video_processor=videos, chat_template=tokens.chat_template
    )


def qwen_ids(tokens):
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, ids_of(tokens, *QWEN), strict=True))


def qwen2_vl():
    processor = qwen_processor("Qwen2VL")
    vision = {"depth": 2, "embed_dim": 160, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 2}
    return processor, {"text_config": {**TEXT_MODEL, **MROPE}, "vision_config": vision, **qwen_ids(processor.tokenizer)}


def qwen2_5_vl():
    processor = qwen_processor("Qwen2_5_VL")
    vision = {
        "depth": 2, "hidden_size": 160, "num_heads": 2, "intermediate_size": 320, "out_hidden_size": 256, "window_size": 56,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return processor, {"text_config": {**TEXT_MODEL, **MROPE}, "vision_config": vision, **qwen_ids(processor.tokenizer)}


def qwen3_vl():
    processor = qwen_processor("Qwen3VL", patch_size=16)
    vision = {
        "depth": 3, "hidden_size": 144, "num_heads": 2, "intermediate_size": 320, "out_hidden_size": 256, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rotary = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}}
    text = {**TEXT_MODEL, **rotary, "head_dim": 64, "num_hidden_layers": 3}
    return processor, {"text_config": text, "vision_config": vision, **qwen_ids(processor.tokenizer)}


def internvl():
    import transformers

    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokens = tokenizer(list(named.values()), **named)
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = transformers.InternVLProcessor(
        image_processor=images, tokenizer=tokens, image_seq_length=4, chat_template=tokens.chat_template,
        video_processor=transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
    )  # fmt: skip
    vision = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "image_size": [56, 56],
        "patch_size": [14, 14],
    }
    config = {
        "text_config": {"model_type": "qwen2", **TEXT_MODEL}, "vision_config": vision, "image_seq_length": 4,
        "image_token_id": ids_of(tokens, "<IMG_CONTEXT>")[0], "tie_word_embeddings": False,
    }  # fmt: skip
    return processor, config


def llava():
    import transformers

    tokens = tokenizer(["<image>"], image_token="<image>")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokens.chat_template,
    )  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256, "image_size": 56,
        "patch_size": 14, "projection_dim": 64,
    }  # fmt: skip
    config = {
        "text_config": {"model_type": "llama", **TEXT_MODEL}, "vision_config": vision, "image_token_index": ids_of(tokens, "<image>")[0],
        "image_seq_length": 16,
    }  # fmt: skip
    return processor, config


def idefics(prefix):
    import transformers

    tokens = tokenizer(IDEFICS)
    options = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    images = getattr(transformers, f"{prefix}ImageProcessor")(**options)
    more = {"video_processor": transformers.SmolVLMVideoProcessor(**options)} if prefix == "SmolVLM" else {}
    processor = getattr(transformers, f"{prefix}Processor")(
        image_processor=images, tokenizer=tokens, image_seq_len=4, chat_template=tokens.chat_template, **more
    )
    vision = {
        "hidden_size": 144,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    config = {
        "text_config": {"model_type": "llama", **SIZES}, "vision_config": vision, "scale_factor": 2, "image_token_id": ids_of(tokens, "<image>")[0],
        "pad_token_id": 0,
    }  # fmt: skip
    return processor, config


def idefics3():
    return idefics("Idefics3")


def smolvlm():
    return idefics("SmolVLM")


def mistral3():
    import transformers

    tokens = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    images = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    processor = transformers.PixtralProcessor(
        image_processor=images,
        tokenizer=tokens,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=tokens.chat_template,
    )
    vision = {
        "model_type": "pixtral", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
        "patch_size": 14, "head_dim": 64,
    }  # fmt: skip
    config = {
        "text_config": {"model_type": "mistral", **TEXT_MODEL, "head_dim": 64, "sliding_window": None}, "vision_config": vision, "spatial_merge_size": 2,
        "image_token_index": ids_of(tokens, "[IMG]")[0], "vision_feature_layer": -1,
    }  # fmt: skip
    return processor, config


def gemma3():
    import transformers

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    lines = ["\n" * count for count in (1, 2, 3, 4)]  # between which the processor places a picture, each one token
    tokens = tokenizer([*named.values(), *lines], **named)
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = transformers.Gemma3Processor(
        image_processor=images, tokenizer=tokens, image_seq_length=4, chat_template=tokens.chat_template
    )
    begin, end, soft = ids_of(tokens, *named.values())
    vision = {
        "hidden_size": 144,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    text = {
        **SIZES,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = {
        "text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "boi_token_index": begin, "eoi_token_index": end, "image_token_index": soft,
    }  # fmt: skip
    return processor, config


def gemma4(**more):
    """`more` is the text model's."""
    import transformers

    named = {
        "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>",
    }  # fmt: skip
    tokens = tokenizer([*named.values(), "<|video|>"], **named)
    few = {"max_soft_tokens": 70}  # the fewest that the processor has
    processor = transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(), image_processor=transformers.Gemma4ImageProcessor(**few), tokenizer=tokens,
        video_processor=transformers.Gemma4VideoProcessor(**few), image_seq_length=70, chat_template=tokens.chat_template,
    )  # fmt: skip
    vision = {
        "hidden_size": 144, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 72,
        "position_embedding_size": 64, "default_output_length": 70,
    }  # fmt: skip
    text = {
        **SIZES, "head_dim": 256, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 512,
        **more,
    }  # fmt: skip
    begin, end, image, begin_sound, end_sound, sound, video = ids_of(tokens, *named.values(), "<|video|>")
    config = {
        "text_config": text, "vision_config": vision, "audio_config": None, "boi_token_id": begin, "eoi_token_id": end, "image_token_id": image,
        "boa_token_id": begin_sound, "eoa_token_index": end_sound, "audio_token_id": sound, "video_token_id": video,
    }  # fmt: skip
    return processor, config


def gemma4_as_e2b():
    return gemma4(hidden_size_per_layer_input=32)


def gemma4_as_31b():
    return gemma4(
        hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1, use_bidirectional_attention="vision",
    )  # fmt: skip


def qwen2_audio():
    import transformers

    names = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokens = tokenizer(names)
    sounds = transformers.WhisperFeatureExtractor(sampling_rate=16000, feature_size=16)
    processor = transformers.Qwen2AudioProcessor(
        feature_extractor=sounds, tokenizer=tokens, chat_template=tokens.chat_template
    )
    audio = {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 256, "d_model": 128, "max_source_positions": 1500,
    }  # fmt: skip
    config = {
        "text_config": {"model_type": "qwen2", **TEXT_MODEL}, "audio_config": audio, "audio_token_index": ids_of(tokens, "<|AUDIO|>")[0],
    }  # fmt: skip
    return processor, config


def whisper():
    import transformers

    names = ["<|startoftranscript|>"]
    tokens = tokenizer(names)
    sounds = transformers.WhisperFeatureExtractor(sampling_rate=16000, feature_size=16, chunk_length=2)
    processor = transformers.WhisperProcessor(feature_extractor=sounds, tokenizer=tokens)
    config = {
        "vocab_size": VOCABULARY, "num_mel_bins": 16, "d_model": 256, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 320,
        "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 320, "max_source_positions": 100, "max_target_positions": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": ids_of(tokens, *names)[0],
    }  # fmt: skip
    return processor, config


def entry(name, make, mark, *, task="images", model=None, engine=None, names=None, encodes=False, known=""):
    limits = {"images": {"image": 3}, "video": {"video": 2}, "audio": {"audio": 2}}[task]
    return Entry(
        name=name, task=task, config=f"{(model or name)}Config", model=f"{model or name}ForConditionalGeneration", make=make, mark=mark, names=names or {}, encodes=encodes, known=known,
        engine={"limit_mm_per_prompt": limits, "skip_tokenizer_init": False, "max_model_len": 512, **(engine or {})},
    )  # fmt: skip


QWEN_IMAGE = "<|vision_start|> <|image_pad|> <|vision_end|>"
QWEN_VIDEO = "<|vision_start|> <|video_pad|> <|vision_end|>"
PICTURES_ALONE = {"limit_mm_per_prompt": {"image": 2, "video": 0}}
MULTIMODAL = [
    entry("Qwen2VL", qwen2_vl, QWEN_IMAGE),
    entry("Qwen2VL, video", qwen2_vl, QWEN_VIDEO, task="video", model="Qwen2VL"),
    entry("Qwen2_5_VL", qwen2_5_vl, QWEN_IMAGE),
    entry(
        "Qwen2_5_VL, video",
        qwen2_5_vl,
        QWEN_VIDEO,
        task="video",
        model="Qwen2_5_VL",
        known="After a video vLLM counts positions on from the largest of the video's, transformers from those of its height and width alone.",
    ),
    entry("Qwen3VL", qwen3_vl, QWEN_IMAGE),
    entry("InternVL", internvl, "<IMG_CONTEXT>"),
    entry("Llava", llava, "<image>", names={"vision_tower.": "vision_tower.vision_model."}),
    entry("Idefics3", idefics3, "<image>"),
    entry("SmolVLM", smolvlm, "<image>"),
    entry("Mistral3", mistral3, "[IMG]"),
    entry(
        "Gemma3, images",
        gemma3,
        "<start_of_image>",
        model="Gemma3",
        names={"vision_tower.": "vision_tower.vision_model."},
    ),
    entry("Gemma4, images", gemma4_as_e2b, "<|image|>", model="Gemma4", engine=PICTURES_ALONE),
    # Pictures are seen both ways, and not cut into chunks.
    replace(
        entry("Gemma4, images both ways", gemma4_as_31b, "<|image|>", model="Gemma4", engine=PICTURES_ALONE), chunk=96
    ),
    entry(
        "Qwen2Audio",
        qwen2_audio,
        "<|audio_bos|> <|AUDIO|> <|audio_eos|>",
        task="audio",
        names={"language_model.model.model.": "language_model.model."},
    ),
    entry(
        "Whisper",
        whisper,
        "<|startoftranscript|>",
        task="audio",
        encodes=True,
        engine={"limit_mm_per_prompt": {"audio": 1}, "max_model_len": 256},
    ),
]
