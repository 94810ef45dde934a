"""Configuration of PhyAugPipe."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ...files import without_secrets
from ..engine.manifest import Rule, digest
from ..engine.ray import RayCluster
from ..generate import VideoModel
from .annotation import RICH


_OPTIONS = ("text_annotator_options", "annotator_options", "model_options", "judge_options")


def public(options: dict[str, Any]) -> dict[str, Any]:
    """Options that decide a result: neither the key of a server nor how patiently it is asked."""
    private = ("api_key", "timeout", "max_retries", "backoff", "concurrency", "device", "cache")
    return {name: value for name, value in options.items() if name not in private}


@dataclass
class PhyAugConfig:
    """What to curate and how. Defaults are the paper's; where it has no number, docs/data/phyaug.md says why ours."""

    sources: list[str] = field(
        default_factory=list,
        metadata={"help": "Pool: folders, WebDataset tars, saved datasets or dataset ids with clips and captions."},
    )
    output_dir: str = field(
        default="outputs/phyaug",
        metadata={"help": "Folder of the run: stores, videos, manifest, groups. A run that was stopped goes on here."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of sources that are dataset ids."})
    video_column: str = field(default="video", metadata={"help": "Column of datasets with videos or paths."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of datasets with captions."})
    max_prompt_words: int = field(
        default=256, metadata={"help": "Pool: longest caption in words; text encoders cut what is longer."}
    )
    min_latin_proportion: float = field(
        default=0.8,
        metadata={
            "help": "Pool: smallest proportion of Latin letters in a caption. The embedding model and the judges read "
            "English; 0 for models that read every language."
        },
    )

    text_annotator: str | None = field(
        default=None,
        metadata={
            "help": "Filter, first of two stages: who reads the captions alone, named as 'annotator'. What passes is "
            "shown to 'annotator' with its frames, which corrects it. Unset: one stage."
        },
    )
    text_annotator_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Filter: its options, as a dict or JSON."}
    )
    min_text_richness: float = field(
        default=0.70, metadata={"help": "Filter: least richness of a caption that goes to the second stage."}
    )
    annotator: str = field(
        default="Qwen/Qwen2.5-VL-7B-Instruct",
        metadata={"help": "Filter: 'sandbox', a server's URL, or a repository id or folder of a Qwen-VL model."},
    )
    annotator_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Filter: options of the annotator, as a dict or JSON; a server needs 'model'."}
    )
    min_richness: float = field(default=RICH, metadata={"help": "Filter: least physics richness of Algorithm 1."})

    actions: str = field(
        default="real-world",
        metadata={
            "help": "Clustering: 'real-world' for the 200 categories that ship, a file with yours (.txt or .yaml), or "
            "'sandbox'."
        },
    )
    embedder: str = field(
        default="sentence-transformers/all-mpnet-base-v2",
        metadata={"help": "Clustering: repository id or folder of a sentence transformer, or 'sandbox'."},
    )
    min_similarity: float = field(
        default=-1.0, metadata={"help": "Clustering: least cosine to the nearest action. The paper drops none: -1."}
    )
    min_margin: float = field(
        default=0.0, metadata={"help": "Clustering: least distance from the second nearest action. The paper: 0."}
    )

    representatives: int = field(
        default=16, metadata={"help": "Difficulty: most representatives of a category (n_c), nearest ones first."}
    )
    tau: float = field(default=3.0, metadata={"help": "Sampling: how much hard categories are favoured; Eq. 1."})
    budget: int = field(default=20_000, metadata={"help": "Sampling: clips to take in all (N of Eq. 1)."})
    redistribute: bool = field(
        default=False, metadata={"help": "Sampling: offer what small categories leave over to the others."}
    )
    sample_seed: int = field(default=0, metadata={"help": "Sampling: decides which clips of a category are taken."})

    model: str = field(
        default="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        metadata={"help": "Generation: repository id or path of a text-to-video pipeline, or 'sandbox'."},
    )
    model_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Generation: revision, fps, dtype, call_kwargs, batch_size, as a dict or JSON."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={
            "help": "Generation: one rejected video for each seed; the first seed also makes the videos of the "
            "representatives."
        },
    )
    height: int = field(default=480, metadata={"help": "Height of every video in pixels; a multiple of 16."})
    width: int = field(default=832, metadata={"help": "Width of every video in pixels; a multiple of 16."})
    fps: float = field(default=16.0, metadata={"help": "Frames per second of every video."})
    num_frames: int = field(default=81, metadata={"help": "Frames of every video, 4k + 1."})

    judge: str = field(
        default="videocon-physics", metadata={"help": "Judge of generated videos: anything that `load_judge` knows."}
    )
    judge_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the judge, as a dict or JSON."}
    )

    batch_size: int = field(default=16, metadata={"help": "Clips that are computed and committed together."})
    engine: str = field(
        default="local",
        metadata={"help": "'local': this process, or all those of `accelerate launch`. 'ray': a Ray cluster."},
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Ray: address of the cluster, or 'auto'. Unset: this machine."}
    )
    ray_workers: int = field(default=2, metadata={"help": "Ray: most workers of a stage."})
    ray_gpus: float = field(default=0.0, metadata={"help": "Ray: GPUs of each worker of a stage with a model."})
    license: str | None = field(default=None, metadata={"help": "Dataset card: licence of the dataset."})
    license_notes: str = field(
        default="", metadata={"help": "Dataset card: licences of the sources and models, in words."}
    )

    def __post_init__(self) -> None:
        for name in _OPTIONS:
            value = vars(self)[name]
            setattr(self, name, json.loads(value) if isinstance(value, str) else value)
        if not self.actions:
            raise ValueError(
                "`actions` is needed: 'real-world', a .txt file with an action a line, or a .yaml file with wordings."
            )
        units = ("min_richness", "min_text_richness", "min_latin_proportion")
        if not all(0 <= vars(self)[name] <= 1 for name in units) or self.max_prompt_words < 1:
            raise ValueError(
                f"Expected {', '.join(f'`{name}`' for name in units)} in [0, 1] and `max_prompt_words` >= 1, got "
                f"{', '.join(str(vars(self)[name]) for name in (*units, 'max_prompt_words'))}."
            )
        if not -1 <= self.min_similarity <= 1 or not 0 <= self.min_margin <= 2:
            raise ValueError(
                f"Expected `min_similarity` in [-1, 1] and `min_margin` in [0, 2], got {self.min_similarity} and "
                f"{self.min_margin}: both are about cosines."
            )
        if self.representatives < 1 or self.budget < 1 or not 0 <= self.tau < float("inf"):
            raise ValueError(
                f"Expected `representatives` >= 1, `budget` >= 1 and `tau` >= 0, got {self.representatives}, "
                f"{self.budget} and {self.tau}."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"Each seed generates one rejected video: expected one or more different seeds, got {self.seeds}."
            )
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            near = max(self.num_frames // 4 * 4 + 1, 1)
            raise ValueError(f"`num_frames` must be 4k + 1 for the VAEs, got {self.num_frames}. Use {near}.")
        if min(self.height, self.width) < 16 or self.height % 16 or self.width % 16 or self.fps <= 0:
            raise ValueError(
                f"Expected `height` and `width` in multiples of 16 and `fps` > 0, got {self.height}, {self.width} and "
                f"{self.fps}."
            )
        if self.batch_size < 1 or self.engine not in ("local", "ray"):
            raise ValueError(
                f"Expected `batch_size` >= 1 and `engine` 'local' or 'ray', got {self.batch_size} and {self.engine!r}."
            )
        self.video_model()  # raises for options that no model has
        self.cluster()

    def options(self, name: str) -> dict[str, Any]:
        """One of the fields that end in `_options` as a dict."""
        value = vars(self)[name]
        assert not isinstance(value, str)
        return dict(value or {})

    def video_model(self) -> VideoModel:
        try:
            return VideoModel(self.model, **self.options("model_options"))
        except TypeError as error:
            raise ValueError(
                f"`model_options`: {error}. Known: revision, fps, dtype, call_kwargs, batch_size."
            ) from error

    def cluster(self, *, gpu: bool = False) -> RayCluster:
        """Where stages run if the engine is Ray; those without a model take no GPU."""
        return RayCluster(self.ray_address, self.ray_workers, gpus=self.ray_gpus if gpu else 0.0)

    def pool_rules(self) -> list[Rule]:
        """What a clip must have before a model looks at it. 81 frames at 16 fps are 5 s, give or take a frame."""
        return [
            Rule("too_short", "seconds", minimum=(self.num_frames - 1.5) / self.fps),
            Rule("long_prompt", "prompt_words", maximum=self.max_prompt_words),
            Rule("other_script", "latin_proportion", minimum=self.min_latin_proportion),
        ]

    def settings(self) -> dict[str, Any]:
        """What decides the result and may be shown; where and how fast it is computed does not."""
        elsewhere = ("output_dir", "engine", "ray_address", "ray_workers", "ray_gpus", "batch_size")
        settings = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        shown: dict[str, Any] = without_secrets(settings | {name: public(self.options(name)) for name in _OPTIONS})
        return shown

    @property
    def fingerprint(self) -> str:
        """Of the settings, 16 hexadecimal digits."""
        return digest(json.dumps(self.settings(), sort_keys=True, default=str))
