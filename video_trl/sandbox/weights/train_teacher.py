"""
Makes the weights of the sandbox teacher: `python -m video_trl.sandbox.weights.train_teacher --output DIR`.

A VideoMAE learns, by masked autoencoding, to fill in three quarters of a lawful clip from the rest. It sees no
sentence, no label and no broken law. The run is seeded; docs/trainers/teachers.md tells how long it takes, and
`--scale` shortens it.
"""

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEModel

from ...teachers.base import normalise
from ..world.simulate import HEIGHT, simulate
from .train_base import foreground_weight, round_up
from .training import Muon, set_learning_rate, to_tensor, warm_cosine


logger = logging.getLogger(__name__)

NUM_FRAMES, TUBELET, PATCH = 12, 2, 16  # frames 1 to 12 of a clip: frame 0 has a latent frame of its own
CLIPS, STEPS, BATCH_SIZE = 2500, 2000, 32
MASKED_SHARE = 0.75


def build_model() -> VideoMAEForPreTraining:
    """Encoder of 1.4 million parameters and a decoder that is thrown away after the training; weights are random."""
    return VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=HEIGHT,
            patch_size=PATCH,
            num_frames=NUM_FRAMES,
            tubelet_size=TUBELET,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            layer_norm_eps=1e-6,
            decoder_hidden_size=96,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=3,
            decoder_intermediate_size=384,
            norm_pix_loss=False,
        )
    )


def train_teacher(output_dir: str | Path, *, scale: float = 1.0, seed: int = 0) -> VideoMAEModel:
    """
    Trains the teacher from nothing and saves its encoder as `config.json` and `model.safetensors`.

    Args:
        output_dir: receives the two files.
        scale: multiplies steps and number of clips; 1 made the shipped weights.
        seed: of the weights, the clips and the masks.

    Raises:
        ValueError: `scale` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"Expected `scale` > 0 (1 is the full run), got {scale}.")
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 5])
    first = 4_000_000 + 100_000 * seed
    number = round_up(CLIPS * scale)
    clips = np.stack([simulate(first + i).video[1:] for i in tqdm(range(number), desc="Simulating")])
    weights = np.concatenate([pixel_weights(clips[i : i + 1]) for i in range(number)])
    model = build_model().train()
    layers = [*model.videomae.encoder.layer.parameters(), *model.decoder.decoder_layers.parameters()]
    matrices = [p for p in layers if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon, adam = Muon(matrices, lr=2e-3), torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    steps = round_up(STEPS * scale)
    progress = tqdm(range(steps), desc="Teacher")
    for step in progress:
        factor = warm_cosine(step, steps, warmup=100)
        set_learning_rate(muon, 2e-3 * factor)
        set_learning_rate(adam, 1.5e-3 * factor)
        video, weight = sample_videos(clips, weights, rng)
        masked = random_masks(len(video), model.videomae.embeddings.num_patches)
        loss = reconstruction_loss(model, video, weight, masked)
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    model.videomae.eval().save_pretrained(output_dir)
    logger.info("Saved the teacher to %s.", output_dir)
    return model.videomae


def pixel_weights(clips: np.ndarray) -> np.ndarray:
    """
    uint8 `(N, T, H, W, 1)`, 9 around bodies and 1 elsewhere: a body covers a hundredth of the picture, and a plain
    mean over all pixels would hardly notice where it is.
    """
    return foreground_weight(to_tensor(clips)).permute(0, 2, 3, 4, 1).byte().numpy()


def sample_videos(clips: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`(B, T, 3, H, W)` in [0, 1] and the weights `(B, T, 1, H, W)` of its pixels; half of the clips mirrored."""
    rows, mirrored = rng.integers(len(clips), size=BATCH_SIZE), rng.random(BATCH_SIZE) < 0.5
    video, weight = clips[rows], weights[rows]
    for array in (video, weight):
        array[mirrored] = array[mirrored, :, :, ::-1]
    return torch.from_numpy(video).movedim(-1, 2).float() / 255, torch.from_numpy(weight).movedim(-1, 2).float()


def random_masks(batch_size: int, num_tokens: int) -> Tensor:
    """`(B, N)` bool: `MASKED_SHARE` of the tokens of each clip, anywhere in space and time."""
    return torch.rand(batch_size, num_tokens).argsort(1) < round(MASKED_SHARE * num_tokens)


def reconstruction_loss(model: VideoMAEForPreTraining, video: Tensor, weight: Tensor, masked: Tensor) -> Tensor:
    """Weighted squared error of the hidden pixels."""
    pixels = normalise(video)
    logits = model(pixels, bool_masked_pos=masked).logits
    target = patches(pixels)[masked].view_as(logits)
    weights = patches(weight.expand_as(pixels))[masked].view_as(logits)
    return (weights * (logits - target).square()).sum() / weights.sum()


def patches(video: Tensor) -> Tensor:
    """`(B, T, C, H, W)` -> `(B, N, tubelet * patch * patch * C)`, tokens in the order of the encoder."""
    split = video.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(1, (-1, TUBELET))
    # (B, T', tubelet, C, H', patch, W', patch) -> (B, T', H', W', tubelet, patch, patch, C)
    return split.permute(0, 1, 4, 6, 2, 5, 7, 3).flatten(4).flatten(1, 3)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder that receives the encoder")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies steps and number of clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_teacher(options.output, scale=options.scale, seed=options.seed)


if __name__ == "__main__":
    main()
