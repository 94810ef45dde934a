"""
Look through a dataset before it is used, or bring one of another project here.

Examples:

  video-trl data check my/pairs.jsonl --column chosen=winner rejected=loser
  video-trl data check my/clips --html sheet.html             a folder of videos with captions; and a page of frames
  video-trl data check my/groups --tokenizer Wan-AI/Wan2.1-T2V-1.3B-Diffusers --max_sequence_length 512
  video-trl data import phygdpo PhyGDPO --real_videos VIDGEN-1M_unzip --output_dir data/phygdpo
  video-trl data import videodpo vidpro10k-vc2-dataset --output_dir data/videodpo
  video-trl data import simpletuner config/multidatabackend.json --output_dir data/pairs
  video-trl data import openvid OpenVid-1M --output_dir data/openvid    zips and their CSV: a pool for curate phyaug
  video-trl data import vidgen VIDGEN-1M --output_dir data/vidgen

  video-trl data doctor my/pairs.jsonl --judge videophy2 --vae Wan-AI/Wan2.1-T2V-1.3B-Diffusers

Data is named as for `video-trl train --dataset_name`: a table (.jsonl, .csv, .parquet), a folder of videos
with captions, a folder with chosen/ and rejected/, tars, a saved dataset, or a repository on the Hub. Exit code 1 if
no trainer takes it, a video cannot be read, or the doctor finds a problem: that something beside their content, blur,
brightness, length or the traces of a generator, tells chosen from rejected videos, or that the judge does not. An
import (`data phygdpo` is `data import phygdpo`) writes a folder that --dataset_name takes; a row that cannot be used
is left out and listed in its skipped.txt. Pools (openvid, vidgen) become a tar for each zip, clip by clip; a stopped
import goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .options import mapping
from .parser import UsageError, nearest, parse, required, say


_ACTIONS = ("check", "import", "doctor")
_POOLS = ("openvid", "vidgen")
_KINDS = ("phygdpo", "videodpo", "simpletuner", *_POOLS)
_SHOWN = 10  # rows that were left out


@dataclass
class CheckArguments:
    """What is looked at."""

    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    column: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that have another name there: chosen=winner rejected=loser.", "action": "extend"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Model whose tokenizer counts the tokens of prompts. Unset: they are not counted."},
    )
    max_sequence_length: int = field(
        default=226, metadata={"help": "Tokens of a prompt that the model is given (CogVideoX 226, Wan 512)."}
    )
    html: str | None = field(default=None, metadata={"help": "Page to write, with frames of every video."})
    html_rows: int = field(default=100, metadata={"help": "Only the first so many rows on it."})


@dataclass
class ImportArguments:
    """Where it goes, and what PhyGDPO's data leave open."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder to write, for --dataset_name."})
    real_videos: str | None = field(
        default=None, metadata={"help": "phygdpo: folder with the videos of VidGen-1M. Unset: looked for."}
    )
    generator_model: str | None = field(
        default=None, metadata={"help": "phygdpo: Wan1.3B or Wan14B, whose videos are rejected. Unset: the only one."}
    )
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "phygdpo: only the videos of these seeds. Unset: of all."}
    )


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: video-trl data ACTION [options]\n\nactions: {', '.join(_ACTIONS)}\n{__doc__}")
        return 0
    action, *rest = argv if argv[0] not in _KINDS else ("import", *argv)
    if action not in _ACTIONS:
        raise UsageError(f"no action {action!r}{nearest(action, _ACTIONS)}; expected one of {', '.join(_ACTIONS)}.")
    actions = {"check": _check, "import": _import, "doctor": _doctor}
    return actions[action](rest)


def _import(argv: Sequence[str]) -> int:
    args, where = parse(
        "data import", __doc__, [ImportArguments], argv, positional="kind_and_data",
        positional_help=f"Whose layout ({', '.join(_KINDS)}), and its folder or, of SimpleTuner, its configuration.",
    )  # fmt: skip
    if len(where) != 2 or where[0] not in _KINDS:
        raise UsageError(f"expected one of {', '.join(_KINDS)} and what to read, got {' '.join(where)}.")
    target = required("output_dir", args.output_dir, "data/imported")
    options = {"real_videos": args.real_videos, "generator_model": args.generator_model, "seeds": args.seeds or None}
    given = {name: value for name, value in options.items() if value is not None}
    if given and where[0] != "phygdpo":
        raise UsageError(f"--{next(iter(given))} is read for phygdpo, not for {where[0]}.")
    if where[0] in _POOLS:
        from ..data.importers.pools import import_pool

        pool = import_pool(where[0], where[1], target)
        say(f"{pool.clips} clips in {pool.folder}; {pool.without_video} captions whose clip is not here")
        _say_skipped(pool.skipped, f"{pool.folder}/*.skipped.txt")
        return 0
    from ..data.importers.imported import check_target, save_import
    from ..data.importers.phygdpo import read_phygdpo
    from ..data.importers.simpletuner import read_simpletuner
    from ..data.importers.videodpo import read_videodpo

    check_target(target)
    readers = {"videodpo": read_videodpo, "simpletuner": read_simpletuner}
    imported = read_phygdpo(where[1], **options) if where[0] == "phygdpo" else readers[where[0]](where[1])
    folder = save_import(imported, target)
    say(f"{len(imported.rows)} rows in {folder}")
    _say_skipped(imported.skipped, str(folder / "skipped.txt"))
    return 0


