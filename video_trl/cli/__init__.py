"""
The command `video-trl VERB ...`. A verb is a module of this package with a function `run(argv)`, thin over functions
that can be called from Python just as well; adding one takes its module and a line in `VERBS`.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from .parser import UsageError, nearest, say


# Verb -> what it does. Its module has the same name and is imported only when the verb is used.
VERBS = {
    "train": "train a model, by any of the methods that it lists",
    "data": "look through a dataset and say which trainers it feeds, or import one of another project",
    "curate": "make a preference dataset: gt-pairs, phyaug, annotated or self-pairs",
    "rounds": "rounds of training against the model's own new videos, until nothing is gained",
    "encode": "encode a dataset once, for any number of runs",
    "generate": "videos of prompts x seeds, as a run",
    "score": "let a judge score a run, or a table of videos",
    "eval": "prompts x seeds -> videos -> scores -> a table with intervals",
    "report": "compare runs: a table, and one HTML page with their videos",
    "vote": "let people compare runs, blind, in the browser",
    "push": "upload an adapter with its model card, or a curated dataset, to the Hub",
    "export": "an adapter for ComfyUI and other tools, and back",
    "merge": "an adapter into the weights of its base model",
    "testbed": "a method on the sandbox's fixed regimes, against fine-tuning: one page of results",
    "estimate": "memory and cost of a run, and what fits a GPU",
    "doctor": "check versions, devices, codecs, disk and Hub login",
}
FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; 0 is success

_HELP = """\
usage: video-trl VERB [options]

{verbs}

video-trl VERB --help    what the verb does, with examples
--config FILE            read options from a YAML file; options given on the command line win
--debug                  show where an error came from
--version                print the version

Try it, without a download and on any machine:

  video-trl eval --num_prompts 14 --output_dir runs/base
  video-trl train gdpo --num_groups 64 --max_steps 100 --per_device_train_batch_size 8 --learning_rate 1e-3 \\
      --sft_weight 500 --lora_target_modules all-linear --output_dir out/phygdpo
  video-trl eval --num_prompts 14 --adapter out/phygdpo --output_dir runs/phygdpo
  video-trl report runs/base runs/phygdpo

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (list of `str`, *optional*): Arguments after the program's name, by default those of this process.

    Returns:
        `int`: The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, arguments = _without_debug(arguments)
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        say(_HELP.format(verbs="\n".join(f"  {name:{width}}  {summary}" for name, summary in VERBS.items())))
        return 0
    if verb == "--version":
        from .. import __version__

        say(__version__)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("video_trl").setLevel(logging.INFO)
    for library in ("datasets", "huggingface_hub"):  # they write their own lines, which would stand there twice
        logging.getLogger(library).propagate = False
    # DeepSpeed, which accelerate imports where it is installed, warns on standard output, where results go.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        if verb not in VERBS:
            raise UsageError(f"no verb {verb!r}{nearest(verb, VERBS)}. video-trl --help lists them.")
        return importlib.import_module(f".{verb}", __name__).run(rest)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # argparse, after --help or with a message
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        if debug or not _is_expected(error):
            raise
        sys.stderr.write(f"video-trl {verb}: {' '.join(str(error).split())}\n")
        return USAGE if isinstance(error, UsageError) else FAILED


def _without_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """`--debug` by itself is ours; followed by a value it is an option of transformers' training arguments."""
    following = [*arguments[1:], "-"]
    ours = [
        place
        for place, word in enumerate(arguments)
        if word == "--debug" and (place == 0 or following[place].startswith("-"))
    ]
    return bool(ours), [word for place, word in enumerate(arguments) if place not in ours]


def _is_expected(error: Exception) -> bool:
    """Whether the message says all that a user needs; of other errors the traceback is needed."""
    return isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("video_trl.")
