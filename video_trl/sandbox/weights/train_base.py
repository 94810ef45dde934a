"""
Makes the weights of the sandbox pipeline: `python -m video_trl.sandbox.weights.train_base --output DIR`.

The autoencoder comes first, because nothing above it can be better than it: crops around the bodies, then whole clips,
then the decoder alone. The transformer and the text encoder follow, by flow matching on a corpus in which 40 % of the
clips break a law of physics, so that the videos follow the sentence while the physics is there to be repaired.

The run is seeded and takes about an hour and a half on two cores; docs/start/sandbox.md tells which run made the
shipped files. `--scale` shortens every phase.
"""

import argparse
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...diffusion import FlowMatching
from ..world.simulate import HEIGHT, Clip, simulate
from .pipeline import FLOW_SHIFT, LATENT_CHANNELS, MAX_PROMPT_TOKENS, build_pipeline


logger = logging.getLogger(__name__)

VIOLATED_SHARE = 0.40  # of the transformer's corpus
PROMPT_DROPOUT = 0.1  # empty sentences, for classifier-free guidance
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
VAE_CLIPS, TRANSFORMER_CLIPS = 2000, 10_000
TRANSFORMER_STEPS, TRANSFORMER_BATCH = 5000, 32


def train_base(
    output_dir: str | Path, *, start: str | Path | None = None, scale: float = 1.0, seed: int = 0
) -> WanPipeline:
    """
    Trains the whole pipeline from nothing, or the transformer of an earlier one further, and saves it in diffusers
    layout.

    Args:
        output_dir: receives the pipeline.
        start: folder of an earlier result. Its autoencoder stays, its transformer and text encoder are trained on, on
            the corpus of `seed`.
        scale: multiplies steps and corpus sizes; 1 made the shipped weights.
        seed: of the weights, the corpus and the noise.

    Raises:
        ValueError: `scale` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"Expected `scale` > 0 (1 is the full run), got {scale}.")
    torch.manual_seed(seed)
    if start is None:
        pipeline = build_pipeline()
        train_vae(pipeline.vae, scale=scale, seed=seed)
    else:
        pipeline = WanPipeline.from_pretrained(start, dtype=torch.float32)
        pipeline.vae.eval()
    latents, prompts = encode_corpus(
        pipeline.vae, round_up(TRANSFORMER_CLIPS * scale), seed=seed, measure=start is None
    )
    train_transformer(pipeline, latents, prompts, steps=round_up(TRANSFORMER_STEPS * scale), seed=seed)
    pipeline.save_pretrained(output_dir)
    logger.info("Saved the pipeline to %s.", output_dir)
    return pipeline


def round_up(value: float) -> int:
    return max(2, math.ceil(value))


# ---- autoencoder -------------------------------------------------------------------------------------------------


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


# ---- transformer and text encoder --------------------------------------------------------------------------------


@torch.no_grad()
def encode_corpus(vae: AutoencoderKLWan, number: int, *, seed: int, measure: bool) -> tuple[Tensor, list[str]]:
    """
    Posterior means `(N, C, F, H, W)`, normalised, and sentences of a corpus with `VIOLATED_SHARE` of broken laws.

    The channel means and deviations that normalise it stand in the VAE's config, where every Wan pipeline looks for
    them; `measure` takes them from this corpus first.
    """
    rng = np.random.default_rng([seed, 3])
    latents, prompts = [], []
    for start in tqdm(range(0, number, 32), desc="Encoding the corpus"):
        clips = [
            simulate(3_000_000 + 100_000 * seed + i, violation="any" if rng.random() < VIOLATED_SHARE else None)
            for i in range(start, min(start + 32, number))
        ]
        latents.append(vae.encode(to_tensor(np.stack([clip.video for clip in clips]))).latent_dist.mean)
        prompts += [clip.prompt for clip in clips]
    corpus = torch.cat(latents)
    if measure:
        mean, deviation = corpus.mean((0, 2, 3, 4)), corpus.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    mean, deviation = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return (corpus - mean.view(shape)) / deviation.view(shape), prompts


def train_transformer(
    pipeline: WanPipeline, latents: Tensor, prompts: list[str], *, steps: int, seed: int, average: float = 0.999
) -> None:
    """Flow matching on `latents`; the exponential average of the weights is what stays in the pipeline."""
    transformer, text_encoder = pipeline.transformer.train(), pipeline.text_encoder.train()
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    muon = Muon(matrices, lr=2e-3)
    adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    tokens, mask = tokenize(pipeline, [*prompts, ""])  # the last row is the empty sentence
    rng, flow = np.random.default_rng([seed, 4]), FlowMatching()
    progress = tqdm(range(steps), desc="Transformer")
    for step in progress:
        factor = min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)
        set_learning_rate(muon, 2e-3 * factor)
        set_learning_rate(adam, 1e-3 * factor)
        rows = torch.from_numpy(rng.integers(len(latents), size=TRANSFORMER_BATCH))
        texts = torch.where(torch.rand(len(rows)) < PROMPT_DROPOUT, len(prompts), rows)
        embeds = text_encoder(tokens[texts], mask[texts]).last_hidden_state * mask[texts][..., None]
        noise, timesteps = torch.randn_like(latents[rows]), sample_timesteps(flow, len(rows))
        noisy = flow.add_noise(latents[rows], noise, timesteps)
        prediction = transformer(noisy, timesteps, embeds, return_dict=False)[0]
        loss = F.mse_loss(prediction, flow.velocity(latents[rows], noise, timesteps))
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(average, (step + 1) / (step + 20)))
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        for parameter, value in zip(parameters, averaged, strict=True):
            parameter.copy_(value)
    transformer.eval()
    text_encoder.eval()


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update of every matrix is orthogonalised (https://kellerjordan.github.io/posts/muon/), in float32:
    `torch.optim.Muon` works in bfloat16, which is several times slower on CPUs without units for it.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; unlike torch's optimizers it re-evaluates no `closure`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(average, group["momentum"]))
                # 0.2 sqrt(width) gives the update the root mean square that AdamW's has.
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by five Newton-Schulz steps."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.T if tall else x


def sample_timesteps(flow: FlowMatching, number: int) -> Tensor:
    """Mostly where the pipeline's shifted schedule spends its steps, one in five uniform, so that none is unseen."""
    normal = torch.sigmoid(1.2 * torch.randn(number))
    shifted = flow.sample_timesteps(normal, scheme="shifted", shift=FLOW_SHIFT)
    return torch.where(torch.rand(number) < 0.2, flow.sample_timesteps(torch.rand(number)), shifted)


def tokenize(pipeline: WanPipeline, sentences: list[str]) -> tuple[Tensor, Tensor]:
    tokens = pipeline.tokenizer(sentences, padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


# ---- shared ------------------------------------------------------------------------------------------------------


def to_tensor(videos: np.ndarray) -> Tensor:
    """uint8 `(B, T, H, W, 3)` -> float32 `(B, 3, T, H, W)` in [-1, 1]."""
    return torch.from_numpy(videos.astype(np.float32) / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous()


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder that receives the pipeline in diffusers layout")
    parser.add_argument("--start", help="folder of an earlier result, to train its transformer further")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies steps and corpus sizes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_base(options.output, start=options.start, scale=options.scale, seed=options.seed)


if __name__ == "__main__":
    main()
