"""
Load a pipeline, judge, teacher or dataset by its name.

This is the only module that knows what the name "sandbox" means. Importing it is cheap: the code behind a name is
imported when that name is loaded. No module that it loads from may import it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    import datasets
    import torch
    from diffusers import DiffusionPipeline
    from transformers import TrainingArguments

    from .data.probe_clips import ProbeClip
    from .judges.base import VideoJudge
    from .teachers.base import VideoTeacher


# What diffusers calls the argument since 0.40. It passes over a name that it does not know, and would load float32.
DTYPE_OPTION = "dtype" if tuple(map(int, version("diffusers").split(".")[:2])) >= (0, 40) else "torch_dtype"
SANDBOX = "sandbox"  # the pipeline, judge, teacher and prompts that ship with the package

_JUDGES = ("videocon-physics", "videophy2", "videoscore2", "videoalign", "qwen-vl")
_JUDGE_REPOSITORIES = {
    "videophysics/videocon_physics": "videocon-physics",
    "videophysics/videophy_2_auto": "videophy2",
    "TIGER-Lab/VideoScore2": "videoscore2",
    "KwaiVGI/VideoReward": "videoalign",
}
_TEACHER_FILES = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".torch")


# ---- pipelines ------------------------------------------------------------------------------------------------------


def load_pipeline(name: str, **options: Any) -> "DiffusionPipeline":
    """
    Loads a pipeline.

    Args:
        name (`str`): `"sandbox"`, or a repository id or path of a pipeline in diffusers layout.
        options: Arguments of `DiffusionPipeline.from_pretrained`; `dtype` goes by its name in the installed version.
            The sandbox's pipeline, float32 on the CPU, takes none.

    Raises:
        ValueError: If options are given for the sandbox, or the name is that of a file.
        OSError: If there is no such folder or repository.
    """
    if name == SANDBOX:
        if options:
            raise ValueError(f"{sorted(options)} have no use with {SANDBOX!r}, which is part of the package.")
        from .sandbox.weights.pipeline import load_sandbox

        return load_sandbox().pipeline
    refuse_file(name)
    from diffusers import DiffusionPipeline

    named = {DTYPE_OPTION if option == "dtype" else option: value for option, value in options.items()}
    return DiffusionPipeline.from_pretrained(name, **named)


def refuse_file(name: str) -> None:
    """Raise a `ValueError` if what should name a pipeline is a file: weights of a part of one."""
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file; expected a folder, or a repository on the Hub, of a whole pipeline in diffusers "
            "layout. Name the pipeline that it belongs to, and give the file as `transformer_file` where it holds a "
            "transformer, as `init_adapter` or `--adapter` where it is a LoRA."
        )


def pipeline_source(name: str) -> str:
    """What diffusers loads a pipeline of that name from: the folder of the sandbox's, else the name itself."""
    if name != SANDBOX:
        return name
    from .sandbox.weights.pipeline import PIPELINE_PATH

    return str(PIPELINE_PATH)


def generation_defaults(name: str) -> tuple[float | None, dict[str, Any]]:
    """Frames per second of a named model, and the arguments of its call; `(None, {})` where the name says neither."""
    if name != SANDBOX:
        return None, {}
    from .sandbox.weights.pipeline import CALL_KWARGS
    from .sandbox.world.simulate import FPS

    return FPS, dict(CALL_KWARGS)


# ---- judges ---------------------------------------------------------------------------------------------------------


def load_judge(
    name_or_path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None, **options: Any
) -> "VideoJudge":
    """
    Loads a judge.

    Args:
        name_or_path: one of

            - `"sandbox"`: the exact judge of simulated clips;
            - `"videocon-physics"`, `"videophy2"`: the published judges, or with a folder or repository of their
              weights, `"videophy2:/data/weights"`; `"videoscore2"` and `"videoalign"` likewise;
            - `"qwen-vl:Qwen/Qwen2.5-VL-7B-Instruct"`, a folder, or a repository whose `config.json` says what it is;
            - `"http://localhost:8000/v1"`: a server; needs `model=`; behind `"phyground:"` it is asked about single
              laws of physics;
            - a `.csv`, `.jsonl` or `.parquet` file with scores.
        cache: SQLite file that remembers scores; see `CachedJudge`.
        options: of the judge's class.

    Returns:
        The judge, wrapped in a `CachedJudge` where a cache is given.

    Raises:
        ValueError: a name that means none of these, weights that are missing or of another model.
        TypeError: an option that the judge's class does not have.
    """
    judge = _load_judge(os.fspath(name_or_path), options)
    if cache is None:
        return judge
    from .judges.cache import CachedJudge

    return CachedJudge(judge, cache)


