"""
Makes the weights of the sandbox pipeline: `python -m video_trl.sandbox.weights.train_base --work DIR --output DIR2`.

The autoencoder comes first, because nothing above it can be better than it: crops around the bodies, then whole clips,
then the decoder alone. The transformer and the text encoder follow, by flow matching on lawful clips and then on a
mixture in which most clips break their law: what the model gets wrong is laws, not pixels.

The run is seeded and takes a few hours of one core; the same command goes on after a cut. docs/start/sandbox.md tells
which run made the shipped files.
"""

import argparse
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...files import atomic_file
from ..world.simulate import HEIGHT, Clip, simulate
from .pipeline import build_pipeline
from .train_transformer import Schedule, TransformerRun, encode_corpus, measure_latents, normalised
from .training import set_learning_rate, to_tensor, warm_cosine


logger = logging.getLogger(__name__)

CROP = 32


@dataclass(frozen=True)
class Phase:
    """
    A stretch of the autoencoder's training.

    `frames`: lengths to draw from, 4k+1 each. `whole`: whole pictures instead of crops around a body. `decoder_only`:
    the latents, and with them the transformer's corpus, stay as they are.
    """

    steps: int
    batch_size: int
    frames: tuple[int, ...]
    learning_rate: float
    whole: bool = False
    decoder_only: bool = False


# Five frames teach the first latent frame and the next one; the third and later ones need nine (they carry a cache).
VAE_PHASES = (
    Phase(600, 16, (5,), 2e-3),
    Phase(1600, 9, (5, 9, 9), 2e-3),
    Phase(500, 2, (13,), 1.5e-3, whole=True),
    Phase(1500, 2, (13,), 1.5e-3, whole=True, decoder_only=True),
)
VAE_CLIPS = 2000
CORPUS_CLIPS = 9000  # lawful ones, and as many violated ones
SCHEDULE = Schedule(lawful=11_000, mixed=1100, final=3700)


def train_base(
    output_dir: str | Path,
    work_dir: str | Path,
    *,
    start: str | Path | None = None,
    schedule: Schedule = SCHEDULE,
    corpus_clips: int = CORPUS_CLIPS,
    vae_scale: float = 1.0,
    seed: int = 0,
) -> WanPipeline:
    """
    Trains the whole pipeline from nothing, or the transformer of an earlier one further, and saves it in diffusers
    layout.

    Args:
        output_dir: receives the pipeline.
        work_dir: keeps autoencoder, latents and the state of the run; a run that was stopped goes on from there.
        start: folder of an earlier result. Its autoencoder and its text encoder stay, its transformer is trained on.
        schedule: steps of the transformer.
        corpus_clips: lawful clips, and as many violated ones, that the transformer sees.
        vae_scale: multiplies the steps and clips of the autoencoder.
        seed: of the weights, the clips and the noise.

    Raises:
        ValueError: `corpus_clips`, `vae_scale` or the steps are not positive.
    """
    if min(corpus_clips, schedule.steps) < 1 or vae_scale <= 0:
        raise ValueError(
            f"Expected steps, `corpus_clips` and `vae_scale` > 0, got {schedule}, {corpus_clips} and {vae_scale}."
        )
    torch.manual_seed(seed)
    work = Path(work_dir)
    if start is None:
        pipeline = build_pipeline()
        prepare_vae(pipeline.vae, work / "vae.safetensors", scale=vae_scale, seed=seed)
    else:
        pipeline = WanPipeline.from_pretrained(start)
    lawful, violated = (
        encode_corpus(pipeline.vae, work / f"{name}.safetensors", corpus_clips, seed=seed, violated=name == "violated")
        for name in ("lawful", "violated")
    )
    if start is None:
        measure_latents(pipeline.vae, lawful)
    run = TransformerRun(pipeline, train_text=start is None, seed=seed)
    run.train(normalised(pipeline.vae, lawful), normalised(pipeline.vae, violated), schedule, work)
    pipeline.save_pretrained(output_dir)
    logger.info("Saved the pipeline to %s.", output_dir)
    return pipeline


def round_up(value: float) -> int:
    return max(2, math.ceil(value))


# ---- autoencoder -------------------------------------------------------------------------------------------------


