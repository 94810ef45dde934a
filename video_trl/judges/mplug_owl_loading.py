"""Load published mPLUG-Owl-video checkpoints, and tokenize prompts that contain a video."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .mplug_owl_model import VIDEO_TOKEN, MplugOwlSizes, MplugOwlVideo
from .weights import load_exactly, read_config, read_state_dict


# How a prompt is cut before each piece is tokenised by itself. The two checkpoints were trained and run differently.
SPLIT_AT_MEDIA = ("<image>", "<|video|>")
SPLIT_AT_TURNS = (*SPLIT_AT_MEDIA, "AI: ", "\nHuman: ")


def convert_state_dict(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """
    Published names and shapes -> ours: the same, but for the temporal convolutions, which are stored as 3-D kernels
    (a 1x1x1 kernel is a linear layer, a 3x1x1 one a convolution over time), and for rotary tables, which are computed.
    """
    converted = {}
    for name, tensor in state.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if re.search(r"temporal\.(down|up)_proj\.weight$", name) and tensor.ndim == 5:
            tensor = tensor[:, :, 0, 0, 0]
        elif name.endswith("temporal.conv.weight") and tensor.ndim == 5:
            tensor = tensor[:, :, :, 0, 0]
        converted[name] = tensor.to(dtype)
    return converted


def load_mplug_owl(folder: Path, dtype: torch.dtype, device: torch.device) -> MplugOwlVideo:
    """
    Build the network of a checkpoint, in evaluation mode and without gradients.

    Args:
        folder: with `config.json` and weights (`.safetensors` or `.bin`, whole or in shards).
        dtype: of the weights and activations; norms and logits are float32 in any case.
        device: where to put it.

    Raises:
        ValueError: a file is missing, damaged, or of another model; missing and unexpected keys are named.
    """
    sizes = MplugOwlSizes.from_config(read_config(folder))
    with torch.device("meta"):  # 7 billion weights are neither allocated nor initialised twice
        model = MplugOwlVideo(sizes)
    load_exactly(model, convert_state_dict(read_state_dict(folder), dtype), folder)
    language = model.language_model
    language.model.rotary_emb = LlamaRotaryEmbedding(config=language.config)  # its table is not in the file
    return model.to(device).eval().requires_grad_(False)


class MplugOwlTokenizer:
    """
    LLaMA's SentencePiece model, with a video as a run of `VIDEO_TOKEN`.

    Args:
        folder: with `tokenizer.model`.
        num_video_tokens: length of that run.

    Raises:
        ValueError: no such file, or `sentencepiece` is not installed.
    """

    def __init__(self, folder: Path, num_video_tokens: int) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ValueError("This judge needs sentencepiece: `pip install 'video-trl[judges]'`.") from error
        path = folder / "tokenizer.model"
        if not path.is_file():
            raise ValueError(f"No {path}: fetch the whole repository, with its SentencePiece model, into {folder}.")
        self.pieces = SentencePieceProcessor(model_file=str(path))
        self.num_video_tokens = num_video_tokens

    @property
    def end(self) -> int:
        """Id of the token that ends an answer."""
        return self.pieces.eos_id()

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text by itself, neither begin nor end added."""
        return list(self.pieces.encode(text))

    def encode_prompt(self, prompt: str, separators: Sequence[str]) -> list[int]:
        """Ids of a prompt with one `<|video|>`: begin token, then each piece between (and of) the separators."""
        pieces = re.split(f"({'|'.join(map(re.escape, separators))})", prompt)
        ids = [self.pieces.bos_id()]
        for piece in filter(None, pieces):
            ids += [VIDEO_TOKEN] * self.num_video_tokens if piece == "<|video|>" else self.encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, begin, end and unknown tokens left out."""
        special = {self.pieces.bos_id(), self.pieces.eos_id(), self.pieces.unk_id()}
        return str(self.pieces.decode([i for i in ids if i not in special]))
