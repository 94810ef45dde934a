"""
Flow matching of the sandbox's transformer and text encoder: lawful clips first, until it draws them precisely, then a
mixture in which most clips break their law.

The learning rate is warmed up, stays, and falls to zero at the end. A run keeps its state every two minutes and goes
on from there; how many steps are left may be chosen anew then, so that the final leg can start at any state.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...diffusion import FlowMatching
from ...files import atomic_file
from ..world.prompts import BASE_MOTIONS
from ..world.simulate import BASE_VIOLATIONS, Clip, simulate
from .pipeline import FLOW_SHIFT, LATENT_CHANNELS, MAX_PROMPT_TOKENS
from .training import Muon, bfloat16_layers, set_learning_rate, to_tensor


logger = logging.getLogger(__name__)

VIOLATED_SHARE = 0.57  # of the mixture
PROMPT_DROPOUT = 0.1  # empty sentences, for classifier-free guidance
BATCH_SIZE, WARMUP = 32, 100
MUON_RATE, ADAM_RATE, AVERAGE = 2e-3, 1e-3, 0.999
STATE_NAME, STATE_SECONDS = "state.safetensors", 120.0
_FIRST_SEED = 30_000_000  # away from the seeds of every dataset and of the held-out clips


@dataclass(frozen=True)
class Schedule:
    """Steps on lawful clips, on the mixture, and on the mixture with a learning rate that falls to zero."""

    lawful: int
    mixed: int
    final: int

    @property
    def steps(self) -> int:
        return self.lawful + self.mixed + self.final

    def rate(self, step: int) -> float:
        """Factor of the learning rates."""
        return min(1.0, (step + 1) / WARMUP, (self.steps - step) / max(1, self.final))

    def violated_share(self, step: int) -> float:
        return 0.0 if step < self.lawful else VIOLATED_SHARE


@dataclass(frozen=True)
class Corpus:
    """Normalised latents `(N, C, F, H, W)` of clips, and their sentences."""

    latents: Tensor
    prompts: list[str]


@torch.no_grad()
def encode_corpus(vae: AutoencoderKLWan, path: Path, number: int, *, seed: int, violated: bool) -> Corpus:
    """
    Posterior means, as they come, of clips that obey their laws or, with `violated`, break one of `BASE_VIOLATIONS`.

    They are kept in the safetensors file `path`, and found there by the next call.

    Raises:
        ValueError: `path` holds another number of clips.
    """
    if not path.is_file():
        latents, prompts = [], []
        for start in tqdm(range(0, number, 32), desc=f"Encoding {path.stem} clips"):
            clips = [_corpus_clip(index, seed, violated) for index in range(start, min(start + 32, number))]
            with torch.autocast("cpu", torch.bfloat16):
                encoded = vae.encode(to_tensor(np.stack([clip.video for clip in clips]))).latent_dist.mean
            latents.append(encoded.float())
            prompts += [clip.prompt for clip in clips]
        with atomic_file(path) as partial:
            save_file({"latents": torch.cat(latents)}, partial, metadata={"prompts": json.dumps(prompts)})
    with safe_open(path, framework="pt") as file:
        corpus = Corpus(file.get_tensor("latents"), json.loads(file.metadata()["prompts"]))
    if len(corpus.prompts) != number:
        raise ValueError(f"{path} holds {len(corpus.prompts)} clips, expected {number}. Pass another folder.")
    return corpus


def _corpus_clip(index: int, seed: int, violated: bool) -> Clip:
    motion = BASE_MOTIONS[index % len(BASE_MOTIONS)]
    options = BASE_VIOLATIONS[motion]
    violation = options[index // len(BASE_MOTIONS) % len(options)] if violated else None
    first = _FIRST_SEED + 1_000_000 * seed + 500_000 * violated
    return simulate(first + index, motion=motion, violation=violation)


def measure_latents(vae: AutoencoderKLWan, corpus: Corpus) -> None:
    """Writes channel means and deviations into the VAE's config, where every Wan pipeline looks for them."""
    mean, deviation = corpus.latents.mean((0, 2, 3, 4)), corpus.latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def normalised(vae: AutoencoderKLWan, corpus: Corpus) -> Corpus:
    """The corpus on the transformer's scale, by what the VAE's config says."""
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    mean, deviation = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return Corpus((corpus.latents - mean.view(shape)) / deviation.view(shape), corpus.prompts)


