"""
What several processes with gloo compute, on every engine and however they divide a step, is what one computes alone:
losses, updates of the weights, checkpoints.
"""

import functools
import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from packaging.version import Version
from torch import Tensor

from tests.support import rounding
from tests.support.cells import CELLS
from tests.support.distributed.engine_runs import (
    COUNTED,
    COUNTED_DEEPSPEED,
    COUNTED_DEEPSPEED_OF_FOUR,
    COUNTED_OF_FOUR,
    precision,
    run,
)
from tests.support.distributed.launch import launch, launch_forked
from tests.support.trainer.runs import SMOOTH_ADAM
from video_trl.hub import LORA_FILE_NAME, load_lora_state


# Task and option, layout of the processes, engine; behind that, the run that is resumed. See engine_runs.py.
QUICK = [
    "concat+rows+fsdp2",
    "concat+sequential+fsdp2",
    "concat+tokens+ddp",
    "concat+singles+ddp",
    "cogvideox-t2v-full+tokens+ddp",
    "checkpointed+ring+ddp",
    "group+videos-sequential+fsdp2",
    "adamw+rows+fsdp2",
    "adamw+rows+fsdp2+adamw+rows+fsdp2",
    "concat:attention+rows+fsdp2",
    "banked+tokens+ddp",
]
SLOW = [
    "full+rows+fsdp2",
    "checkpointed+sequential+fsdp2",
    "mixed+rows+fsdp2",
    "mixed+sequential+fsdp2",
    "adamw-full+rows+fsdp2",
    "adamw-full+rows+fsdp2+adamw-full+rows+fsdp2",
    "adamw+rows+ddp",
    "adamw+rows+fsdp2+adamw+rows+ddp",
    "adamw+rows+ddp+adamw+rows+fsdp2",
    "concat+videos+ddp",
    "checkpointed+singles+ddp",
    "concat+videos-sequential+ddp",
    "concat+tokens-sequential+ddp",
    "checkpointed+tokens+fsdp2",
    "mixed+tokens+ddp",
    "wan-t2v-full+tokens+ddp",
    "wan-i2v-full+tokens+ddp",
    "cogvideox-t2v+tokens-sequential+fsdp2",
    "cogvideox-i2v-full+tokens+ddp",
    "cogvideox-2b-full+tokens+ddp",
    "odd-wan-t2v-full+tokens+ddp",
    "odd-wan-i2v-full+tokens+ddp",
    "odd-cogvideox-t2v-full+tokens+ddp",
    "odd-checkpointed+tokens-sequential+fsdp2",
    "checkpointed+ring+fsdp2",
    "wan-t2v-full+ring+ddp",
    "wan-i2v+ring+ddp",
    "mixed+ring+ddp",
    "concat:attention+sequential+fsdp2",
    "concat:offload+rows+fsdp2",
    "concat:attention+tokens+ddp",
    "concat:attention+ring+ddp",
    "concat:offload+tokens+ddp",
    "concat:offload+ring+ddp",
    "banked+rows+fsdp2",
    "banked+sequential+fsdp2",
    "banked-mixed+rows+fsdp2",
    "banked-full+rows+fsdp2",
    "banked-full+tokens+ddp",
    "banked+ring+ddp",
    "banked+tokens+fsdp2",
    "banked+videos+ddp",
    "banked+videos-sequential+fsdp2",
]
DEEPSPEED = [
    "concat+rows+zero2",
    "concat+sequential+zero2",
    "concat+tokens+zero2",
    "concat+videos-sequential+zero2",
    "full+rows+zero2",
    "concat+rows+zero3",
    "concat+sequential+zero3",
    "checkpointed+sequential+zero3",
    "concat+tokens-sequential+zero3",
    "full+rows+zero3",
    "mixed+sequential+zero3",
    "concat:offload+sequential+zero3",
    "banked+rows+zero2",
    "banked+sequential+zero3",
    "banked-full+rows+zero3",
    "concat+videos-sequential+zero3",
    "adamw+rows+zero2",
    "adamw+rows+zero2+adamw+rows+zero2",
    "adamw+rows+zero3",
    "adamw+rows+zero3+adamw+rows+zero3",
    "adamw+rows+zero3-offload",
    "adamw+rows+zero3-offload+adamw+rows+zero3-offload",
    "adamw-full+rows+zero3-offload",
]
BY_FAMILY = [
    *(f"{family}+rows+ddp" for family in CELLS["processes"]),
    *(f"{family}+tokens+ddp" for family in CELLS["context parallel"]),
]
FOUR = [
    "concat+rows-tokens+ddp",
    "concat+rows-tokens+fsdp2",
    "group+videos-tokens+ddp",
    "group+videos-tokens+fsdp2",
    "odd-four-heads+tokens-of-4+ddp",
    "checkpointed+ring-of-4+ddp",
    "checkpointed+ring-of-4+fsdp2",
    "concat+rows-ring+ddp",
]
COMPILED = [
    "concat:compiled+rows+ddp",
    "concat:compiled+sequential+ddp",
    "concat:compiled+rows+fsdp2",
    "concat:compiled+sequential+fsdp2",
    "concat:compiled-checkpointed+rows+fsdp2",
    "full:compiled+rows+fsdp2",
    "banked:compiled+rows+fsdp2",
    "group:compiled+videos-sequential+ddp",
    "concat:compiled+tokens+fsdp2",
    "concat:compiled-checkpointed+ring+ddp",
    "cogvideox-t2v:compiled+tokens+ddp",
]
COMPILED_DEEPSPEED = ["concat:compiled+rows+zero2", "concat:compiled+sequential+zero2"]
HALF = ["bf16+rows+ddp", "bf16+rows+fsdp2", "bf16+rows+zero2-bf16", "bf16+sequential+zero3-bf16"]

