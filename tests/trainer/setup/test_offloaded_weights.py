"""Frozen weights of blocks in the host's memory: the same numbers, and which block is copied when."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.tiny import TINY_FAMILIES, tiny_encoded_group, tiny_pipeline, tiny_transformer
from tests.support.trainer.runs import assert_equal_weights, losses, trained_weights
from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.models.checkpoints import known_checkpoint
from video_trl.trainer.planning.estimate import HEADROOM, Placement, Workload, estimate, recommend
from video_trl.trainer.setup.offloaded_weights import OffloadedWeights


def make(directory: Any, family: str = "wan-t2v", model: Any = None, **changes: Any) -> VideoDPOTrainer:
    defaults = {"max_steps": 2, "lora_rank": 2, "learning_rate": 1e-2, "activation_checkpointing": True}
    quiet = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True}
    settings = defaults | quiet | dict(TINY_FAMILIES[family].options) | changes
    args = VideoDPOConfig(output_dir=str(directory), **settings)
    return VideoDPOTrainer(model or tiny_pipeline(family), args, tiny_encoded_group(2, m=1, family=family))


@pytest.fixture
def copied(monkeypatch) -> Iterator[list[int]]:
    """Blocks in the order in which their weights are copied; never are those of more than two on the device."""
    numbers: list[int] = []
    fetch = OffloadedWeights.fetch

    def noting(self: OffloadedWeights, number: int) -> None:
        if number not in self._arrivals:
            numbers.append(number)
        fetch(self, number)
        there = [any(weight.numel() for weight in weights) for weights in self._weights]
        assert sum(there) <= 2

    monkeypatch.setattr(OffloadedWeights, "fetch", noting)
    yield numbers


@pytest.mark.parametrize(
    ("family", "step_mode"),
    [
        ("wan-t2v", "concat"),
        ("hunyuan-t2v", "sequential"),  # blocks of two kinds
        pytest.param("wan-5b-i2v", "sequential", marks=pytest.mark.slow),
        pytest.param("hunyuan1.5-t2v", "concat", marks=pytest.mark.slow),
        pytest.param("ltx2-t2v", "sequential", marks=pytest.mark.slow),
    ],
)
def test_every_bit_of_a_run_is_the_same(family, step_mode, tmp_path, copied):
    runs = []
    for offload in (False, True):
        made = make(tmp_path / str(offload), family, step_mode=step_mode, offload_weights=offload)
        made.train()
        assert bool(copied) == offload
        runs.append((losses(made), trained_weights(made)))
    assert runs[0][0] == runs[1][0]
    assert_equal_weights(runs[0][1], runs[1][1])


def test_the_next_block_is_copied_ahead_up_the_forward_and_down_the_backward_pass(tmp_path, copied):
    pipeline = tiny_pipeline("wan-t2v")
    pipeline.transformer = tiny_transformer(num_layers=4)
    made = make(tmp_path, model=pipeline, max_steps=2, step_mode="concat", offload_weights=True)
    made.train()
    reference, policy, backward = [0, 1, 2, 3], [0, 1, 2, 3], [1, 0]
    # Two blocks are there at each turn: 3 and 2 before the backward pass, 0 and 1 before the next step.
    assert copied == [*reference, *policy, *backward, *reference[2:], *policy, *backward]


def test_a_pipeline_generates_meanwhile_and_gets_its_weights_back(tmp_path):
    pipeline, untouched = tiny_pipeline("wan-t2v"), tiny_pipeline("wan-t2v")
    made = make(tmp_path / "first", model=pipeline, offload_weights=True)
    call = {"prompt": "a red ball falls", "num_inference_steps": 1, **made.sampler.call_kwargs, "output_type": "np"}
    with made.sampler.generation() as lent, torch.no_grad():
        ours = lent(generator=torch.Generator().manual_seed(0), **call).frames
    theirs = untouched(generator=torch.Generator().manual_seed(0), **call).frames
    assert (ours == theirs).all()
    make(tmp_path / "second", model=pipeline)  # another trainer, without
    whole = dict(untouched.transformer.named_parameters())
    for name, weight in pipeline.transformer.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, whole[name.replace(".base_layer", "")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": False}, "trains the weights themselves"),
        ({"activation_checkpointing": False}, "needs all weights at once"),
        ({"compile_blocks": True}, "weights that are not there"),
        ({"quantization": "int8"}, "small already"),
    ],
)
def test_what_needs_all_weights_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **({"offload_weights": True} | changes))


def workload(name: str, latents_shape: tuple[int, int, int, int], rank: int = 16) -> Workload:
    known = known_checkpoint(name)
    assert known is not None
    return Workload(known["transformer"], latents_shape, num_videos=2, reference="adapter", lora_rank=rank)


def test_an_estimate_has_the_weights_of_two_blocks(tmp_path):
    small = Workload(
        {"_class_name": "WanTransformer3DModel", **tiny_transformer(num_layers=4).config},
        (4, 2, 4, 4),
        num_videos=2,
        reference="adapter",
        lora_rank=2,
        bf16=False,
    )
    whole, offloaded = (estimate(small, Placement(offload_weights=offload)) for offload in (False, True))
    transformer = tiny_transformer(num_layers=4)
    block = sum(weight.nbytes for weight in transformer.blocks[0].parameters())
    assert whole.parts["weights"] - offloaded.parts["weights"] == 2 * block
    assert offloaded.host == {"weights": 4 * block} and whole.host == {}
    changed = {"placement": offloaded.placement, "parts": offloaded.parts, "host": offloaded.host}
    assert replace(whole, **changed) == offloaded
    assert "offload_weights" in str(offloaded.placement)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "latents_shape", "gib"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (16, 21, 60, 104), 24),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (16, 21, 60, 104), 12),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", (48, 31, 44, 80), 12),
    ],
)
def test_small_cards_have_a_configuration(name, latents_shape, gib):
    """Of the published sizes, 81 frames of 480x832 and 121 of 704x1280, a pair of videos."""
    fitting = recommend(workload(name, latents_shape), gib * 2**30)
    assert fitting is not None and fitting.peak <= HEADROOM * gib * 2**30
    assert fitting.placement.offload_weights == ("1.3B" not in name)
