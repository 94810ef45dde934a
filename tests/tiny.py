"""Tiny instances of the real classes. Everything is seeded and built in process: no file, no download, no mock."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from datasets import Dataset, Features, List, Value, Video
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


WORDS = "a and ball blue bounces drops falls floor green hits left on red right rolls slides swings the to".split()
PROMPTS = (
    "a red ball falls to the floor",
    "a blue ball rolls to the right",
    "the green ball bounces",
    "a red ball hits a blue ball and bounces to the left",
)
MAX_SEQUENCE_LENGTH = 16
LATENTS_SHAPE = (4, 2, 4, 4)  # (C, F, H, W) of a tiny video of 5 frames of 32 x 32 pixels
TEXT_DIM = 16


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `</s>` at the end, `<pad>` (id 0) behind it, as the tokenizer of UMT5 does."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def tiny_vae(seed: int = 0, **config: Any) -> AutoencoderKLWan:
    """Wan 2.1's VAE with 4 channels: 4 times in time, 8 times in height and width."""
    torch.manual_seed(seed)
    defaults = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [0.5, 1.0, 1.5, 2.0],
    }
    return AutoencoderKLWan(**(defaults | config)).eval()


def tiny_transformer(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    """Wan 2.1's transformer with 2 layers of 2 heads of 12 channels, patch (1, 2, 2)."""
    torch.manual_seed(seed)
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(defaults | config)).eval()


def tiny_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """UMT5 encoder of width 16."""
    torch.manual_seed(seed)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Text-to-video pipeline laid out as Wan 2.1's, scheduler included. A training step takes milliseconds."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(seed),
        vae=tiny_vae(seed),
        scheduler=scheduler,
        transformer=tiny_transformer(seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_video(seed: int, num_frames: int = 5, height: int = 32, width: int = 32) -> np.ndarray:
    """A falling square on a plain background, uint8 `(T, H, W, 3)`; its colours and column depend on the seed."""
    generator = np.random.default_rng(seed)
    video = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    video[:] = generator.integers(0, 96, 3)
    colour, side = generator.integers(128, 256, 3), max(height // 4, 1)
    left = int(generator.integers(0, max(width - side, 1)))
    for frame in range(num_frames):
        top = (height - side) * frame // max(num_frames - 1, 1)
        video[frame, top : top + side, left : left + side] = colour
    return video


def tiny_mp4(seed: int, fps: int = 8, **size: int) -> bytes:
    """The `tiny_video` of a seed as the bytes of a real mp4 file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = tiny_video(seed, **size)
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def tiny_group_dataset(n: int = 4, m: int = 3, seed: int = 0, **size: int) -> Dataset:
    """Raw group rows: one chosen and `m` rejected mp4 files each, and the rejected ones' judge scores."""
    generator = np.random.default_rng(seed)
    video = Video(decode=False)
    features = Features(
        {
            "prompt": Value("string"),
            "chosen": video,
            "rejected": List(video),
            "rejected_scores": List({"sa": Value("float32"), "pc": Value("float32")}),
        }
    )
    rows = []
    for row in range(n):
        files = [{"path": None, "bytes": tiny_mp4(seed + row * (m + 1) + k, **size)} for k in range(m + 1)]
        scores = [{"sa": sa, "pc": pc} for sa, pc in generator.uniform(0, 1, (m, 2)).tolist()]
        prompt = PROMPTS[row % len(PROMPTS)]
        rows.append({"prompt": prompt, "chosen": files[0], "rejected": files[1:], "rejected_scores": scores})
    return Dataset.from_list(rows, features=features)


def tiny_encoded_group(
    n: int = 4, m: int = 3, seed: int = 0, latents_shape: Sequence[int] = LATENTS_SHAPE
) -> list[dict[str, Any]]:
    """Encoded group rows of random numbers, the keys and shapes of `EncodedDataset`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(n):
        prompt = PROMPTS[row % len(PROMPTS)]
        rows.append(
            {
                "prompt": prompt,
                "chosen_latents": torch.randn(*latents_shape, generator=generator),
                "rejected_latents": torch.randn(m, *latents_shape, generator=generator),
                "prompt_embeds": torch.randn(len(prompt.split()) + 1, TEXT_DIM, generator=generator),
                "rejected_scores": torch.rand(m, 2, generator=generator),
            }
        )
    return rows


def tiny_encoded_video(
    n: int = 4, seed: int = 0, latents_shape: Sequence[int] = LATENTS_SHAPE
) -> list[dict[str, Any]]:
    """Encoded video rows: the chosen side of `tiny_encoded_group`."""
    keys = {"prompt": "prompt", "latents": "chosen_latents", "prompt_embeds": "prompt_embeds"}
    rows = tiny_encoded_group(n, 1, seed, latents_shape)
    return [{name: row[source] for name, source in keys.items()} for row in rows]