def check_judge(name_or_path: str | os.PathLike[str], **options: Any) -> None:
    """
    Finds what `load_judge` would stumble over at the end of a long run: a name that means nothing, a server without
    `model`, a table or a checkpoint that is not there. Reads no weights and asks no server.

    Args:
        name_or_path, options: as for `load_judge`.

    Raises:
        ValueError, TypeError: as `load_judge`.
    """
    from .judges.weights import resolve_weights

    name = os.fspath(name_or_path)
    revision = options.get("revision")
    kind, weights = _judge_kind(name, revision)
    if kind in _JUDGES:
        resolve_weights(weights, revision, ["model_config.json" if kind == "videoalign" else "config.json"])
    else:
        _load_judge(name, options)


def _load_judge(name: str, options: dict[str, Any]) -> "VideoJudge":
    kind, weights = _judge_kind(name, options.get("revision"))
    if kind == SANDBOX:
        from .sandbox.judge.judge import SandboxJudge

        return SandboxJudge(**options)
    if kind in ("server", "phyground"):
        from .judges.phyground import PhyGroundJudge
        from .judges.remote import RemoteJudge

        if "model" not in options:
            raise ValueError(f"{name} needs `model`, the model's name on the server, for example 'Qwen3-VL-8B'.")
        return PhyGroundJudge(weights, **options) if kind == "phyground" else RemoteJudge(name, **options)
    if kind == "table":
        from .judges.precomputed import PrecomputedJudge

        return PrecomputedJudge(name, **options)
    if kind == "qwen-vl":
        from .judges.qwen_vl import QwenVLJudge

        return QwenVLJudge(weights, **options)
    if kind == "videoscore2":
        from .judges.videoscore2 import VideoScore2Judge

        return VideoScore2Judge(weights, **options)
    if kind == "videoalign":
        from .judges.videoalign import VideoAlignJudge

        return VideoAlignJudge(weights, **options)
    from .judges.mplug_owl import VideoConPhysicsJudge, VideoPhy2Judge

    return (VideoConPhysicsJudge if kind == "videocon-physics" else VideoPhy2Judge)(weights, **options)


def _judge_kind(name: str, revision: str | None) -> tuple[str, str]:
    """
    What a name means: sandbox, "server", "phyground", "table" or one of `_JUDGES`; and the folder or repository of
    weights, or the address of a server for "phyground".
    """
    from .judges.precomputed import SUFFIXES

    if name == SANDBOX:
        return SANDBOX, ""
    if name.startswith(("http://", "https://")):
        return "server", ""
    if name.startswith("phyground:"):
        return "phyground", name.removeprefix("phyground:")
    if Path(name).suffix in SUFFIXES:
        return "table", ""
    kind, _, weights = name.partition(":")
    if kind in _JUDGES:
        published = {kind: repository for repository, kind in _JUDGE_REPOSITORIES.items()}
        if not weights and kind not in published:
            raise ValueError("Expected a model after 'qwen-vl:', for example 'qwen-vl:Qwen/Qwen2.5-VL-7B-Instruct'.")
        return kind, weights or published[kind]
    return _JUDGE_REPOSITORIES.get(name) or _judge_of_checkpoint(name, revision), name


def _judge_of_checkpoint(name: str, revision: str | None) -> str:
    """Which judge a folder or repository holds, by its `config.json`."""
    from .judges.precomputed import SUFFIXES
    from .judges.weights import read_config, resolve_weights

    if "/" not in name and not Path(name).is_dir():
        raise ValueError(
            f"No judge {name!r}: expected {SANDBOX!r}, {', '.join(repr(kind) for kind in _JUDGES)} (each may be "
            "followed by ':' and a folder or repository), a folder, a repository id, a server's URL, 'phyground:URL', "
            f"or a table ({', '.join(SUFFIXES)})."
        )
    kind = read_config(resolve_weights(name, revision, ["config.json"])).get("model_type")
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        return "qwen-vl"
    if kind == "mplug-owl":
        raise ValueError(
            f"{name} may be either of two judges that share a network: say which, as 'videocon-physics:{name}' or "
            f"'videophy2:{name}'."
        )
    raise ValueError(f"{name}: no judge for model_type {kind!r}; expected 'qwen2_5_vl', 'qwen3_vl' or 'mplug-owl'.")


