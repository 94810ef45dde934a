"""The reference's errors computed ahead: the same training, to the last bit, as with the same noises and no cache."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch

import video_trl
from tests.support import forks, rounding
from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.runs import (
    RecordGradients,
    StopAfter,
    assert_equal_weights,
    double,
    losses,
    mixed_shapes,
    trained_weights,
)
from tests.trainer.step.test_step_modes import make
from tests.trainer.test_families import make as make_of_family
from video_trl.data import GroupCollator
from video_trl.trainer import PreferenceConfig, PreferenceTrainer
from video_trl.trainer.setup.rows import IndexedDataset
from video_trl.trainer.step.reference_errors import CachedReferenceErrors, cache_path, cached_step, load_errors


LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("GroupDPO", {"loss_type": "sampled", "shared_noise": False}),
    ("GroupDPO", {"loss_type": "plackett_luce", "physics_rewarding": False}),
    ("DPO", {"use_peft": False, "learning_rate": 1e-4}),
    ("RegDPO", {}),
]


def count_forwards(made: Any) -> Counter[str]:
    """How often the policy's transformer runs, with the adapter and without, that is as the reference."""
    counts: Counter[str] = Counter()

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        counts["with gradient" if torch.is_grad_enabled() else "without"] += 1

    made.model.register_forward_pre_hook(hook, with_kwargs=True)
    return counts


@pytest.mark.parametrize("mode", ["concat", "sequential"])
@pytest.mark.parametrize(("name", "changes"), LOSSES, ids=str)
def test_training_is_that_with_the_same_noises(name, changes, mode, tmp_path):
    def run(*, precomputed: bool) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
        recorder = RecordGradients()
        cached = {"precompute_ref_errors": 2, "cache_dir": str(tmp_path / "cache")} if precomputed else {}
        made = make(tmp_path, name, mode, callbacks=[recorder], max_steps=4, **cached, **changes)
        if not precomputed:
            drawn = CachedReferenceErrors(made.args.seed, [torch.zeros(2, 2)] * 4)
            made.step.noise_steps = lambda indices: [
                cached_step(drawn.number(made.state.global_step, index)) for index in indices
            ]
        made.train()
        return losses(made), recorder.steps

    ours, expected = run(precomputed=True), run(precomputed=False)
    assert ours[0] == expected[0] and len(ours[1]) == 4
    for gradients, others in zip(ours[1], expected[1], strict=True):
        assert_equal_weights(gradients, others)


def test_every_error_is_that_of_the_reference_on_its_noise(tmp_path):
    """Eleven rows of two shapes in batches of four: the last ones are filled up."""
    rows = mixed_shapes()
    changes = {"rows": rows, "loss_type": "sum", "physics_rewarding": False, "per_device_train_batch_size": 4}
    cached = {"precompute_ref_errors": 2, "cache_dir": str(tmp_path)}
    model = double(tiny_wan_pipeline())
    made = make(tmp_path, "GroupDPO", "concat", model=model, max_steps=1, **changes, **cached)
    made.train()
    (path,) = tmp_path.glob("reference_errors/*.safetensors")
    errors = load_errors(path)
    assert [tuple(row.shape) for row in errors] == [(2, 4)] * 11
    for index in (0, 1, 10):
        for number in range(2):
            inputs = {**made.data_collator([made.train_dataset[index]]), "index": [index]}
            measured = made.passes.measure(number, lambda inputs=inputs: made.compute_loss(made.model, inputs))
            expected = measured.float()  # as the cache rounds it, or to the other neighbour
            torch.testing.assert_close(errors[index][number], expected, rtol=2 * rounding.DOUBLE, atol=0)


def test_the_first_loss_is_log_2(tmp_path):
    made = make(tmp_path, "DPO", "concat", max_steps=1, precompute_ref_errors=3, cache_dir=str(tmp_path))
    made.train()
    assert losses(made) == [pytest.approx(math.log(2), abs=1e-7)] and made.state.log_history[0]["s_theta"] == 0.0


def test_the_reference_runs_k_times_a_row_and_in_the_next_run_not_at_all(tmp_path):
    settings = {
        "cache_dir": str(tmp_path / "cache"),
        "precompute_ref_errors": 2,
        "num_train_epochs": 5,
        "max_steps": -1,
    }
    made = make(tmp_path, "DPO", "concat", **settings)  # four rows in batches of two
    counts = count_forwards(made)
    made.train()
    assert counts == {"with gradient": 10, "without": 2 * 2}
    again = make(tmp_path, "DPO", "concat", **settings)
    counts = count_forwards(again)
    again.train()
    assert counts == {"with gradient": 10} and losses(again) == losses(made)


