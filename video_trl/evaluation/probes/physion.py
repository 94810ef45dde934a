"""
Linear probes on Physion's object contact prediction, with frozen features of a model, a teacher or the pixels.

From the first frames of a clip, a logistic regression predicts whether two objects will touch.

Source: VideoREPA (https://huggingface.co/papers/2505.23656), Figure 1 and appendix B, which leave noise level, prompt,
pooling, training scenarios and regularisation open; here they are arguments and stand in the result. Needs
scikit-learn: `pip install video-trl[evaluation]`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ...data.probe_clips import ProbeClip
from ...files import read_json
from ...models import family_of, tap_block
from ...teachers import VideoTeacher
from ..statistics import wilson_interval
from .physion_stimuli import BAD_STIMULI


# uint8 clips (B, T, H, W, 3) -> float32 features (B, K, D): K kinds, such as noise levels; the probe chooses one
Features = Callable[[Tensor], Tensor]

#: Physion's scenarios and the word in a file's name that tells each. Rolling objects collide too: "roll" comes first.
SCENARIO_WORDS = {
    "roll": "roll",
    "collision": "collision",
    "drop": "drop",
    "towers": "towers",
    "link": "link",
    "contain": "contain",
    "dominoes": "dominoes",
}
LABELS_NAME = "all_video_labels.json"
NOISE_LEVELS = (0.1, 0.3, 0.5)
C_GRID = (1e-6, 1e-5, 0.01, 0.1, 1.0, 5.0, 10.0, 20.0)  # Physion v1.5's readout
CELLS = (2, 3)
NUM_SLICES = 3


def read_physion(
    folder: str | Path,
    split: str,
    *,
    num_frames: int = 49,
    frame_step: int = 1,
    bad_stimuli: Collection[str] | None = None,
) -> list[ProbeClip]:
    """
    Clips of Physion v1.5 as published: `<folder>/physion_mp4s/{train,test}/*.mp4` with `all_video_labels.json`.

    A clip shows frames up to 45 (up to 15 where objects collide), every `frame_step`-th, and is padded in front with
    the first of them to `num_frames`, as in the published evaluation.

    Args:
        folder (`str` or `Path`): Where the archive was unpacked.
        split (`str`): `"train"` or `"test"`.
        num_frames (`int`, defaults to `49`): Frames of a clip; at least as many as the step leaves.
        frame_step (`int`, defaults to `1`): Distance of the frames.
        bad_stimuli (`Collection[str]`, *optional*): Names, without ending, of faulty clips to leave out; by default
            those of the published evaluation, which concern the test split only.

    Returns:
        `list[ProbeClip]`: Sorted by name.

    Raises:
        ValueError: If the folder has another layout, a clip has no label, or its name tells no scenario, or several.
    """
    home = Path(folder) / "physion_mp4s" / split
    paths = sorted(home.glob("*.mp4"))
    if not paths or not (home / LABELS_NAME).is_file():
        raise ValueError(
            f"Expected mp4 files and {LABELS_NAME} in {home}, got {len(paths)} files. Unpack the published archive "
            "and pass the folder that holds `physion_mp4s`; splits are 'train' and 'test'."
        )
    if bad_stimuli is None:
        bad_stimuli = BAD_STIMULI if split == "test" else ()
    labels = read_json(home / LABELS_NAME)
    clips = []
    for path in paths:
        if path.stem in bad_stimuli:
            continue
        if path.stem not in labels:
            raise ValueError(f"{home / LABELS_NAME} has no label of {path.name}. Unpack the archive again.")
        scenario = scenario_of(path.stem)
        last = 15 if scenario == "collision" else 45
        frames = list(range(last, -1, -frame_step))[::-1]
        if len(frames) > num_frames:
            raise ValueError(
                f"`frame_step={frame_step}` leaves {len(frames)} frames, more than `num_frames={num_frames}`. "
                "Raise one of them."
            )
        frames = [frames[0]] * (num_frames - len(frames)) + frames
        clips.append(ProbeClip(path.stem, str(path), bool(labels[path.stem]["label"]), scenario, tuple(frames)))
    return clips


def scenario_of(name: str) -> str:
    """Scenario of a Physion clip by its file name alone: folders on the way to it may hold any of the words."""
    scenarios = [scenario for scenario, word in SCENARIO_WORDS.items() if word in name.lower()]
    if scenarios[:2] == ["roll", "collision"]:
        scenarios.remove("collision")
    if len(scenarios) != 1:
        raise ValueError(
            f"The name of a clip must tell one of {list(SCENARIO_WORDS)}, got {name!r}: {scenarios or 'none'}."
        )
    return scenarios[0]


# ---- Features ------------------------------------------------------------------------------------


class DiffusionFeatures:
    """
    Hidden states of a pipeline's transformer, with whatever adapter is loaded, for clips with given amounts of noise.

    Args:
        pipeline (`DiffusionPipeline`): Its VAE encodes the clips; its transformer is run once for each.
        block (`int`): Block whose output is taken, counted from 1.
        noise_levels (`Sequence[float]`, *optional*): In (0, 1), fractions of the schedule; one kind of features each.
            The noise is the same for all clips and levels.
        prompt (`str`, defaults to `""`): Prompt of all clips.
        num_slices (`int`, defaults to `3`): Token frames that are kept, evenly spaced behind the first one.
        cells (`tuple[int, int]`, *optional*, defaults to `(2, 3)`): Rows and columns that each token frame is pooled
            to; None for all its tokens, as the appendix of VideoREPA says.
        seed (`int`, defaults to `0`): Of the noise.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        block: int,
        noise_levels: Sequence[float] = NOISE_LEVELS,
        prompt: str = "",
        num_slices: int = NUM_SLICES,
        cells: tuple[int, int] | None = CELLS,
        seed: int = 0,
    ) -> None:
        if not noise_levels or not all(0 < level < 1 for level in noise_levels):
            raise ValueError(f"`noise_levels` are fractions of the schedule in (0, 1), got {list(noise_levels)}.")
        self.pipeline, self.transformer = pipeline, pipeline.transformer
        self.family = family_of(pipeline)
        num_blocks = len(self.family.blocks(self.transformer))
        if not 1 <= block <= num_blocks:
            raise ValueError(f"`block` must be in [1, {num_blocks}], got {block}.")
        self.block, self.noise_levels, self.seed = block, tuple(noise_levels), seed
        self.num_slices, self.cells = num_slices, cells
        if self.family.row_columns != self.family.prompt_columns:
            raise ValueError(
                f"Expected a text-to-video pipeline, got {type(pipeline).__name__}, whose transformer is also "
                f"conditioned on {list(self.family.row_columns[len(self.family.prompt_columns) :])} of a video. Probe "
                "a model that takes a prompt alone."
            )
        tokens = self.family.prompt_length(self.transformer) or min(pipeline.tokenizer.model_max_length, 512)
        encoded = self.family.encode_prompt(pipeline, [prompt], tokens)
        self.conditions = self.family.pad_prompts(encoded, tokens)  # (1, ...) each

    def __call__(self, video: Tensor) -> Tensor:
        """Features `(B, K, D)`, float32, of clips `(B, T, H, W, 3)`, uint8, at the K noise levels."""
        return self.of_latents(self.encode(video))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents `(B, C, F, H, W)` of clips: worth keeping where several transformers share a VAE."""
        pixels = video.to(self.conditions["prompt_embeds"].device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return self.family.encode_video(self.pipeline.vae, pixels)

    @torch.no_grad()
    def of_latents(self, latents: Tensor) -> Tensor:
        """`__call__` for clips that are encoded already."""
        device = self.conditions["prompt_embeds"].device
        latents = latents.to(device)
        grid = self.family.token_grid(self.transformer, latents.shape)
        conditions = {name: value.expand(len(latents), *value.shape[1:]) for name, value in self.conditions.items()}
        generator = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn(latents.shape[1:], generator=generator).to(device).expand_as(latents)
        process = self.family.noise_process
        kinds = []
        for level in self.noise_levels:
            u = torch.full((len(latents),), level, dtype=torch.float64, device=device)
            timesteps = process.sample_timesteps(u, scheme="uniform")
            noisy = process.add_noise(latents, noise, timesteps)
            with tap_block(self.family, self.transformer, self.block - 1) as tap:
                self.family.predict(self.transformer, noisy, timesteps, conditions)
            assert tap.tokens is not None
            tokens = tap.tokens.float().unflatten(1, grid)[:, 1:]
            kinds.append(pool_tokens(tokens, self.num_slices, self.cells))
        return torch.stack(kinds, dim=1).cpu()


class TeacherFeatures:
    """
    Tokens of a frozen video encoder, pooled as [`DiffusionFeatures`] pools hidden states: the ceiling of the probe.

    Args:
        teacher (`VideoTeacher`): The encoder.
        num_slices (`int`), cells (`tuple[int, int]`): As in [`DiffusionFeatures`].
    """

    def __init__(
        self, teacher: VideoTeacher, *, num_slices: int = NUM_SLICES, cells: tuple[int, int] | None = CELLS
    ) -> None:
        self.teacher, self.num_slices, self.cells = teacher, num_slices, cells

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Features `(B, 1, D)`, float32, of clips `(B, T, H, W, 3)`, uint8."""
        output = self.teacher(video.permute(0, 1, 4, 2, 3).float() / 255)
        tokens = output.tokens.float().unflatten(2, output.grid[1:])[:, output.frame_times >= 1.0]
        return pool_tokens(tokens, self.num_slices, self.cells)[:, None].cpu()