# ---- teachers -------------------------------------------------------------------------------------------------------


def load_teacher(
    name_or_path: str,
    *,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
    **options: Any,
) -> "VideoTeacher":
    """
    Loads a teacher.

    Args:
        name_or_path (`str`):
            `"sandbox"` (the small VideoMAE that ships with the package); a repo id or folder of VideoMAE, VideoMAEv2,
            V-JEPA 2, DINOv2 or DINOv3; or a file of VideoMAEv2, V-JEPA or OmniMAE weights, as published.
        device (`torch.device` or `str`, *optional*):
            Where to put it; the CPU by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of its weights and arithmetic. Tokens are float32 in any case.
        options:
            `height` and `width` (input size in pixels; default: that of the pretraining), `antialias`,
            `skip_first_frame`, `frame_groups`, `crops`; of DINO also `frame_stride`; of VideoMAEv2 also
            `num_attention_heads`. See [`~video_trl.teachers.ModelTeacher`]. The sandbox's teacher takes none.

    Raises:
        ValueError: There is no such repo, folder or file, it is of another architecture, lacks weights, or a size does
            not suit it.
    """
    import torch

    teacher = _load_teacher(name_or_path, torch.float32 if dtype is None else dtype, options)
    return teacher if device is None else teacher.to(device)


def _load_teacher(name: str, dtype: "torch.dtype", options: dict[str, Any]) -> "VideoTeacher":
    if name == SANDBOX:
        from .sandbox.weights.teacher import load_sandbox_teacher

        return load_sandbox_teacher(dtype=dtype, **options)
    from .teachers.published_vit import load_teacher_file

    if Path(name).suffix not in _TEACHER_FILES:
        return _load_teacher_repository(name, dtype, options)
    if not Path(name).is_file():
        raise ValueError(f"There is no file {name}. Pass the path of VideoMAEv2, V-JEPA or OmniMAE weights.")
    return load_teacher_file(name, dtype=dtype, **options)


def _load_teacher_repository(name: str, dtype: "torch.dtype", options: dict[str, Any]) -> "VideoTeacher":
    from transformers import PreTrainedConfig
    from transformers.utils import cached_file

    from .teachers.dino import load_dino
    from .teachers.videomae import load_videomae, load_videomaev2
    from .teachers.vjepa2 import load_vjepa2

    loaders: dict[str, Callable[..., VideoTeacher]] = {
        "videomae": load_videomae,
        "vjepa2": load_vjepa2,
        "dinov2": load_dino,
        "dinov2_with_registers": load_dino,
        "dinov3_vit": load_dino,
    }
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Cannot load a teacher from {name!r}: no such folder, or no access to such a repo "
            f"({reason}). Pass {SANDBOX!r}, a folder with a config.json, or a repo id."
        ) from error
    if "model_type" not in config:
        raise ValueError(f"{name!r} has no config.json that names an architecture. Pass a teacher's folder.")
    model_type = str(config["model_type"])
    if model_type.lower().startswith("videomaev2"):  # its repos bring their own code, which is not run
        file = cached_file(name, "model.safetensors")
        return load_videomaev2(file, dtype=dtype, name=Path(name).name, **options)
    if model_type not in loaders:
        raise ValueError(
            f"{name!r} is of architecture {model_type!r}; a teacher is one of {', '.join(loaders)} or "
            "VideoMAEv2. Any object that fulfils `video_trl.teachers.VideoTeacher` works where a teacher is passed."
        )
    return loaders[model_type](name, dtype=dtype, **options)


def default_teacher(model: object) -> str | None:
    """Name of the teacher that belongs to a named model: the sandbox brings one, no other model does."""
    return SANDBOX if model == SANDBOX else None


