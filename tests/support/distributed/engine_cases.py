"""
Cases that only several processes have, each in a function that asserts what it must see; run by `torchrun`.

`engine_cases.py DIRECTORY NAME...`
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
import torch.distributed as dist
from transformers import Trainer

from tests.support.distributed.cpu_engines import FSDP2, engine, zero
from tests.support.tiny import MAX_SEQUENCE_LENGTH, tiny_encoded_group, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.heads import head_trainer
from tests.support.trainer.runs import config, losses, trained_weights, trainer
from video_trl import VideoGroupDPOTrainer
from video_trl.hub import load_lora_state
from video_trl.trainer.step.nan_guard import NonFiniteLossError


ENGINES = {"ddp": {"ddp_backend": "gloo"}, "fsdp2": FSDP2, "zero2": zero(2, sgd=True), "zero3": zero(3, sgd=True)}


def stop(directory: Path, arguments: dict[str, Any]) -> None:
    """A row that is not finite, seen by one of the processes: both stop, before the weights are touched."""
    rows = tiny_encoded_group(8)
    args = config(directory, per_device_train_batch_size=1, max_steps=8, **arguments)
    made = trainer(args, train_dataset=rows)
    rows[5]["chosen_latents"].fill_(float("nan"))  # after the check of all rows
    try:
        made.train()
    except NonFiniteLossError as error:
        assert "weights were not updated" in str(error)
    else:
        raise AssertionError("the training went on")
    assert all(torch.isfinite(torch.tensor(losses(made))))
    made.save_model(str(directory / "after"))
    if dist.get_rank() == 0:
        weights = safetensors.torch.load_file(directory / "after" / "pytorch_lora_weights.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


def proof(directory: Path, arguments: dict[str, Any]) -> None:
    """What gets no gradient, or is not in the optimizer, stops the run before an update; what is there is clipped."""
    common = {"per_device_train_batch_size": 1, "max_steps": 1} | arguments

    @contextmanager
    def a_block_skipped(made: VideoGroupDPOTrainer) -> Iterator[None]:
        made.model.blocks[1].forward = lambda tokens, *args, **kwargs: tokens
        yield

    @contextmanager
    def a_weight_forgotten(made: VideoGroupDPOTrainer) -> Iterator[None]:
        make = Trainer.create_optimizer  # DeepSpeed's integration makes another one than `made` has

        def forgetful(self: Trainer, model: Any = None) -> torch.optim.Optimizer:
            optimizer = make(self, model)
            optimizer.param_groups[0]["params"].pop()
            return optimizer

        with patch.object(Trainer, "create_optimizer", forgetful):
            yield

    for spoiled, message in (
        (a_block_skipped, "In the first step 8 (blocks.1."),
        (a_weight_forgotten, "The optimizer lacks 1 (blocks."),
    ):
        made = trainer(config(directory / spoiled.__name__, **common), rows=4)
        try:
            with spoiled(made):
                made.train()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{spoiled.__name__}: the training went on")
        assert made.state.global_step == 0

    limit = 1e-3  # far below the norm of this gradient; a step of SGD at a learning rate of 1 is the clipped gradient
    sgd = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": limit}
    made = trainer(config(directory / "clipped", lr_scheduler_type="constant", **common, **sgd), rows=4)
    before = {name.replace(".default.", "."): weight for name, weight in trained_weights(made).items()}
    made.train()
    assert made.state.log_history[0]["grad_norm"] > 10 * limit, made.state.log_history
    made.save_model(str(directory / "after"))
    if dist.get_rank() == 0:
        after, _ = load_lora_state(directory / "after")
        moved = torch.stack([(after[name] - weight).double().square().sum() for name, weight in before.items()])
        assert abs(moved.sum().sqrt().item() / limit - 1) < 0.01, moved.sum().sqrt()


def head(directory: Path, arguments: dict[str, Any]) -> None:
    """A module beside the transformer is trained, saved whole and resumed."""
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
    made = head_trainer(directory / "straight", rows=8, max_steps=4, **settings, **arguments)
    made.train()
    resumed = head_trainer(directory / "resumed", rows=8, max_steps=4, **settings, **arguments)
    resumed.train(resume_from_checkpoint=str(directory / "straight" / "checkpoint-2"))
    dist.barrier()
    for name in ("head.safetensors", "pytorch_lora_weights.safetensors"):
        left, right = (
            safetensors.torch.load_file(directory / run / "checkpoint-4" / name) for run in ("straight", "resumed")
        )
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), name
    if dist.get_rank() == 0:
        (directory / "losses.json").write_text(json.dumps(losses(made)))


def raw(directory: Path, arguments: dict[str, Any]) -> None:
    """A pipeline is loaded, and videos and prompts are encoded, by networks that no engine has sharded."""
    if dist.get_rank() == 0:
        tiny_wan_pipeline().save_pretrained(directory / "pipeline")
    dist.barrier()
    settings = {"per_device_train_batch_size": 1, "max_sequence_length": MAX_SEQUENCE_LENGTH, "max_steps": 1}
    args = config(directory / "run", cache_dir=str(directory / "cache"), **settings, **arguments)
    made = trainer(args, model=str(directory / "pipeline"), train_dataset=tiny_group_dataset(2))
    assert all(weight.numel() for weight in made.pipeline.text_encoder.parameters())
    made.train()


def again(directory: Path, arguments: dict[str, Any]) -> None:
    """A transformer whose tokens are shared is not taken by a second trainer."""
    pipeline, rows = tiny_wan_pipeline(), tiny_encoded_group(2)
    args = config(directory, context_parallel_size=2, **arguments)
    trainer(args, model=pipeline, train_dataset=rows)
    try:
        trainer(config(directory, **arguments), model=pipeline, train_dataset=rows)
    except ValueError as error:
        assert "load the model again" in str(error)
    else:
        raise AssertionError("the second trainer was made")


def main() -> None:
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo this number, which is 0 on CPUs
    directory = Path(sys.argv[1])
    for name in sys.argv[2:]:
        case, engine_name = name.split("+")
        with engine(ENGINES[engine_name]):
            (directory / name).mkdir(exist_ok=True)
            {"stop": stop, "head": head, "raw": raw, "again": again, "proof": proof}[case](
                directory / name, ENGINES[engine_name]
            )
        if dist.get_rank() == 0:
            (directory / name / "done").touch()


if __name__ == "__main__":
    main()
