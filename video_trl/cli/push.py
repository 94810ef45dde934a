"""
Upload an adapter, with its model card and sample videos, or a curated dataset, to the Hub.

Examples:

  video-trl push out/phygdpo my-name/wan-phygdpo --private
  video-trl push out/phygdpo my-name/wan-phygdpo --evaluation runs/phygdpo --message "With an evaluation"
  video-trl push out/pairs/pairs my-name/real-against-generated --license cc-by-4.0

The token is that of `hf auth login`, or HF_TOKEN. Of a run's folder, checkpoints, arguments and data stay at home.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .parser import UsageError, parse, say


_OF_ADAPTERS, _OF_DATASETS = ("message", "evaluation", "judge"), ("license", "description")


@dataclass
class PushArguments:
    """What is uploaded, and how."""

    private: bool | None = field(
        default=None,
        metadata={
            "help": "Visibility of a new repository. Unset: the account's default.",
            "nargs": "?",  # a bare `--private` means true, also where "not given" is told apart from false
            "const": True,
        },
    )
    message: str = field(default="Upload with video_trl", metadata={"help": "Adapters: message of the commit."})
    evaluation: str | None = field(
        default=None,
        metadata={"help": "Adapters: folder of a scored run, whose numbers and intervals go into the card first."},
    )
    judge: str | None = field(default=None, metadata={"help": "Whose scores, where the run has those of several."})
    license: str | None = field(default=None, metadata={"help": "Datasets: licence identifier, such as cc-by-4.0."})
    description: str = field(default="", metadata={"help": "Datasets: how they were made, in a sentence."})


def run(argv: Sequence[str]) -> int:
    args, where = parse(
        "push", __doc__, [PushArguments], argv, positional="folder_and_repository",
        positional_help="Folder of the adapter or dataset, and repository id 'owner/name'.",
    )  # fmt: skip
    if len(where) != 2:
        raise UsageError(f"expected a folder and a repository id, got {' '.join(where)}.")
    from ..hub import push, push_dataset

    folder, repo_id = Path(where[0]), where[1]
    if (folder / "run.json").is_file() and (folder / "groups").is_dir():
        from ..curation.phyaug.pipeline import push_groups

        _refuse_idle(args, "a run of PhyAugPipe, whose card is made with it", (*_OF_ADAPTERS, *_OF_DATASETS))
        say(push_groups(folder, repo_id, private=args.private).commit_url)
        return 0
    if (folder / "manifest.parquet").is_file() and (folder / "pairs").is_dir():  # of a curation
        folder = folder / "pairs"
    if (folder / "state.json").is_file() or (folder / "data").is_dir() or any(folder.glob("*.parquet")):
        _refuse_idle(args, "a dataset", _OF_ADAPTERS)
        details = {"license": args.license, "description": args.description}
        say(push_dataset(folder, repo_id, private=args.private, **details).commit_url)
    else:
        _refuse_idle(args, "an adapter", _OF_DATASETS)
        if args.evaluation is not None:
            add_run(folder, args.evaluation, args.judge)
        say(push(folder, repo_id, private=args.private, commit_message=args.message).commit_url)
    return 0


def _refuse_idle(args: PushArguments, what: str, names: Sequence[str]) -> None:
    """Raise a `UsageError` if an option was given that says nothing of what is uploaded."""
    usual = vars(PushArguments())
    if given := [name for name in names if vars(args)[name] != usual[name]]:
        raise UsageError(f"--{given[0]} has no effect on {what}. Leave it out.")


def add_run(folder: Path, run_dir: str, judge: str | None) -> None:
    """
    Put the results of a scored run, with their intervals, into the card of an adapter.

    Raises:
        ValueError: If the run is of another adapter, or of none.
    """
    from ..evaluation.runs.prompts import ALL
    from ..evaluation.runs.tables import tabulate
    from ..files import fingerprint
    from ..hub import CARD_NAME, LORA_FILE_NAME, Measurement, add_evaluation
    from ..hub.lora import AVERAGE_FOLDER

    table = tabulate(run_dir, judge=judge)
    made_by = table.run.generation.get("adapter_hash", "")
    files = [file for place in (folder / AVERAGE_FOLDER, folder) if (file := place / LORA_FILE_NAME).is_file()]
    in_training = str(table.run.provenance.get("model")).startswith("run in ")  # of weights that were in memory
    if files and made_by not in ("", *map(fingerprint, files)) and not (made_by is None and in_training):
        other = table.run.provenance.get("adapter") or "no adapter"
        raise ValueError(
            f"The videos of {run_dir} were made with {other}, not with {files[0]}: the card would have another "
            f"model's numbers. Evaluate this one: `video-trl eval --adapter {files[0].parent}`."
        )
    description = f"prompts of {table.benchmark.name!r}, judged by {table.judge}"
    measurements = [
        Measurement(name, rate.value, rate.low, rate.high, rate.level, description, rate.n)
        for name, rate in table.proportions[ALL].items()
    ]
    add_evaluation(folder / CARD_NAME, measurements)