@dataclass
class StrongNoiseConfig(PreferenceConfig):
    """Of a method from outside the package, with an option that changes the noise, one that does not, and one that
    decides which videos are compared."""

    reference_error_options = (*PreferenceConfig.reference_error_options, "noise_factor")

    noise_factor: float = 1.0
    loss_factor: float = 1.0
    other_first: bool = False


class StrongNoiseTrainer(PreferenceTrainer):
    method_name, tag, summary = "StrongNoise", "strong-noise", "preference optimisation with strong noise"
    config_class = StrongNoiseConfig
    row_type = "preference"
    collator_class = GroupCollator
    workload_options = ("other_first",)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = inputs["chosen_latents"], inputs["rejected_latents"][:, -1 if self.args.other_first else 0]
        draw = self.step.draw(inputs["index"], chosen.shape[1:])
        latents = torch.stack([chosen, rejected], dim=1).flatten(0, 1)
        noise = self.args.noise_factor * draw.noise.expand(-1, 2, *chosen.shape[1:]).flatten(0, 1)
        timesteps = self.step.timesteps(draw.u).repeat_interleave(2)
        denoising = self.step.prepare(latents, noise, timesteps, self.step.conditions(inputs, repeats=2))
        reference_error = self.passes.reference(denoising, inputs["index"])
        gap = (self.passes.policy(model, denoising) - reference_error).view(-1, 2)
        losses = self.args.loss_factor * torch.nn.functional.softplus(gap[:, 0] - gap[:, 1])
        return (losses.mean(), {"losses": losses}) if return_outputs else losses.mean()


def test_an_option_of_a_method_from_outside_that_changes_errors_is_another_file(tmp_path):
    def files(**changes: Any) -> dict[str, list[torch.Tensor]]:
        settings = {"max_steps": 1, "precompute_ref_errors": 1, "cache_dir": str(tmp_path), "use_cpu": True, **changes}
        args = StrongNoiseConfig(str(tmp_path), save_strategy="no", disable_tqdm=True, **settings)
        StrongNoiseTrainer(tiny_wan_pipeline(), args, tiny_encoded_group(2)).train()
        return {path.name: load_errors(path) for path in tmp_path.glob("reference_errors/*")}

    assert len(files()) == len(files(loss_factor=2.0)) == 1
    assert len(files(noise_factor=2.0)) == 2
    stored = list(files(other_first=True).values())
    assert len(stored) == 3
    for first, second in combinations(stored, 2):
        assert not torch.equal(torch.cat(first), torch.cat(second))


def test_another_base_row_seed_or_distribution_of_noise_is_another_file(tmp_path):
    def files(**changes: Any) -> int:
        settings = {"max_steps": 1, "precompute_ref_errors": 1, "cache_dir": str(tmp_path), **changes}
        make(tmp_path, "DPO", "concat", **settings).train()
        return len(list(tmp_path.glob("reference_errors/*")))

    rows = tiny_encoded_group(4)
    rows[2]["chosen_latents"] = rows[2]["chosen_latents"] + 1e-6
    other = tiny_wan_pipeline()
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1e-3)
    assert files() == files() == files(learning_rate=0.5, lora_rank=2) == 1
    different = [{"seed": 1}, {"timestep_sampling": "logit_normal"}, {"rows": rows}, {"model": other}]
    different += [{"shared_noise": False}, {"step_mode": "sequential"}, {"precompute_ref_errors": 2}]
    assert [files(**change) for change in different] == list(range(2, 2 + len(different)))


def test_what_a_transformer_is_told_and_its_form_are_part_of_the_name(tmp_path):
    def settings(family: str, **changes: Any) -> dict[str, Any]:
        return make_of_family(family, "DPO", tmp_path, precompute_ref_errors=1, **changes)._cache_settings()

    assert settings("hunyuan-t2v") != settings("hunyuan-t2v", embedded_guidance=1.0)
    # One transformer, and rows that feed both.
    t2v, i2v = settings("ltx-t2v"), settings("ltx-i2v")
    assert {name for name in t2v if t2v[name] != i2v[name]} == {"family"}


def test_rows_may_have_cells_that_are_no_numbers(tmp_path):
    def name_of(**cells: Any) -> str:
        rows = [{**row, **cells} for row in tiny_encoded_group(2)]
        return cache_path(tmp_path, IndexedDataset(rows, [(4, 2, 4, 4)] * 2), {}).name

    scores = [{"sa": 0.5, "pc": 0.25}] * 3
    names = {name_of(), name_of(rejected_scores=scores), name_of(rejected_scores=scores[:2]), name_of(tags=["a", "b"])}
    assert len(names) == 4 and name_of(rejected_scores=scores) in names


