"""
Examples:

  video-trl rounds --num_clips 64 --training '{"max_steps":100,"learning_rate":1e-3}'            the sandbox
  video-trl rounds --config examples/configs/rounds.yaml --dataset_name my/clips --eval_prompts heldout.txt
  video-trl rounds --output_dir outputs/rounds --max_rounds 5                                   go on for longer

In every round the current adapter makes videos of the dataset's prompts, a judge scores them, the clips that the model
does badly are taken more often, training goes on against these videos, and held-out prompts say what was gained.
Rounds end when the 95 % interval of the gain covers zero. Stopped anywhere, they go on there.
"""

from collections.abc import Sequence

from .methods import look_for_modules_here
from .parser import parse, say
from .sources import read_dataclass


def run(argv: Sequence[str]) -> int:
    stand_in = read_dataclass("video_trl.curation.rounds:RoundsConfig")
    assert stand_in is not None
    parse("rounds", __doc__, [stand_in], argv)  # help and refusals, before the seconds that imports take
    from ..curation.rounds import RoundsConfig, run_rounds

    (config,) = parse("rounds", __doc__, [RoundsConfig], argv)
    look_for_modules_here()
    say(str(run_rounds(config)))
    return 0
