"""Tiny Qwen2.5-VL and Qwen3-VL models of the real classes, with a tokenizer, saved as the Hub serves them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)


SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
WORDS = "Yes No 1 2 3 4 5 0 seconds . < > user assistant system video caption physics red blue ball falls".split()
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words, digits and punctuation as tokens of their own."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=SPECIAL, eos_token="<|im_end|>"
    )


def _ids() -> dict[str, int]:
    tokenizer = tiny_tokenizer()
    names = ("video_pad", "image_pad", "vision_start", "vision_end")
    ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    keys = ("video_token_id", "image_token_id", "vision_start_token_id", "vision_end_token_id")
    return dict(zip(keys, ids, strict=True))


def tiny_qwen(family: str, seed: int = 0) -> torch.nn.Module:
    """`qwen2_5_vl` or `qwen3_vl`, patches of 14 or 16 pixels, with weights large enough to tell videos apart."""
    torch.manual_seed(seed)
    if family == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(
            text_config=TEXT
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
            **_ids(),
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        config = Qwen3VLConfig(
            text_config=TEXT
            | {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
                "patch_size": 16,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            **_ids(),
        )
        model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write_qwen(folder: Path, family: str, seed: int = 0) -> Path:
    tiny_qwen(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
