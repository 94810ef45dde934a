"""
Let people compare the videos of runs side by side, blind, in the browser; and count their votes.

Examples:

  video-trl vote runs/reg-dpo runs/base runs/sft                     the first against each other one, until Ctrl-C
  video-trl vote runs/phygdpo runs/base --questions physics --votes physics.jsonl
  video-trl vote out/pairs --questions marks --votes marks.jsonl     1 to 5 for each video of a GT-Pair run's pairs
  video-trl vote runs/reg-dpo runs/base runs/sft --results           counts, intervals, agreement of the raters
  video-trl vote runs/reg-dpo runs/base runs/sft --export votes.parquet

The page is served on this machine only. Every vote is on the disk before the page moves on; started again with the
same file, every rater goes on where they were. From another machine: ssh -L 8321:localhost:8321 THIS_MACHINE.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .parser import UsageError, parse, say


@dataclass
class VoteArguments:
    """What raters are asked, and where their votes go."""

    votes: str = field(default="votes.jsonl", metadata={"help": "File of votes, new or of the same runs."})
    questions: str = field(
        default="gsb",
        metadata={
            "help": "'gsb': video quality and prompt following, with ties. 'physics': one forced choice. 'marks': 1 "
            "to 5 in five dimensions, of the pairs of a run of GT-Pair or of a file (.csv, .jsonl)."
        },
    )
    dimensions: list[str] = field(
        default_factory=list,
        metadata={"help": "Of 'marks': only some of the five; leave out reference_consistency for text to video."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8321, metadata={"help": "Port; 0 takes a free one."})
    allowed_hosts: list[str] = field(
        default_factory=list,
        metadata={"help": "Names under which the page may be opened; needed with another --host: no password."},
    )
    results: bool = field(default=False, metadata={"help": "Count the votes that are there, and serve nothing."})
    export: str | None = field(
        default=None, metadata={"help": "Write the votes as a table (.parquet or .csv), and serve nothing."}
    )


def run(argv: Sequence[str]) -> int:
    args, runs = parse(
        "vote",
        __doc__,
        [VoteArguments],
        argv,
        positional="runs",
        positional_help="Two or more run directories of the same prompts and seeds.",
    )
    if args.export is not None and Path(args.export).suffix not in (".parquet", ".csv"):
        raise UsageError(f"--export must end in .parquet or .csv, got {args.export}.")
    if args.results or args.export is not None:
        from ..evaluation.runs.tables import text_table
        from ..evaluation.votes.results import vote_results, votes_dataset, votes_table
        from ..files import atomic_file, formula_free

        say(text_table(votes_table(vote_results(args.votes, runs))))
        if args.export is not None:
            table = votes_dataset(args.votes)
            _check_replaceable(Path(args.export), table.column_names)
            with atomic_file(args.export) as partial:
                if Path(args.export).suffix == ".parquet":
                    table.to_parquet(partial)
                else:
                    table.map(lambda row: {name: formula_free(value) for name, value in row.items()}).to_csv(partial)
            say(f"\n{len(table)} answers in {args.export}")
        return 0
    if args.questions == "marks":
        return _mark(args, runs)
    from ..evaluation.votes.server import serve_votes

    serve_votes(
        runs,
        args.votes,
        questions=args.questions,
        host=args.host,
        port=args.port,
        allowed_hosts=args.allowed_hosts,
    )
    return 0


def _check_replaceable(path: Path, columns: Sequence[str]) -> None:
    """Raise a `UsageError` if there is a file that is no table of votes."""
    if not path.exists():
        return
    from ..judges.precomputed import read_table

    try:
        there = list(read_table(path)[0])
    except ValueError:
        there = []
    if there != list(columns):
        raise UsageError(f"{path} is no table of votes, and is not replaced. Pass another file, or move it.")


def _mark(args: VoteArguments, sources: Sequence[str]) -> int:
    from ..evaluation.votes.marks import MARKED, MarkingServer

    if len(sources) != 1:
        raise UsageError(f"--questions marks takes one run of GT-Pair, or one file of pairs, got {len(sources)}.")
    pairs = Path(sources[0])
    if pairs.is_dir():
        from ..curation.annotated import write_pairs_to_mark

        pairs = write_pairs_to_mark(pairs)
    server = MarkingServer(
        pairs,
        args.votes,
        dimensions=args.dimensions or tuple(MARKED),
        host=args.host,
        port=args.port,
        allowed_hosts=args.allowed_hosts,
    )
    server.serve()
    return 0
