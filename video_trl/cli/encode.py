"""
Encode the videos and prompts of a run once, on one machine, with the options of that run: every later
`video-trl train` with these options uses the result, and so do other methods with the same rows and sizes.

Examples:

  video-trl encode gdpo --config examples/configs/wan2.1-1.3b-gdpo.yaml --dataset_name my/groups --cache_dir /data/enc
  video-trl encode sft --num_clips 16 --output_dir out/sft                               the sandbox
"""

from collections.abc import Sequence

from .methods import make_trainer, method_named, parse_training
from .parser import say


def run(argv: Sequence[str]) -> int:
    method, rest = method_named("encode", argv, __doc__)
    data, args = parse_training("encode", method, rest, __doc__)
    from ..trainer.setup.rows import encoded_cache_dir

    # Making the trainer encodes, with every setting that the run will have.
    rows = make_trainer(method.load(), data, args).train_dataset
    shapes = sorted(set(rows.shapes))
    say(f"{len(rows)} rows, latents {', '.join(map(str, shapes))}, in {encoded_cache_dir(args)}")
    return 0