# ---- training rows


@dataclass
class ScriptArguments:
    """What a script trains, and on what; how it trains is said by the configuration of its trainer."""

    model_name_or_path: str = field(
        default=SANDBOX,
        metadata={"help": "Repository id or path of a pipeline in diffusers layout, or 'sandbox'."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset: a table (.jsonl, .csv, .parquet), a folder of videos with captions, a folder with "
            "chosen/ and rejected/, tars, a saved dataset, or a repository id. Unset: the sandbox's own, made first."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    column: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that have another name there: chosen=winner rejected=loser.", "action": "extend"},
    )
    num_groups: int = field(default=256, metadata={"help": "Sandbox, pair and group methods: rows of its dataset."})
    num_rejected: int = field(default=3, metadata={"help": "Sandbox: rejected videos in each of them."})
    num_clips: int = field(default=256, metadata={"help": "Sandbox, other methods: simulated clips."})
    on_collapse: Literal["warn", "stop", "raise"] = field(
        default="warn",
        metadata={"help": "Pair and group methods: what to do when the model gets worse at both videos of a pair."},
    )


def load_training_rows(data: ScriptArguments, args: "TrainingArguments", row_type: str) -> "datasets.Dataset":
    """
    The dataset that was named, or the sandbox's, made in `args.output_dir`.

    Args:
        data ([`ScriptArguments`]): Names of model and dataset, and the size of the sandbox's.
        args (`TrainingArguments`): Of the run; of several processes the first one makes the sandbox's dataset.
        row_type (`str`): What the trainer takes, its `row_type`. The sandbox's rows are simulated clips for `"video"`,
            else groups, which are preference pairs too.

    Raises:
        ValueError: If another model than the sandbox's is to be trained and no dataset is named, or the one that is
            named cannot be loaded.
    """
    if data.dataset_name is not None:
        from .data.tables import load_rows

        return load_rows(data.dataset_name, data.dataset_split, data.column)
    if data.model_name_or_path != SANDBOX:
        raise ValueError(
            f"--model_name_or_path {data.model_name_or_path} needs --dataset_name: only the sandbox brings its own "
            "data. Pass a repository id or a folder (docs/data/dataset_formats.md)."
        )
    from .sandbox import build_clip_dataset, build_group_dataset, load_sandbox

    assert args.output_dir is not None
    folder = Path(args.output_dir)
    with args.main_process_first():
        if row_type == "video":
            return build_clip_dataset(folder / "clips", num_clips=data.num_clips)
        return build_group_dataset(
            load_sandbox(), folder / "dataset", num_groups=data.num_groups, num_rejected=data.num_rejected
        )


# ---- what else the sandbox supplies where no data is named ----------------------------------------------------------


def heldout_prompts(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """
    Held-out sentences of the sandbox, the laws of motion in turn, each with its law.

    Raises:
        ValueError: If there are fewer sentences than asked for.
    """
    from .sandbox.data.prompts import balanced_prompts
    from .sandbox.world.prompts import parse_prompt

    return [(text, parse_prompt(text).motion) for text in balanced_prompts("heldout", number, seed)]


def contact_clips(number: int, *, seed: int) -> "list[ProbeClip]":
    """Simulated clips with the question whether two balls will touch."""
    from .sandbox.data import contact_clips as module

    return module.contact_clips(number, seed=seed)


def action_wordings() -> Mapping[str, tuple[str, ...]]:
    """Action categories of the sandbox's clips, each with its wordings."""
    from .sandbox.world.prompts import ACTION_WORDINGS, ACTIONS

    return {ACTIONS[motion]: wordings for motion, wordings in ACTION_WORDINGS.items()}


def annotation_rules() -> tuple[str, Callable[..., dict[str, Any]]]:
    """
    The rules that annotate sandbox clips (frames, or None for the sentence alone, and prompt -> fields of an
    annotation), and their identity.
    """
    from .sandbox.judge.annotator import ANNOTATOR_VERSION, annotate_clip, annotate_sentence

    def annotate(frames: Any, prompt: str) -> dict[str, Any]:
        return annotate_sentence(prompt) if frames is None else annotate_clip(frames, prompt)

    return f"sandbox-rules:v{ANNOTATOR_VERSION}", annotate
