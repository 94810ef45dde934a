"""A run that is ended from outside, for `torchrun`; the same command continues it."""

import sys
import time
from pathlib import Path

from transformers import TrainerCallback

from tests.support.trainer.runs import config, trainer


class Slow(TrainerCallback):
    """Steps that take long enough to be ended in; a file says that one has begun."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        (Path(args.output_dir) / f"step-{args.process_index}-{state.global_step}").touch()
        time.sleep(0.5 if state.global_step < 4 else 0)


def main() -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "ddp_backend": "gloo", "per_device_train_batch_size": 1}
    made = trainer(config(Path(sys.argv[1]), **settings), callbacks=[Slow()])
    made.train(resume_from_checkpoint="auto")
    made.save_model()


if __name__ == "__main__":
    main()
