"""What is recomputed changes no bit of the gradient, and keeps what it says."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import video_trl
from tests.support.tiny import tiny_wan_pipeline
from tests.support.trainer.runs import RecordGradients, disturb_adapter
from tests.trainer.step.test_step_modes import make
from tests.trainer.test_families import rows_for, tiny_pipeline
from video_trl.models import family_for
from video_trl.trainer.planning.counter import LiveBytes
from video_trl.trainer.setup.activation_checkpointing import enable_recompute


POLICIES = ["full", "attention", "offload"]


def gradients(directory, **changes: Any) -> dict[str, torch.Tensor]:
    recorder = RecordGradients()
    made = make(
        directory, "GroupDPO", "sequential", max_steps=1, callbacks=[recorder], physics_rewarding=False, **changes
    )
    disturb_adapter(made)
    made.train()
    return recorder.steps[0]


@pytest.mark.parametrize("family", ["wan-t2v", "cogvideox-t2v"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_without_recomputation(policy, family, tmp_path):
    def run(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        return gradients(tmp_path / name, model=tiny_pipeline(family), rows=rows_for(family, "GroupDPO"), **changes)

    kept = run("kept", activation_checkpointing=False)
    recomputed = run("recomputed", activation_checkpointing=True, checkpointing_policy=policy)
    assert recomputed.keys() == kept.keys()
    assert all(torch.equal(gradient, kept[name]) for name, gradient in recomputed.items())


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def one_step(policy: str | None, host: Any = None) -> tuple[Counter[str], int, int]:
    """Operations of a forward and backward pass, the number of attentions in it, and bytes alive at the peak."""
    transformer = tiny_wan_pipeline().transformer.train()
    adapter = family_for(transformer)
    if policy is not None:
        enable_recompute(transformer, policy, host)
    latents, prompts = torch.randn(1, 4, 4, 16, 16), {"prompt_embeds": torch.randn(1, 6, 16)}

    def step() -> None:
        adapter.predict(transformer, latents, torch.full((1,), 500.0), prompts).sum().backward()

    with Operations() as counted:
        step()
    memory = LiveBytes()  # also what selective checkpointing keeps, which is not in the graph
    with memory:
        step()
    return counted.calls, counted.calls["_scaled_dot_product_flash_attention_for_cpu"], memory.peak


def test_each_policy_recomputes_what_it_says():
    layers = len(tiny_wan_pipeline().transformer.blocks)
    _, attentions, most = one_step(None)
    full, full_attentions, least = one_step("full")
    assert attentions == 2 * layers and full_attentions == 2 * attentions  # self- and cross-attention
    without_attention, count, held = one_step("attention")
    assert count == attentions + layers  # to the prompt
    assert without_attention["addmm"] == full["addmm"] and least < held < most


def test_offloaded_inputs_are_in_the_hosts_memory():
    """Every input of a block is handed to the host, and fetched once."""
    layers, packed, unpacked = len(tiny_wan_pipeline().transformer.blocks), [], []

    def host() -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor.shape)
            return tensor.clone()

        def unpack(tensor: torch.Tensor) -> torch.Tensor:
            unpacked.append(tensor.shape)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    one_step("offload", host)
    tokens = (1, 256, 24)
    assert packed.count(torch.Size(tokens)) == 2 * layers  # one_step makes two of them
    assert len(unpacked) == len(packed)


@pytest.mark.parametrize("policy", ["half", "ffn", "every_2", "Full"])
def test_unknown_policies_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="`checkpointing_policy` must be one of 'full', 'attention', 'offload', got"):
        video_trl.VideoSFTConfig(output_dir=str(tmp_path), use_cpu=True, checkpointing_policy=policy)
