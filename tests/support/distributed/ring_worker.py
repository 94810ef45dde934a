"""
Ring attention alone, next to attention on one process: relative errors of output and gradients, as JSON.

`ring_worker.py FILE PROCESSES`, which are forked, so that imports are paid for once. For diffusers as it is and as the
trainers use it, without and with activation checkpointing; in place of errors the name of an exception. `"kept"`: how
many numbers a checkpointed call still holds, per number of its output.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import start_processes
from torch.utils.checkpoint import checkpoint

from tests.support.distributed.cpu_attention import register_cpu_attention
from video_trl.models.attention.ring import mend_ring_attention


def attend(query: Tensor, key: Tensor, value: Tensor, config: Any = None) -> Tensor:
    # Doubled, so that a checkpointed call holds its inputs and not the tensors that attention gets.
    backend = AttentionBackendName._NATIVE_FLASH if config else AttentionBackendName.NATIVE
    return dispatch_attention_fn(2 * query, 2 * key, 2 * value, backend=backend, parallel_config=config)


def errors(config: Any, *, checkpointed: bool) -> dict[str, float] | str:
    torch.manual_seed(0)
    size, rank = dist.get_world_size(), dist.get_rank()
    query, key, value, gradient = (torch.randn(2, 8 * size, 3, 4) for _ in range(4))  # 3 heads, for any size
    whole = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = attend(*whole)
    expected = [expected, *torch.autograd.grad(expected, whole, gradient)]
    own = [tensor.chunk(size, dim=1)[rank].clone().requires_grad_() for tensor in (query, key, value)]
    out = checkpoint(attend, *own, config, use_reentrant=False) if checkpointed else attend(*own, config)
    try:
        found = [out, *torch.autograd.grad(out, own, gradient.chunk(size, dim=1)[rank])]
    except RuntimeError as error:
        return type(error).__name__
    distances = [
        (tensor.chunk(size, dim=1)[rank] - part).abs().max() / tensor.abs().max()
        for tensor, part in zip(expected, found, strict=True)
    ]
    worst = torch.stack(distances)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(("out", "query", "key", "value"), worst.tolist(), strict=True))


def kept(config: Any) -> float:
    """Numbers in tensors that the node of a checkpointed call holds besides what checkpointing knows of."""
    own = [torch.randn(2, 8, 3, 4, requires_grad=True) for _ in range(3)]
    out = checkpoint(attend, *own, config, use_reentrant=False)
    held = {**vars(out.grad_fn), **vars(vars(out.grad_fn).get("kept", SimpleNamespace()))}
    return sum(value.numel() for value in held.values() if isinstance(value, Tensor)) / out.numel()


def work(rank: int, size: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=size)
    register_cpu_attention()
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("ring", "ulysses"))
    context = ContextParallelConfig(ring_degree=size, mesh=mesh)
    context.setup(rank, size, torch.device("cpu"), mesh)
    config = SimpleNamespace(context_parallel_config=context)
    results = {}
    for name in ("diffusers", "mended"):
        if name == "mended":
            mend_ring_attention()
        results[name] = {
            "plain": errors(config, checkpointed=False),
            "checkpointed": errors(config, checkpointed=True),
            "kept": kept(config),
        }
    if rank == 0:
        Path(file).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(work, (int(sys.argv[2]), sys.argv[1]), nprocs=int(sys.argv[2]), start_method="fork")