class TransformerRun:
    """
    Training that can be cut at any moment.

    Every step draws from a generator of its own, so that a run that goes on from its state makes what it would have
    made without the cut.

    Args:
        pipeline: transformer and text encoder are trained in place.
        train_text: False leaves the text encoder as it is.
        seed: of rows, noise and timesteps.
    """

    def __init__(self, pipeline: WanPipeline, *, train_text: bool, seed: int) -> None:
        self.pipeline, self.train_text, self.seed, self.done = pipeline, train_text, seed, 0
        modules = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
        self.parameters = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            if name == "transformer" or train_text
            for key, parameter in module.named_parameters()
        }
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        matrices = {
            f"transformer.blocks.{n}" for n, p in pipeline.transformer.blocks.named_parameters() if p.ndim == 2
        }
        self.muon = Muon([p for n, p in self.parameters.items() if n in matrices], lr=MUON_RATE)
        others = [p for n, p in self.parameters.items() if n not in matrices]
        self.adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.flow = FlowMatching()

    def train(self, lawful: Corpus, violated: Corpus, schedule: Schedule, folder: Path) -> None:
        """Goes through `schedule`, from the state in `folder` if there is one; the averaged weights are what stays."""
        state = folder / STATE_NAME
        if state.is_file():
            self.load(state)
        latents = torch.cat([lawful.latents, violated.latents])
        # The last row of the sentences is the empty one.
        tokens, mask = tokenize(self.pipeline, [*lawful.prompts, *violated.prompts, ""])
        kept, losses = time.monotonic(), []
        with bfloat16_layers(self.pipeline.transformer):
            while self.done < schedule.steps:
                rng = np.random.default_rng([self.seed, 4, self.done])
                rows = draw_rows(rng, len(lawful.prompts), len(violated.prompts), schedule.violated_share(self.done))
                losses.append(self.step(latents, tokens, mask, rows, rng, schedule.rate(self.done)))
                if self.done % 100 == 0:
                    logger.info("Step %d of %d, loss %.4f", self.done, schedule.steps, np.mean(losses[-100:]))
                if time.monotonic() - kept > STATE_SECONDS or self.done == schedule.steps:
                    self.save(state)
                    kept = time.monotonic()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])

    def step(
        self, latents: Tensor, tokens: Tensor, mask: Tensor, rows: np.ndarray, rng: np.random.Generator, rate: float
    ) -> float:
        """One update of the weights and of their average; returns the loss."""
        torch.manual_seed(int(rng.integers(2**62)))
        clean, texts = latents[rows], torch.from_numpy(rows)
        texts = torch.where(torch.rand(len(rows)) < PROMPT_DROPOUT, len(tokens) - 1, texts)
        with torch.set_grad_enabled(self.train_text):
            embeds = self.pipeline.text_encoder(tokens[texts], mask[texts]).last_hidden_state * mask[texts][..., None]
        noise, timesteps = torch.randn_like(clean), sample_timesteps(self.flow, len(rows))
        noisy = self.flow.add_noise(clean, noise, timesteps)
        prediction = self.pipeline.transformer(noisy, timesteps, embeds, return_dict=False)[0]
        loss = F.mse_loss(prediction, self.flow.velocity(clean, noise, timesteps))
        set_learning_rate(self.muon, MUON_RATE * rate)
        set_learning_rate(self.adam, ADAM_RATE * rate)
        self.muon.zero_grad()
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.muon.step()
        self.adam.step()
        self.done += 1
        with torch.no_grad():
            decay = min(AVERAGE, self.done / (self.done + 19))
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return loss.item()

    def save(self, path: Path) -> None:
        """Everything that the next step depends on, as safetensors; replaces the earlier state at once."""
        tensors = {f"weight/{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average/{n}": value for n, value in self.average.items()}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for optimizer in (self.muon, self.adam):
            for parameter, values in optimizer.state.items():
                tensors |= {f"{key}/{names[id(parameter)]}": value for key, value in values.items()}
        with atomic_file(path) as partial:
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial, {"step": str(self.done)})

    def load(self, path: Path) -> None:
        """Takes over what `save` kept."""
        with safe_open(path, framework="pt") as file:
            self.done = int(file.metadata()["step"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
                self.average[name] = tensors[f"average/{name}"]
        keys = {id(self.muon): ("momentum",), id(self.adam): ("step", "exp_avg", "exp_avg_sq")}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for optimizer in (self.muon, self.adam):
            for parameter in optimizer.param_groups[0]["params"]:
                name = names[id(parameter)]
                optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in keys[id(optimizer)]}
        logger.info("Goes on after step %d, from %s.", self.done, path)


def draw_rows(rng: np.random.Generator, lawful: int, violated: int, share: float) -> np.ndarray:
    """`(BATCH_SIZE,)` indices of the lawful rows and, in `share` of the places, of the violated ones behind them."""
    broken = rng.random(BATCH_SIZE) < share
    return np.where(broken, lawful + rng.integers(violated, size=BATCH_SIZE), rng.integers(lawful, size=BATCH_SIZE))


def sample_timesteps(flow: FlowMatching, number: int) -> Tensor:
    """Mostly where the pipeline's shifted schedule spends its steps, one in five uniform, so that none is unseen."""
    normal = torch.sigmoid(1.2 * torch.randn(number))
    shifted = flow.sample_timesteps(normal, scheme="shifted", shift=FLOW_SHIFT)
    return torch.where(torch.rand(number) < 0.2, flow.sample_timesteps(torch.rand(number)), shifted)


def tokenize(pipeline: WanPipeline, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `(N, MAX_PROMPT_TOKENS)` each."""
    tokens = pipeline.tokenizer(sentences, padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask
