"""
VideoReward, the reward model of VideoAlign (https://huggingface.co/papers/2501.13918): Qwen2-VL-2B with a linear head.

Weights: `KwaiVGI/VideoReward`, Apache-2.0 by its card. Code and question, which is that of training to the letter: MIT
(https://github.com/KwaiVGI/VideoAlign). The checkpoint is `checkpoint-N/model.pth`, a state dict of tensors with the
LoRA of training still apart, and `model_config.json`; configuration and tokenizer are those of the base model.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import Video
from .frames import at_rate, check_request, frame_rate, qwen_size, sample_frames
from .qwen_vl_model import QwenVL, best_device, check_captions
from .weights import load_exactly, read_tensors, resolve_weights, text_hash, weights_identity


REPOSITORY, BASE = "KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"
DIMENSIONS = ("VQ", "MQ", "TA")  # visual quality, motion quality, text alignment
REWARD_TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "model.pth")


class VideoAlignJudge:
    """
    `sa` comes from its reward for text alignment and `pc` from that for motion quality (stability, naturalness,
    amplitude): a judge of quality for building pairs, not of the laws of physics. Rewards are standardised by the
    checkpoint's own means and deviations and go through the logistic function, since the model was trained by
    comparisons; `raw` has them before that, and their sum.

    Differences from the authors' script: frames are resized by FFmpeg instead of torchvision, and a video is scored
    by itself, so that no padding enters.

    Args:
        weights: folder or repository id with `model_config.json`.
        base: folder or repository id of the base model, for its configuration and tokenizer.
        fps: frames per second of clips given as arrays; files know their own.
        device: where to run; a GPU if there is one.
        dtype: of the weights; the head computes in float32.
        revision: of the repository of the weights.

    Raises:
        ValueError: a setting out of range, or weights that are missing or of another model; what is missing is named.
    """

    name = "videoalign"
    version = 1  # goes up when equal weights and settings would score differently

    def __init__(
        self,
        weights: str | os.PathLike[str] = REPOSITORY,
        *,
        base: str | os.PathLike[str] = BASE,
        fps: float = 16.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None,
    ) -> None:
        if not fps > 0:
            raise ValueError(f"Expected `fps` > 0, got {fps}.")
        self.fps = fps
        self.folder = resolve_weights(weights, revision, ("*.json", "*.pth", "*.safetensors"))
        self.settings = _settings(self.folder)
        place = best_device(device)
        base_folder = resolve_weights(base, patterns=("*.json", "*.txt"))
        tokenizer = _tokenizer(base_folder)
        state, self.head = _read_checkpoint(self.folder, self.settings, dtype)
        network = _network(base_folder, state, self.folder)
        self.head = self.head.to(place)
        self.vlm = QwenVL(self.folder, "qwen2_vl", tokenizer, network.to(place), place, dtype)
        self._reward_ids = tokenizer.convert_tokens_to_ids(list(REWARD_TOKENS))

    @cached_property
    def identity(self) -> str:
        """Name, version, weights, question and settings: equal identities give equal scores."""
        weights = weights_identity(self.folder, [f"{_checkpoint_folder(self.folder).name}/*"])
        return (
            f"{self.name}:v{self.version}:weights={weights}:settings={text_hash(json.dumps(self.settings))}:"
            f"question={text_hash(question_for(''))}:{str(self.vlm.dtype).removeprefix('torch.')},fps={self.fps:g}"
        )

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in (0, 1), and `raw`: the standardised rewards `VQ`, `MQ`, `TA` and their sum
            `Overall`.

        Raises:
            ValueError: a request that cannot be answered, or a caption with the model's control tokens.
        """
        check_request(videos, prompts)
        check_captions(prompts)
        results = []
        for video, prompt in zip(videos, prompts, strict=True):
            rewards = dict(zip(DIMENSIONS, self._rewards(video, prompt), strict=True))
            norms = self.settings["inference_config"]
            raw = {name: (value - norms[f"{name}_mean"]) / norms[f"{name}_std"] for name, value in rewards.items()}
            scores = {key: 1 / (1 + math.exp(-raw[name])) for key, name in (("sa", "TA"), ("pc", "MQ"))}
            results.append(scores | {"raw": raw | {"Overall": sum(raw.values())}})
        return results

    @torch.inference_mode()
    def _rewards(self, video: Video, prompt: str) -> list[float]:
        """Rewards of the three dimensions, as the head gives them."""
        data, fps = self.settings["data_config"], frame_rate(video, self.fps)
        frames, indices = sample_frames(
            video,
            0,
            lambda count, _: at_rate(count, fps, data["fps"]),
            lambda h, w: qwen_size(h, w, multiple=self.vlm.multiple, most=data["max_frame_pixels"]),
        )
        patches = self.vlm.patches(frames, indices / fps)
        ids = torch.tensor([self.vlm.chat_ids(patches, [question_for(prompt)])], device=self.vlm.device)
        network = self.vlm.model
        embeddings = network.language_model.embed_tokens(ids)
        grid = torch.tensor([patches.grid], device=ids.device)
        seen = network.visual(patches.pixels.to(ids.device, self.vlm.dtype), grid_thw=grid).pooler_output
        places = (ids == network.config.video_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, seen.to(embeddings.dtype))
        # The reward model was trained with a token's place in the text as its position in time, height and width.
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = network.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        rows = torch.isin(ids[0], torch.tensor(self._reward_ids, device=ids.device))
        rewards = hidden.last_hidden_state[0, rows].float() @ self.head.T  # (3, 1), or (3, 3) of which the diagonal
        return (rewards.diagonal() if rewards.shape[1] == 3 else rewards[:, 0]).tolist()


