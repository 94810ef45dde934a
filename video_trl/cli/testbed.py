"""
Examples:

  video-trl testbed my_module:MyTrainer --trial                     a minute: whether the method runs
  video-trl testbed my_module:MyTrainer                             the game; stopped, it goes on where it was
  video-trl testbed gdpo --name safeguard --options '{"safeguard":"output","safeguard_mu":0.5}'
  video-trl testbed gdpo --others theirs/results.json               ranked with what others have published
  video-trl testbed --rerun theirs/results.json --output_dir again  the same numbers, to the last bit?

A method is trained on five regimes of the sandbox with three seeds each, and compared with fine-tuning on the same
clips of as many updates and of as much processor time (docs/benchmarks/testbed.md has the rules). About ten minutes of
a processor a method, and once twenty for the data and for both kinds of fine-tuning. The page is printed, and left
with the numbers in --output_dir.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .methods import look_for_modules_here, method_named
from .options import mapping
from .parser import UsageError, parse, say


logger = logging.getLogger(__name__)


@dataclass
class EntryArguments:
    """A method, and where it is run."""

    output_dir: str = field(
        default="testbed", metadata={"help": "Folder of data, adapters and results; methods share it."}
    )
    name: str | None = field(
        default=None, metadata={"help": "How tables call the method. Unset: as it is called here."}
    )
    options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The method's own options, as a mapping in YAML or JSON."}
    )
    regimes: list[str] = field(
        default_factory=lambda: ["clean", "few", "wild", "found", "own"],
        metadata={"help": "Some of clean, few, wild, found, own."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    others: list[str] = field(
        default_factory=list, metadata={"help": "Files results.json of other methods, ranked with this one."}
    )
    trial: bool = field(
        default=False, metadata={"help": "A few updates on a few clips: shows that a method runs, and is no result."}
    )
    rerun: str | None = field(
        default=None, metadata={"help": "File results.json to make again, and to compare with bit by bit."}
    )


def run(argv: Sequence[str]) -> int:
    if argv and not argv[0].startswith("-"):
        method, rest = method_named("testbed", argv, __doc__)
        (args,) = parse("testbed", __doc__, [EntryArguments], rest)
        if args.rerun is not None:
            raise UsageError("--rerun takes the method from the file; leave METHOD out.")
        from ..testbed import Entry, sft_entry

        options = mapping("options", args.options)
        is_control = method.name == "sft" and args.name is None and not options
        entry = sft_entry() if is_control else Entry(args.name or method.name, method, options)
        return _play(args, entry)
    if not argv or argv[0] in ("-h", "--help"):
        method_named("testbed", [], __doc__)
    (args,) = parse("testbed", __doc__, [EntryArguments], argv)
    if args.rerun is None:
        raise UsageError("name a method, as in `video-trl testbed gdpo`, or a file after --rerun.")
    return _rerun(args)


def _play(args: EntryArguments, entry: Any) -> int:
    from ..files import read_json, write_atomically
    from ..testbed import GAME, TRIAL, Testbed, check_others, page, play, rules_of

    others = [read_json(Path(path)) for path in args.others]
    testbed = Testbed(Path(args.output_dir), TRIAL if args.trial else GAME, args.seeds, args.regimes)
    testbed.enter(entry)
    check_others(rules_of(testbed, entry), others)
    found = play(testbed, entry, tell=logger.info)
    text = page(found, others)
    write_atomically(testbed.folder / entry.slug / "page.md", text)
    say(f"{text}\n{testbed.folder / entry.slug}")
    return 0


def _rerun(args: EntryArguments) -> int:
    from ..files import read_json
    from ..methods import Method
    from ..testbed import RESULTS, Entry, Game, Testbed, differences, play

    usual = asdict(EntryArguments(args.output_dir, rerun=args.rerun))
    if idle := [f"--{name}" for name, value in asdict(args).items() if value != usual[name]]:
        raise UsageError(f"--rerun takes everything but --output_dir from the file; leave {', '.join(idle)} out.")
    look_for_modules_here()
    first = read_json(Path(str(args.rerun)))
    given = first["entry"]
    entry = Entry(given["name"], Method(given["name"], given["path"]), given["options"])
    testbed = Testbed(Path(args.output_dir), Game(**first["game"]), first["seeds"], first["regimes"])
    made = testbed.folder / entry.slug / RESULTS
    if made.is_file() and read_json(made) == first:
        raise UsageError(f"{made} is what --rerun would be compared with: pass another --output_dir.")
    found = differences(first, play(testbed, entry, ratio=first["cost"]["time"], tell=logger.info))
    for line in found:
        say(f"differs: {line}")
    units = sum(map(len, first["units"].values()))
    say(f"{units} units made again; {'equal to the last bit' if not found else 'not the same bits'}.")
    return 1 if found else 0
