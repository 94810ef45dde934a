"""
Short runs that one process and several do alike, by name; each leaves its losses and the update of its weights.

Run by `torchrun`: `engine_runs.py DIRECTORY NAME...`, where a name is `TASK+LAYOUT+ENGINE` or
`TASK:OPTION+LAYOUT+ENGINE`, and behind that, for a run that is resumed, the name of the run whose checkpoint it takes.
The optimizer is plain gradient descent, unless a task says otherwise, so that an update is a sum of gradients.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.distributed.cpu_attention import register_cpu_attention
from tests.support.distributed.cpu_engines import FSDP2, engine, zero
from tests.support.tiny import (
    FAMILIES,
    TINY_FAMILIES,
    tiny_cogvideox_pipeline,
    tiny_cogvideox_transformer,
    tiny_encoded_group,
    tiny_pipeline,
    tiny_transformer,
)
from tests.support.trainer.runs import SMOOTH_ADAM, config, losses, mixed_shapes
from video_trl import VideoGroupDPOTrainer
from video_trl.trainer.checkpoints.weights import gather, trained_weights
from video_trl.trainer.planning.estimate import estimate


ENGINES = {
    "ddp": {"ddp_backend": "gloo"},
    "fsdp2": FSDP2,
    "zero2": zero(2, sgd=True),
    "zero3": zero(3, sgd=True),
    "zero3-offload": zero(3, offload=True),
    "zero2-bf16": zero(2, bf16=True, sgd=True),
    "zero3-bf16": zero(3, bf16=True, sgd=True),
}
# What a run does that all processes share: its part of the name before the engine's.
TASKS: dict[str, dict[str, Any]] = {
    "concat": {},
    "group": {"loss_type": "plackett_luce"},  # 1 + 3 videos; of the others the loss compares 2
    "checkpointed": {"activation_checkpointing": True},
    "full": {"use_peft": False, "learning_rate": 1e-3},
    "banked": {"precompute_ref_errors": 1},
    "banked-mixed": {"precompute_ref_errors": 2, "max_steps": 4, "mixed": True},
    "banked-full": {"precompute_ref_errors": 1, "use_peft": False, "learning_rate": 1e-3},
    "bf16": {"bf16": True},
    "adamw": {
        **SMOOTH_ADAM,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    "adamw-full": {
        **SMOOTH_ADAM,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_peft": False,
    },
    **{family: {"family": family} for family in TINY_FAMILIES},
    **{f"{family}-full": {"family": family, "use_peft": False, "learning_rate": 1e-3} for family in FAMILIES},
    "cogvideox-2b-full": {"family": "cogvideox-2b", "use_peft": False, "learning_rate": 1e-3},
    "mixed": {"max_steps": 4, "mixed": True},
    # Tokens that two processes cannot divide: 3 x 3 x 3, 3 x 3 x 5
    **{
        f"odd-{family}-full": {"family": family, "use_peft": False, "learning_rate": 1e-3, "latents_shape": shape}
        for family, shape in (("wan-t2v", (4, 3, 6, 6)), ("wan-i2v", (4, 3, 6, 6)), ("cogvideox-t2v", (4, 3, 6, 10)))
    },
    "odd-checkpointed": {"activation_checkpointing": True, "latents_shape": (4, 3, 6, 6)},
    # 1 x 3 x 3 tokens: the last of four processes has filled up ones only
    "odd-four-heads": {"heads": 4, "activation_checkpointing": True, "latents_shape": (4, 1, 6, 6)},
}
# What changes no number of a task: behind its name and a colon.
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "compiled": {"compile_blocks": True},
    "compiled-checkpointed": {"compile_blocks": True, "activation_checkpointing": True},
    **{
        policy: {"activation_checkpointing": True, "checkpointing_policy": policy}
        for policy in ("attention", "offload")
    },
}
# Runs of which is counted what the processes send.
COUNTED = ("concat+rows+fsdp2", "concat+sequential+fsdp2", "concat+tokens+ddp", "concat+singles+ddp")
COUNTED_DEEPSPEED = (
    "concat+rows+zero2",
    "concat+rows+zero3",
    "concat+sequential+zero3",
    "full+rows+zero3",
)
COUNTED_OF_FOUR = ("concat+rows-of-4+ddp", "concat+rows-of-4+fsdp2")
COUNTED_DEEPSPEED_OF_FOUR = ("concat+rows-of-4+zero2", "concat+rows-of-4+zero3")
RING = {"context_parallel_method": "ring", "attention_backend": "_native_flash"}
# How several processes divide a step of four rows.
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {"per_device_train_batch_size": 2},
    "rows-of-4": {"per_device_train_batch_size": 1},
    "singles": {"per_device_train_batch_size": 2, "step_mode": "singles"},
    "sequential": {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "step_mode": "sequential",
    },
    "tokens": {"per_device_train_batch_size": 4, "context_parallel_size": 2},
    "tokens-sequential": {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "context_parallel_size": 2,
        "step_mode": "sequential",
    },
    "videos": {"per_device_train_batch_size": 4, "group_parallel_size": 2},
    "videos-sequential": {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "group_parallel_size": 2,
        "step_mode": "sequential",
    },
    "videos-tokens": {
        "per_device_train_batch_size": 4,
        "group_parallel_size": 2,
        "context_parallel_size": 2,
    },
    "ring": {"per_device_train_batch_size": 4, "context_parallel_size": 2, **RING},
    "ring-of-4": {"per_device_train_batch_size": 4, "context_parallel_size": 4, **RING},
    "tokens-of-4": {"per_device_train_batch_size": 4, "context_parallel_size": 4},
    "rows-ring": {"per_device_train_batch_size": 2, "context_parallel_size": 2, **RING},
    "rows-tokens": {"per_device_train_batch_size": 2, "context_parallel_size": 2},
    "alone": {"per_device_train_batch_size": 4},
}


class SentBytes(TorchDispatchMode):
    """Bytes that this process sends by each kind of collective, if rings carry them: `of`."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        kind = function._overloadpacket.__name__
        if function.namespace in ("c10d", "_c10d_functional") and kind in _SENT:
            size = sum(tensor.nbytes for tensor in tree_leaves(args[0]) if isinstance(tensor, Tensor))
            self.of[kind] += _SENT[kind](dist.get_world_size()) * size
        return output


