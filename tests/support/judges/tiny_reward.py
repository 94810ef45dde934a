"""A tiny VideoReward in the published layout: `model_config.json` and a PEFT state dict with the old names."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from .tiny_qwen import TEXT, _ids, tiny_tokenizer


RANK, ALPHA = 4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = {"VQ_mean": 3.5, "VQ_std": 2.0, "MQ_mean": 1.1, "MQ_std": 1.5, "TA_mean": 2.8, "TA_std": 2.5}
SETTINGS = {
    "data_config": {"prompt_template_type": "detailed_special", "fps": 2, "max_frame_pixels": 200704},
    "model_config": {"use_special_tokens": True, "output_dim": 1},
    "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
    "inference_config": NORMS,
}


def write_reward(root: Path, outputs: int = 1, seed: int = 0) -> tuple[Path, Path, torch.nn.Module]:
    """Folder of the weights, folder of the base model, and the network of the real classes that they are of."""
    weights, base = root / "reward", root / "base"
    config = Qwen2VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        **_ids(),
    )
    config.save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base)
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.resize_token_embeddings(len(tokenizer) + 3)
    model.rm_head = torch.nn.Linear(TEXT["hidden_size"], outputs, bias=False)
    where = r".*language_model.*\.(" + "|".join(TARGETS) + ")"
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=where))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    published = {
        name.replace("base_model.model.model.visual.", "base_model.model.visual.").replace(
            "base_model.model.model.language_model.", "base_model.model.model."
        ): tensor.clone()
        for name, tensor in wrapped.state_dict().items()
    }
    (weights / "checkpoint-20").mkdir(parents=True)
    (weights / "checkpoint-3").mkdir()
    torch.save(published, weights / "checkpoint-20" / "model.pth")
    (weights / "model_config.json").write_text(
        json.dumps(SETTINGS | {"model_config": SETTINGS["model_config"] | {"output_dim": outputs}})
    )
    return weights, base, wrapped.eval()