# What old libraries cannot do, or what is refused with them.
NOT_HERE = {
    "fsdp2": "" if hasattr(torch.cpu.Stream(), "record_event") else "FSDP2 runs on CPUs from torch 2.7 on",
    "+ring": "" if Version(diffusers.__version__) >= Version("0.41") else "refused with this diffusers",
}
needs_fsdp2 = pytest.mark.skipif(bool(NOT_HERE["fsdp2"]), reason=NOT_HERE["fsdp2"])
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs video-trl[deepspeed]")


def reason_against(name: str) -> str:
    """Why a run cannot be made here; empty if it can."""
    return next((reason for part, reason in NOT_HERE.items() if part in name and reason), "")


def where_it_runs(names: Sequence[str]) -> list[Any]:
    """Names of runs, those that cannot be made marked."""
    skip = pytest.mark.skipif
    return [pytest.param(name, marks=skip(bool(why := reason_against(name)), reason=why)) for name in names]


@functools.cache
def alone(task: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one process computes."""
    return run(task, "alone", Path(tempfile.mkdtemp()), dtype)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("quick")
    launch_forked("engine_runs.py", directory, *(name for name in QUICK if not reason_against(name)))
    return directory


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("slow")
    launch("engine_runs.py", directory, "adamw+rows+fsdp2", *SLOW, seconds=900)
    return directory


@pytest.fixture(scope="module")
def by_family(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("by_family")
    launch("engine_runs.py", directory, *BY_FAMILY, seconds=900)
    return directory


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("deepspeed")
    launch("engine_runs.py", directory, *DEEPSPEED, *HALF, seconds=1500)
    return directory


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("four")
    names = COUNTED_OF_FOUR if find_spec("deepspeed") is None else COUNTED_OF_FOUR + COUNTED_DEEPSPEED_OF_FOUR
    launch("engine_runs.py", directory, *FOUR, *names, processes=4, seconds=900)
    return directory


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("compiled")
    names = COMPILED if find_spec("deepspeed") is None else COMPILED + COMPILED_DEEPSPEED
    with pytest.MonkeyPatch.context() as patched:
        # A run that was killed leaves half a library in the common folder.
        patched.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        launch("engine_runs.py", directory, *names, seconds=1700)
    return directory


def distances(directory: Path, name: str) -> tuple[float, float]:
    """Of the update, relative to its largest entry, and of the losses, to what one process computes."""
    expected = alone(name.split("+")[0].partition(":")[0], precision(name))
    found = safetensors.torch.load_file(directory / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    losses = (found.pop("losses") / expected["losses"] - 1).abs().max()
    scale = max(update.abs().max() for name, update in expected.items() if name != "losses")
    assert scale > 1e-3
    return float(max((update - expected[name]).abs().max() for name, update in found.items()) / scale), float(losses)


def check(directory: Path, name: str) -> None:
    update, losses = distances(directory, name)
    gradient, task = rounding.SINGLE, name.partition("+")[0]
    if precision(name) == torch.float64:
        gradient = rounding.DOUBLE
        if "full" in task and "cogvideox" not in task:  # Wan's norms: two steps, videos of all rows, their tokens
            gradient = rounding.sums(2 * 4 * 4 * 45)
    if task.startswith("adamw"):
        # Updates are about lr steps g / (g + epsilon) and differ by rounding.adam; with gradients below 1:
        gradient *= 2 * (1 + SMOOTH_ADAM["adam_epsilon"]) / SMOOTH_ADAM["adam_epsilon"]
    assert update < gradient and losses < max(gradient, rounding.LOGGED)


@pytest.mark.parametrize("name", where_it_runs(QUICK))
def test_two_processes_compute_what_one_computes(quick, name):
    check(quick, name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SLOW)
def test_every_layout_computes_what_one_process_computes(slow, name):
    check(slow, name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", BY_FAMILY)
def test_two_processes_compute_what_one_computes_of_every_family(by_family, name):
    check(by_family, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_deepspeed
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_computes_what_one_process_computes(with_deepspeed, name):
    check(with_deepspeed, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", [*COMPILED, *(pytest.param(name, marks=needs_deepspeed) for name in COMPILED_DEEPSPEED)]
)
def test_compiled_blocks_compute_on_every_engine_what_one_process_computes_without(compiled, name):
    check(compiled, name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_divide_a_step_in_two_ways_at_once(four, name):
    check(four, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_deepspeed
@pytest.mark.parametrize("name", HALF)
def test_bfloat16_agrees_to_its_precision(with_deepspeed, name):
    update, losses = distances(with_deepspeed, name)
    assert losses < 1e-2
    assert update < 2e-2  # rounding: two batches of two rows, without any engine, are as far from one of four


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_deepspeed
def test_bfloat16_with_fsdp2_is_that_of_data_parallelism(with_deepspeed):
    left, right = (
        safetensors.torch.load_file(with_deepspeed / f"bf16+rows+{e}.safetensors") for e in ("ddp", "fsdp2")
    )
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same_files(directory: Path, straight: str, resumed: str, tolerance: float = 0.0) -> None:
    """A run in two parts leaves the adapter, or the transformer, of a run in one, to the last bit if not told."""
    for path in (directory / straight / "checkpoint-4").rglob("*.safetensors"):
        other = directory / resumed / path.relative_to(directory / straight)
        left, right = safetensors.torch.load_file(path), safetensors.torch.load_file(other)
        assert left.keys() == right.keys() and left
        assert all((left[name] - right[name]).abs().max() <= tolerance for name in left), path


def check_sent(directory: Path, name: str) -> None:
    told = json.loads((directory / f"{name}-1.json").read_text())
    counted, single = told["counted"], precision(name).itemsize / 4  # of estimates, which know no float64
    engine = name.split("+")[2]
    purposes = {
        "gradients": "_reduce_scatter_base_" if engine in ("fsdp2", "zero3") else "allreduce_",
        "weights": "_allgather_base_",
        "tokens and heads": "all_to_all_single",
    }
    assert told["estimated"]
    for purpose, number in told["estimated"].items():
        # Beside gradients go a loss and flags, some 100 bytes a step. ZeRO-3 fetches some weights ahead in vain, and
        # keeps others until the next pass, which of a model as small as this one are many.
        most = told["filled"] * number if engine == "fsdp2" else 1.005 * number + 100
        kept = purpose == "weights" and engine == "zero3"
        least, most = (0.95 * number, 1.07 * number) if kept else (number, most)
        assert least <= counted.pop(purposes[purpose]) / single <= most, purpose
    assert sum(counted.values()) < 150  # the loss and flags, where gradients go otherwise


@pytest.mark.parametrize("name", where_it_runs(COUNTED))
def test_processes_send_what_is_estimated(quick, name):
    check_sent(quick, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_deepspeed
@pytest.mark.parametrize("name", COUNTED_DEEPSPEED)
def test_processes_of_deepspeed_send_what_is_estimated(with_deepspeed, name):
    check_sent(with_deepspeed, name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", [*COUNTED_OF_FOUR, *(pytest.param(name, marks=needs_deepspeed) for name in COUNTED_DEEPSPEED_OF_FOUR)]
)
def test_four_processes_send_what_is_estimated(four, name):
    check_sent(four, name)


@needs_fsdp2
def test_resuming_is_bit_exact(quick):
    same_files(quick, "adamw+rows+fsdp2", "adamw+rows+fsdp2+adamw+rows+fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("straight", "resumed"),
    [
        ("adamw-full+rows+fsdp2", "adamw-full+rows+fsdp2+adamw-full+rows+fsdp2"),
        ("adamw+rows+ddp", "adamw+rows+ddp+adamw+rows+fsdp2"),
        ("adamw+rows+fsdp2", "adamw+rows+fsdp2+adamw+rows+ddp"),
    ],
)
def test_full_tuning_and_a_change_of_engine_are_resumed_exactly(slow, straight, resumed):
    same_files(slow, straight, resumed)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "tolerance"),
    # DeepSpeed's Adam on the host multiplies powers of beta up step by step, and after a resume takes `pow`.
    [("zero2", 0.0), ("zero3", 0.0), ("zero3-offload", 1e-6)],
)
def test_deepspeed_resumes_exactly(with_deepspeed, stage, tolerance):
    same_files(with_deepspeed, f"adamw+rows+{stage}", f"adamw+rows+{stage}+adamw+rows+{stage}", tolerance)


@needs_fsdp2
def test_the_adapter_of_sharded_weights_is_whole_and_that_of_one_process(quick, tmp_path):
    run("adamw", "alone", tmp_path, precision("adamw+rows+fsdp2"))
    expected, expected_config = load_lora_state(tmp_path / "checkpoint-4")
    found, found_config = load_lora_state(quick / "adamw+rows+fsdp2" / "checkpoint-4")
    assert found_config == expected_config and found.keys() == expected.keys()
    for name, weight in found.items():
        rounding.assert_close(weight, expected[name], 1e-4)
    names = {path.name for path in (quick / "adamw+rows+fsdp2" / "checkpoint-4").iterdir()}
    assert {LORA_FILE_NAME, "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert not [name for name in names if name.startswith("pytorch_model")]  # the base is not saved along


@pytest.mark.slow
def test_fully_tuned_sharded_weights_load_from_their_folder(slow):
    checkpoint = slow / "adamw-full+rows+fsdp2" / "checkpoint-4"
    loaded = WanTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    found = safetensors.torch.load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name: weight.shape for name, weight in loaded.state_dict().items()} == {
        name: weight.shape for name, weight in found.items()
    }