def test_errors_are_measured_where_the_model_is(tmp_path):
    """The batch is on the device of the trainer, and what the host decides by are lists, as a loader has it."""
    made = make(tmp_path, "DPO", "concat", precompute_ref_errors=1)
    seen: dict[str, Any] = {}
    made.compute_loss = lambda model, inputs: seen.update(inputs)
    made.passes.measure = lambda number, compute_loss: compute_loss()
    made.args.__dict__["_setup_devices"] = torch.device("meta")
    made._errors_of_reference([0, 1], 0)
    tensors = {name: value.device.type for name, value in seen.items() if isinstance(value, torch.Tensor)}
    assert {"chosen_latents", "rejected_latents", "prompt_embeds"} <= tensors.keys()
    assert set(tensors.values()) == {"meta"} and seen["index"] == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("context_parallel_size", 2), ("context_parallel_method", "ring"), ("group_parallel_size", 2)],
)
def test_another_division_of_a_row_is_another_file(name, value, tmp_path):
    made = make(tmp_path, "DPO", "concat", precompute_ref_errors=1)
    before = made._cache_settings()
    setattr(made.args, name, value)
    assert made._cache_settings() != before


def test_evaluation_is_with_the_reference_itself(tmp_path):
    rows = tiny_encoded_group(3, seed=9)
    settings = {"max_steps": 2, "cache_dir": str(tmp_path)}
    made = make(tmp_path, "DPO", "concat", precompute_ref_errors=1, **settings)
    made.train()
    evaluated = made.evaluate(rows)
    fresh = make(tmp_path, "DPO", "concat", **settings)
    fresh.model.load_state_dict(made.model.state_dict())
    assert evaluated["eval_loss"] == fresh.evaluate(rows)["eval_loss"]


@pytest.mark.slow
def test_a_copied_reference_leaves_the_device_but_for_passes(tmp_path):
    """In a process of its own, on a device that only exists in the tests."""
    process = forks.start("-m", "tests.support.trainer.reference_moves", str(tmp_path))
    assert process.wait() == [0], process.errors[-3000:]
    (losses, first), (others, second), (expected, stays) = json.loads(process.output.splitlines()[-1])
    assert losses == others == expected and len(set(losses)) == 5  # three steps, two evaluations
    step, passes = ["step on cpu"], ["pass on watched"] * 2
    assert second == step * 2 + passes + step + passes
    assert first == passes + second  # which fill the cache
    assert {what.split()[-1] for what in stays} == {"watched"}


def test_a_resumed_run_goes_on_with_the_cached_errors(tmp_path):
    settings = {"max_steps": 4, "cache_dir": str(tmp_path / "cache"), "precompute_ref_errors": 2, "save_steps": 2}
    settings |= {"save_strategy": "steps"}
    whole = make(tmp_path / "whole", "DPO", "concat", **settings)
    whole.train()
    stopped = make(tmp_path / "stopped", "DPO", "concat", callbacks=[StopAfter(2)], **settings)
    stopped.train()
    resumed = make(tmp_path / "stopped", "DPO", "concat", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(trained_weights(resumed), trained_weights(whole))


def test_rows_see_all_noises_alike():
    cached = CachedReferenceErrors(0, [torch.zeros(4, 2)] * 3)
    numbers = [cached.number(step, index) for step in range(1000) for index in range(3)]
    assert set(numbers) == {0, 1, 2, 3} and max(abs(numbers.count(number) - 750) for number in range(4)) < 100
    assert numbers != [
        CachedReferenceErrors(1, [torch.zeros(4, 2)] * 3).number(s, i) for s in range(1000) for i in range(3)
    ]
    errors = [torch.arange(8.0).view(4, 2) + 10 * index for index in range(3)]
    looked_up = CachedReferenceErrors(0, errors).look_up(5, [2, 0])
    expected = [errors[index][cached.number(5, index)] for index in (2, 0)]
    assert torch.equal(looked_up, torch.cat(expected))
    assert len({cached_step(number) for number in range(9)} | {-1, 0}) == 11


@pytest.mark.parametrize("size", [0, -3])
def test_a_bank_without_noises_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match=f"`precompute_ref_errors` must be at least 1, got {size}"):
        video_trl.VideoDPOConfig(output_dir=str(tmp_path), use_cpu=True, precompute_ref_errors=size)
