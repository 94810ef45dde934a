"""A tiny mPLUG-Owl checkpoint on disk, in the layout of the published ones, with a real SentencePiece model."""

import io
import json
from pathlib import Path

import sentencepiece
import torch

from video_trl.judges.mplug_owl import VIDEOCON_PC, VIDEOCON_SA, VIDEOPHY2_PC, VIDEOPHY2_RULE, VIDEOPHY2_SA
from video_trl.judges.mplug_owl_model import MplugOwlSizes, MplugOwlVideo


CONFIG = {
    "model_type": "mplug-owl",
    "num_query_tokens": 3,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "visual_abstractor_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "torch_dtype": "bfloat16",
    },
}


def tiny_model(seed: int = 0) -> MplugOwlVideo:
    """Random weights large enough that every part of the network shows in its output."""
    model = MplugOwlVideo(MplugOwlSizes.from_config(CONFIG))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.25, generator=generator)
            if "norm" in name and name.endswith("weight") or name.endswith((".ln.weight", "ffn_ln.weight")):
                parameter.add_(1)
    return model.eval().requires_grad_(False)


def published_state_dict(model: MplugOwlVideo) -> dict[str, torch.Tensor]:
    """The names and shapes of the published files: 3-D kernels in the temporal adapter, a stored rotary table."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".temporal." in name and name.endswith(("down_proj.weight", "up_proj.weight")):
            tensor = tensor[:, :, None, None, None]
        elif name.endswith("temporal.conv.weight"):
            tensor = tensor[:, :, :, None, None]
        state[name] = tensor.clone()
    for layer in range(len(model.language_model.model.layers)):
        state[f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return state


def write_tokenizer(path: Path) -> None:
    """A LLaMA-like SentencePiece model: begin 1, end 2, unknown 0, byte fallback, blanks kept, digits alone."""
    sentences = [VIDEOCON_SA, VIDEOCON_PC, VIDEOPHY2_SA, VIDEOPHY2_PC, VIDEOPHY2_RULE, "Yes", "No", "1 2 3 4 5", "0"]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in sentences for line in text.split("\n")] * 4),
        model_writer=file,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=["\u2581Yes", "\u2581No"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(file.getvalue())


def write_checkpoint(folder: Path, model: MplugOwlVideo, shards: int = 1) -> Path:
    """A folder as the Hub serves it, `pytorch_model.bin` whole or in shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder / "tokenizer.model")
    state = published_state_dict(model)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