def question_for(prompt: str) -> str:
    """The question of training, to the letter, with the caption in its place."""
    return _question().replace("{text_prompt}", prompt)


@cache
def _question() -> str:
    return resources.files("video_trl").joinpath("templates/videoalign_question.txt").read_text(encoding="utf-8")


def _settings(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: `model_config.json` is missing, or is that of another kind of reward model.
    """
    path = folder / "model_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data, model, lora = (settings[name] for name in ("data_config", "model_config", "peft_lora_config"))
        norms = {name: float(settings["inference_config"][name]) for name in _norm_names()}
        kept = {
            "data_config": {name: float(data[name]) for name in ("fps", "max_frame_pixels")},
            "peft_lora_config": {name: float(lora[name]) for name in ("lora_r", "lora_alpha")},
            "inference_config": norms,
        }
        kind = (data["prompt_template_type"], bool(model["use_special_tokens"]), model["output_dim"] in (1, 3))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected VideoAlign's configuration, got {type(error).__name__} {error}. Fetch the whole "
            f"repository {REPOSITORY}."
        ) from error
    if kind != ("detailed_special", True, True) or lora.get("use_rslora"):
        raise ValueError(
            f"{path}: expected a model with the template 'detailed_special', special tokens, 1 or 3 outputs and no "
            f"rsLoRA, as published, got {data['prompt_template_type']!r}, {model['use_special_tokens']}, "
            f"{model['output_dim']} and {lora.get('use_rslora')}."
        )
    return kept


def _norm_names() -> list[str]:
    return [f"{name}_{kind}" for name in DIMENSIONS for kind in ("mean", "std")]


def _checkpoint_folder(folder: Path) -> Path:
    """
    The newest checkpoint.

    Raises:
        ValueError: there is none.
    """
    found = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    if not found:
        raise ValueError(
            f"{folder}: expected a folder checkpoint-N, found {sorted(p.name for p in folder.iterdir())}."
        )
    return found[max(found)]


def _read_checkpoint(
    folder: Path, settings: Mapping[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """
    The network's tensors under the names of transformers' `Qwen2VLModel`, with the LoRA added to what it adapts, and
    the head `(1 or 3, D)` in float32.
    """
    place = _checkpoint_folder(folder)
    path = next((place / name for name in _WEIGHTS if (place / name).is_file()), None)
    if path is None:
        raise ValueError(
            f"{place}: expected {' or '.join(_WEIGHTS)}, found {sorted(p.name for p in place.iterdir())}."
        )
    state = {_renamed(name): tensor for name, tensor in read_tensors(path).items()}
    head = state.pop("rm_head.weight", None)
    if head is None or len(head) not in (1, 3):
        raise ValueError(
            f"{path}: expected a head `rm_head.weight` with 1 or 3 rows. Is this VideoAlign's checkpoint?"
        )
    lora = settings["peft_lora_config"]
    scale = lora["lora_alpha"] / lora["lora_r"]
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name or name.startswith("lm_head."):  # rewards need no words
            continue
        layer, adapted, kind = name.partition(".base_layer.")
        if adapted and kind == "weight":
            down, up = (state.get(f"{layer}.lora_{side}.default.weight") for side in "AB")
            if down is None or up is None:
                raise ValueError(f"{path}: {name} has no complete LoRA beside it. Fetch the file again.")
            tensor = tensor.float() + scale * (up.float() @ down.float())
        merged[f"{layer}.{kind}" if adapted else name] = tensor.to(dtype)
    return merged, head.float()


def _renamed(name: str) -> str:
    """
    A published name -> ours: without the wrapper's prefix, and with the language model under its present name, which
    files that were written by newer versions of transformers have already.
    """
    name = name.removeprefix("base_model.model.")
    for old, new in (
        ("model.visual.", "visual."),
        ("model.language_model.", "language_model."),
        ("model.", "language_model."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _network(base: Path, state: dict[str, Tensor], where: Path) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLModel
    from transformers.models.qwen2_vl import modeling_qwen2_vl as modules

    config = Qwen2VLConfig.from_pretrained(base)
    embedding = state.get("language_model.embed_tokens.weight")
    if embedding is not None:
        config.text_config.vocab_size = len(embedding)  # training added the reward tokens and cut unused rows
    with torch.device("meta"):  # two billion weights are neither allocated nor initialised twice
        network = Qwen2VLModel(config)
    load_exactly(network, state, where)
    # Tables that are computed, and in no file.
    network.language_model.rotary_emb = modules.Qwen2VLRotaryEmbedding(config=config.text_config)
    known, vision = vars(modules), config.vision_config
    if "Qwen2VLVisionRotaryEmbedding" in known:
        network.visual.rotary_pos_emb = known["Qwen2VLVisionRotaryEmbedding"](vision)
    else:  # transformers before 5.18
        network.visual.rotary_pos_emb = known["VisionRotaryEmbedding"](vision.embed_dim // vision.num_heads // 2)
    return network.eval().requires_grad_(False)


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"{base}: no tokenizer of the base model ({error}). Pass `base`, its folder.") from error
    tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    return tokenizer