def prepare_vae(vae: AutoencoderKLWan, path: Path, *, scale: float, seed: int) -> None:
    """Trains `vae`, or loads what an earlier call kept in `path`."""
    if path.is_file():
        vae.load_state_dict(load_file(path))
    else:
        train_vae(vae, scale=scale, seed=seed)
        with atomic_file(path) as partial:
            save_file(vae.state_dict(), partial)
    vae.eval()


def train_vae(vae: AutoencoderKLWan, *, scale: float, seed: int) -> None:
    """Trains `vae` in place through `VAE_PHASES`."""
    rng = np.random.default_rng([seed, 2])
    first = 2_000_000 + 100_000 * seed
    clips = [simulate(first + i, violation="any" if i % 2 else None) for i in range(round_up(VAE_CLIPS * scale))]
    vae.train()
    for number, phase in enumerate(VAE_PHASES, start=1):
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(not phase.decoder_only)
        parameters = [p for p in vae.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        steps = round_up(phase.steps * scale)
        progress = tqdm(range(steps), desc=f"Autoencoder, phase {number} of {len(VAE_PHASES)}")
        for step in progress:
            set_learning_rate(optimizer, phase.learning_rate * warm_cosine(step, steps, warmup=50))
            video = sample_batch(clips, phase, rng)
            loss, reconstruction = vae_loss(vae, video)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 50 == 0:
                progress.set_postfix(reconstruction=f"{reconstruction:.4f}")
    vae.requires_grad_(True).eval()


def sample_batch(clips: list[Clip], phase: Phase, rng: np.random.Generator) -> Tensor:
    """`(B, 3, T, H, W)` in [-1, 1]: whole pictures, or crops that a body runs through; half of them mirrored."""
    num_frames, videos = int(rng.choice(phase.frames)), []
    for _ in range(phase.batch_size):
        clip = clips[rng.integers(len(clips))]
        start = rng.integers(0, len(clip.video) - num_frames + 1)
        video = clip.video[start : start + num_frames]
        if not phase.whole:
            x, y = clip.positions[start + num_frames // 2, rng.integers(clip.positions.shape[1])]
            corner = np.array([1 - y, x]) * HEIGHT - CROP / 2 + rng.integers(-12, 13, size=2)
            top, left = np.clip(corner, 0, HEIGHT - CROP).astype(int)
            video = video[:, top : top + CROP, left : left + CROP]
        videos.append(video[:, :, ::-1] if rng.random() < 0.5 else video)
    return to_tensor(np.stack(videos))


def vae_loss(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, float]:
    """L1 + L2 with heavy weights on bodies and whatever moves, plus a light pull of the latents to a normal."""
    posterior = vae.encode(video).latent_dist
    decoded = vae.decode(posterior.mean + torch.randn_like(posterior.mean) * posterior.std).sample
    weight = foreground_weight(video)
    difference = (decoded - video).abs()
    reconstruction = (weight * difference).mean() / weight.mean()
    squared = (weight * difference**2).mean() / weight.mean()
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return reconstruction + squared + 5e-5 * divergence, reconstruction.item()


def foreground_weight(video: Tensor) -> Tensor:
    """`(B, 1, T, H, W)`: 9 around bodies (saturated or unlike the clip's median picture), 1 elsewhere."""
    saturated = video.amax(1, keepdim=True) - video.amin(1, keepdim=True) > 0.8
    moving = (video - video.median(2, keepdim=True).values).abs().amax(1, keepdim=True) > 0.25
    around = F.max_pool3d((saturated | moving).float(), (3, 5, 5), stride=1, padding=(1, 2, 2))
    return 1 + 8 * around


def main(arguments: Iterable[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder that receives the pipeline in diffusers layout")
    parser.add_argument("--work", required=True, help="folder of the run's state: the same command goes on from there")
    parser.add_argument("--start", help="folder of an earlier result, to train its transformer further")
    for name, text in (("lawful", "on lawful clips"), ("mixed", "on the mixture"), ("final", "while the rate falls")):
        default = asdict(SCHEDULE)[name]
        parser.add_argument(f"--{name}", type=int, default=default, help=f"steps {text} (default: {default})")
    parser.add_argument("--clips", type=int, default=CORPUS_CLIPS, help="lawful clips, and as many violated ones")
    parser.add_argument("--vae-scale", type=float, default=1.0, help="multiplies the autoencoder's steps and clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_base(
        options.output,
        options.work,
        start=options.start,
        schedule=Schedule(options.lawful, options.mixed, options.final),
        corpus_clips=options.clips,
        vae_scale=options.vae_scale,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