class PixelFeatures:
    """The frames themselves, pooled likewise to a finer grid: what the probe makes of positions without any model."""

    def __init__(self, *, num_slices: int = NUM_SLICES, cells: tuple[int, int] = (8, 8)) -> None:
        self.num_slices, self.cells = num_slices, cells

    def __call__(self, video: Tensor) -> Tensor:
        """Features `(B, 1, D)`, float32, of clips `(B, T, H, W, 3)`, uint8."""
        return pool_tokens(video[:, 1:].float() / 255, self.num_slices, self.cells)[:, None].cpu()


def pool_tokens(tokens: Tensor, num_slices: int, cells: tuple[int, int] | None) -> Tensor:
    """
    Mean tokens of a few areas in a few frames.

    Args:
        tokens (`torch.Tensor` of shape `(B, F, H, W, D)`): Tokens on their grid.
        num_slices (`int`): Frames that are kept, evenly spaced from the first to the last; all where there are fewer.
        cells (`tuple[int, int]`, *optional*): Rows and columns of areas; None: every token is one.

    Returns:
        `torch.Tensor` of shape `(B, slices * D * rows * columns)`.
    """
    indices = torch.linspace(0, tokens.shape[1] - 1, min(num_slices, tokens.shape[1])).round().long()
    images = tokens[:, indices.to(tokens.device)].flatten(0, 1).permute(0, 3, 1, 2)  # (B * slices, D, H, W)
    return (images if cells is None else F.adaptive_avg_pool2d(images, cells)).reshape(len(tokens), -1)