def _say_skipped(lines: Sequence[str], where: str) -> None:
    if lines:
        more = f"\n... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        say(f"left out ({where}):\n" + "\n".join(lines[:_SHOWN]) + more)


def _check(argv: Sequence[str]) -> int:
    args, names = parse(
        "data check", __doc__, [CheckArguments], argv, positional="dataset", positional_help="Name of the dataset."
    )
    if len(names) != 1:
        raise UsageError(f"expected one dataset, got {' '.join(names)}.")
    from ..data.overview import look_through, write_contact_sheet
    from ..data.tables import load_rows
    from ..methods import known_methods

    dataset = load_rows(names[0], args.dataset_split, args.column)
    overview = look_through(dataset, count_tokens=_token_counter(args.tokenizer), max_tokens=args.max_sequence_length)
    lines = overview.lines()
    if args.tokenizer is None:
        lines.append("tokens of prompts were not counted: --tokenizer MODEL")
    fed = []
    for method in known_methods():
        reason = _lacks(dataset, method.load())
        lines.append(f"train {method.name}: {'yes' if reason is None else f'no. {reason}'}")
        fed += [method.name] if reason is None else []
    if args.html is not None:
        write_contact_sheet(dataset, args.html, rows=args.html_rows)
        lines.append(f"frames of the videos: {args.html}")
    say("\n".join(lines))
    return 0 if fed and "a video cannot be read" not in overview.problems else 1


def _lacks(dataset: Any, trainer_class: type[Any]) -> str | None:
    """Why a trainer with its default options does not take a dataset; `None` if it does."""
    args = trainer_class.config_class("unused", use_cpu=True, bf16=False, report_to="none")
    try:
        trainer_class.check_rows(dataset, args)
    except ValueError as error:
        return str(error)
    return None


@dataclass
class DoctorArguments:
    """What chosen and rejected videos are told apart by."""

    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    column: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that have another name there: chosen=winner rejected=loser.", "action": "extend"},
    )
    judge: str | None = field(default=None, metadata={"help": "Judge to be tried, as `score --judge`. Unset: none."})
    judge_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the judge, as a mapping in YAML or JSON."}
    )
    vae: str | None = field(
        default=None, metadata={"help": "Model whose VAE encodes the videos for the probe. Unset: no probe."}
    )
    max_rows: int = field(default=200, metadata={"help": "At most so many rows, evenly spread."})
    num_frames: int | None = field(
        default=None, metadata={"help": "What training brings videos to. Unset: as they are."}
    )
    fps: float | None = field(default=None, metadata={"help": "The same."})
    height: int | None = field(default=None, metadata={"help": "The same."})
    width: int | None = field(default=None, metadata={"help": "The same."})


def _doctor(argv: Sequence[str]) -> int:
    args, names = parse(
        "data doctor", __doc__, [DoctorArguments], argv, positional="dataset", positional_help="Name of the dataset."
    )
    if len(names) != 1:
        raise UsageError(f"expected one dataset, got {' '.join(names)}.")
    from ..data.tables import load_rows
    from ..evaluation.data_doctor import diagnose
    from ..load import load_judge, load_pipeline

    pixels = {name: args.__dict__[name] for name in ("num_frames", "fps", "height", "width")}
    found = diagnose(
        load_rows(names[0], args.dataset_split, args.column),
        judge=None if args.judge is None else load_judge(args.judge, **mapping("judge_options", args.judge_options)),
        pipeline=None if args.vae is None else load_pipeline(args.vae),
        max_rows=args.max_rows,
        pixels=pixels,
    )
    lines = found.lines()
    lines += [] if args.judge else ["no judge was tried: --judge NAME"]
    lines += [] if args.vae else ["latents were not probed: --vae MODEL"]
    say("\n".join(lines))
    return 1 if found.problems else 0


def _token_counter(model: str | None) -> Callable[[str], int] | None:
    if model is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
    return lambda prompt: len(tokenizer(prompt).input_ids)