# By what the first argument of a collective is multiplied: of n processes, what one sends of it.
_SENT = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,  # the whole
    "_reduce_scatter_base_": lambda n: n - 1,  # the part of a process
    "all_to_all_single": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
}


def filled_up(blocks: Iterable[torch.nn.Module]) -> float:
    """FSDP2 divides rows and fills up those of small tables: weights of blocks with these rows, by the weights."""
    number, weights = dist.get_world_size(), [weight for block in blocks for weight in block.parameters()]
    filled = sum(-(-weight.shape[0] // number) * number * math.prod(weight.shape[1:]) for weight in weights)
    return filled / sum(weight.numel() for weight in weights)


def precision(name: str) -> torch.dtype:
    """Of the weights of a run: float64 where all of it can be; DeepSpeed and ring attention know float32 only."""
    task, layout, engine_name = name.split("+")[:3]
    single = task == "bf16" or "ring" in layout or engine_name.startswith("zero")
    return torch.float32 if single else torch.float64


def run(
    task: str,
    layout: str,
    directory: Path,
    dtype: torch.dtype,
    resume: Path | None = None,
    counts: bool = False,
    **arguments: Any,
) -> dict[str, Tensor]:
    """
    Train weights of a type; returns their update, with the losses beside them. With `counts`, what each process sends
    in a micro-batch is written, as counted and as estimated.
    """
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "beta": 20.0, "max_grad_norm": 0.0}
    task, _, option = task.partition(":")
    settings |= TASKS[task] | OPTIONS[option] | LAYOUTS[layout] | arguments
    family = settings.pop("family", "wan-t2v")
    if family == "cogvideox-2b":  # no rotary embeddings
        family, transformer = "cogvideox-t2v", tiny_cogvideox_transformer(use_rotary_positional_embeddings=False)
        pipeline = tiny_cogvideox_pipeline(transformer=transformer)
    else:
        pipeline, settings = tiny_pipeline(family), {**settings, **TINY_FAMILIES[family].options}
    if "heads" in settings:
        pipeline.transformer = tiny_transformer(num_attention_heads=settings.pop("heads"))
    pipeline.transformer.to(dtype)
    size = {"latents_shape": settings.pop("latents_shape")} if "latents_shape" in settings else {}
    if "precompute_ref_errors" in settings:
        settings["cache_dir"] = str(directory / "cache")
    rows = mixed_shapes() if settings.pop("mixed", False) else tiny_encoded_group(8, family=family, **size)
    made = VideoGroupDPOTrainer(pipeline, config(directory, **settings), rows)
    before = gather(trained_weights(made.model, made.adapter_name), keep=True)
    before = {name: weight.clone() for name, weight in before.items()}
    sent = SentBytes()
    with sent if counts else nullcontext():
        made.train(resume_from_checkpoint=resume and str(resume))
    if counts:
        # Estimates know no trained weights in float64: all in float32, of which the test takes twice as much.
        work = made.workload()
        work = replace(work, frozen_dtype=work.frozen_dtype if made.args.bf16 else torch.float32)
        estimated = estimate(work, made.placement()).sent
        micro_batches = made.state.max_steps * made.args.gradient_accumulation_steps
        found = {kind: number / micro_batches for kind, number in sent.of.items()}
        (directory.parent / f"{directory.name}-{dist.get_rank()}.json").write_text(
            json.dumps(
                {
                    "counted": found,
                    "estimated": estimated,
                    "filled": filled_up(made.family.blocks(made.model)) if "fsdp" in settings else 1.0,
                }
            )
        )
    if "fsdp" in settings:
        assert all(isinstance(block, FSDPModule) for block in made.family.blocks(made.model))
    if settings.get("compile_blocks"):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    after = gather(trained_weights(made.model, made.adapter_name), keep=True)
    return {
        **{name: weight - before[name] for name, weight in after.items()},
        "losses": torch.tensor(losses(made), dtype=torch.float64),
    }


def keep(directory: Path, name: str, results: dict[str, Tensor]) -> None:
    if dist.get_rank() == 0:
        safetensors.torch.save_file(results, directory / f"{name}.safetensors")


def main() -> None:
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo this number, which is 0 on CPUs
    register_cpu_attention()
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        task, layout, engine_name, *resumed = name.split("+")
        with engine(ENGINES[engine_name]):
            checkpoint = directory / "+".join(resumed) / "checkpoint-2" if resumed else None
            counted = (*COUNTED, *COUNTED_DEEPSPEED, *COUNTED_OF_FOUR, *COUNTED_DEEPSPEED_OF_FOUR)
            how = {"counts": name in counted, **ENGINES[engine_name]}
            results = run(task, layout, directory / name, precision(name), checkpoint, **how)
            keep(directory, name, results)


if __name__ == "__main__":
    main()