def extract_features(
    features: Features,
    clips: Sequence[ProbeClip],
    *,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    description: str = "Extracting features",
) -> npt.NDArray[np.float32]:
    """
    Features of clips, float32 `(N, K, D)`.

    Raises:
        ValueError: If a feature is not finite; names its clip.
    """
    batches = []
    for start in tqdm(range(0, len(clips), batch_size), desc=description, unit="batch"):
        chunk = clips[start : start + batch_size]
        videos = np.stack([clip.read(height, width) for clip in chunk])
        batch = features(torch.from_numpy(videos)).numpy()
        for clip, row in zip(chunk, batch, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(f"{clip.name}: a feature is not finite. Run the model in float32.")
        batches.append(batch)
    return np.concatenate(batches)


# ---- The probe -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeResult:
    """
    A fitted probe on test clips.

    Attributes:
        c (`float`): Inverse regularisation that cross-validation chose.
        cv_accuracy (`float`): Mean accuracy in cross-validation with it, on the training clips.
        scenarios (`tuple[str, ...]`): Scenario of each test clip.
        correct (`tuple[bool, ...]`): Whether each test clip was answered right.
        probabilities (`tuple[float, ...]`): Probability given to "they will touch".
        kind (`int`): Which of the kinds of features it is, such as the number of the noise level.
    """

    c: float
    cv_accuracy: float
    scenarios: tuple[str, ...]
    correct: tuple[bool, ...]
    probabilities: tuple[float, ...]
    kind: int = 0

    def counts(self, scenario: str | None = None) -> tuple[int, int]:
        """Right answers and clips, of one scenario or of all."""
        correct = [right for right, name in zip(self.correct, self.scenarios, strict=True) if scenario in (None, name)]
        return sum(correct), len(correct)

    def accuracy(self, scenario: str | None = None) -> tuple[float, float, float]:
        """Proportion of right answers with its Wilson interval (95 %)."""
        right, clips = self.counts(scenario)
        return (right / clips, *wilson_interval(right, clips))


def fit_probe(
    train_features: npt.NDArray[np.float32],
    train: Sequence[ProbeClip],
    test_features: npt.NDArray[np.float32],
    test: Sequence[ProbeClip],
    *,
    c_grid: Sequence[float] = C_GRID,
    num_folds: int = 5,
    seed: int = 42,
) -> ProbeResult:
    """
    Standardise, choose C by stratified cross-validation on the training clips, fit on all of them, answer the others.

    With more features than clips the features are rotated into the span of the training clips first: it changes no
    answer of an L2-regularised regression, and makes its cost independent of their number.

    Args:
        train_features (array of shape `(N, D)`), test_features (array of shape `(M, D)`): Features.
        train (`Sequence[ProbeClip]`), test (`Sequence[ProbeClip]`): The clips, for labels and scenarios.
        c_grid (`Sequence[float]`, *optional*): Inverse regularisations tried; by default those of Physion's readout.
        num_folds (`int`, defaults to `5`): Folds of cross-validation.
        seed (`int`, defaults to `42`): Of the folds.

    Returns:
        [`ProbeResult`]

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer clips of a label than folds.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
    except ImportError as error:
        raise ImportError("The probe needs scikit-learn: `pip install video-trl[evaluation]`.") from error
    labels = np.array([clip.label for clip in train])
    fewest = min(int(labels.sum()), int((~labels).sum()))
    if fewest < num_folds:
        raise ValueError(f"{num_folds} folds need as many clips of each answer, got {fewest}. Use more clips.")
    mean, scale = train_features.mean(axis=0, dtype=np.float64), train_features.std(axis=0, dtype=np.float64)
    scale[scale < 1e-12] = 1.0  # a constant feature says nothing
    x, y = ((features - mean) / scale for features in (train_features, test_features))
    if x.shape[1] > x.shape[0]:
        _, _, rotation = np.linalg.svd(x, full_matrices=False)
        x, y = x @ rotation.T, y @ rotation.T
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=20_000), {"C": list(c_grid)}, cv=folds)
    search.fit(x, labels)
    probabilities = search.predict_proba(y)[:, 1]
    answers = search.predict(y)
    return ProbeResult(
        c=float(search.best_params_["C"]),
        cv_accuracy=float(search.best_score_),
        scenarios=tuple(clip.scenario for clip in test),
        correct=tuple(bool(answer == clip.label) for answer, clip in zip(answers, test, strict=True)),
        probabilities=tuple(float(probability) for probability in probabilities),
    )


def probe_features(
    features: Features,
    train: Sequence[ProbeClip],
    test: Sequence[ProbeClip],
    *,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    c_grid: Sequence[float] = C_GRID,
    name: str = "model",
) -> ProbeResult:
    """
    Fit a probe on the kind of features that cross-validation on the training clips favours, and test it.

    Args:
        features (`Features`): Such as [`DiffusionFeatures`], whose kinds are noise levels.
        train (`Sequence[ProbeClip]`), test (`Sequence[ProbeClip]`): Clips.
        batch_size (`int`, defaults to `16`): Clips in one call.
        height (`int`, *optional*), width (`int`, *optional*): Size that the clips are brought to.
        c_grid (`Sequence[float]`, *optional*): As in [`fit_probe`].
        name (`str`, defaults to `"model"`): Shown by the progress bar.

    Returns:
        [`ProbeResult`]: Its `kind` is the number of the features that were chosen.
    """
    size: dict[str, int | None] = {"height": height, "width": width}
    train_features, test_features = (
        extract_features(features, clips, batch_size=batch_size, description=f"{name}, {split}", **size)
        for split, clips in (("train", train), ("test", test))
    )
    results = [
        replace(fit_probe(train_features[:, kind], train, test_features[:, kind], test, c_grid=c_grid), kind=kind)
        for kind in range(train_features.shape[1])
    ]
    return max(results, key=lambda result: result.cv_accuracy)


def probe_table(results: Mapping[str, ProbeResult]) -> str:
    """Accuracy of each model by scenario and over all, with counts and Wilson intervals, as a Markdown table."""
    scenarios = list(dict.fromkeys(next(iter(results.values())).scenarios))
    lines = ["| features | " + " | ".join([*scenarios, "all"]) + " |", "|---" * (len(scenarios) + 2) + "|"]
    for name, result in results.items():
        cells = []
        for scenario in (*scenarios, None):
            accuracy, low, high = result.accuracy(scenario)
            right, clips = result.counts(scenario)
            cells.append(f"{accuracy:.3f} [{low:.2f}, {high:.2f}] {right}/{clips}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
