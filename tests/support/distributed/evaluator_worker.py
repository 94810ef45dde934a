"""Each of two processes measures in training, and then with an evaluator that fails; run by `torchrun`."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.support.trainer.runs import config, trainer


def main() -> None:
    directory = Path(sys.argv[1])
    calls = []

    def evaluator(pipeline, *, output_dir, step):
        calls.append(step)
        if step == 3:
            raise ConnectionError("the judge's server does not answer")
        return {"pc": step / 10}

    settings = {"per_device_train_batch_size": 1, "ddp_backend": "gloo", "eval_strategy": "steps", "eval_steps": 1}
    best = {"save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "eval_pc", "greater_is_better": True}
    made = trainer(config(directory, max_steps=3, **settings, **best), evaluator=evaluator)
    try:
        made.train()
    except (ConnectionError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    told = {"calls": calls, "best": made.state.best_metric, "failure": failure}
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
