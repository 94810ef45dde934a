"""
Look through a dataset before it is used.

Examples:

  video-trl data check my/pairs.jsonl --column chosen=winner rejected=loser
  video-trl data check my/clips --html sheet.html             a folder of videos with captions; and a page of frames
  video-trl data check my/groups --tokenizer Wan-AI/Wan2.1-T2V-1.3B-Diffusers --max_sequence_length 512

The dataset is named as for `video-trl train --dataset_name`: a table (.jsonl, .csv, .parquet), a folder of videos with
captions, a folder with chosen/ and rejected/, tars, a saved dataset, or a repository on the Hub. Exit code 1 if no
trainer takes it, or a video cannot be read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .parser import UsageError, nearest, parse, say


_ACTIONS = ("check",)


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


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: video-trl data ACTION [options]\n\nactions: {', '.join(_ACTIONS)}\n{__doc__}")
        return 0
    action, *rest = argv
    if action not in _ACTIONS:
        raise UsageError(f"no action {action!r}{nearest(action, _ACTIONS)}; expected one of {', '.join(_ACTIONS)}.")
    return _check(rest)


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
        reason = overview.row_types[method.load().row_type]
        lines.append(f"train {method.name}: {'yes' if reason is None else f'no. {reason}'}")
        fed += [method.name] if reason is None else []
    if args.html is not None:
        write_contact_sheet(dataset, args.html, rows=args.html_rows)
        lines.append(f"frames of the videos: {args.html}")
    say("\n".join(lines))
    return 0 if fed and "a video cannot be read" not in overview.problems else 1


def _token_counter(model: str | None) -> Callable[[str], int] | None:
    if model is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
    return lambda prompt: len(tokenizer(prompt).input_ids)
