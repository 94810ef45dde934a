"""A module trained beside the transformer: it learns, is resumed exactly, and is in nothing that is published."""

import copy

import pytest
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_wan_pipeline
from tests.support.trainer.heads import HeadTrainer, head_trainer
from tests.support.trainer.runs import RecordGradients, StopAfter, assert_equal_weights, losses, trained_weights
from video_trl import VideoSFTTrainer
from video_trl.files import write_checksums


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


class FastHeadTrainer(HeadTrainer):
    rate_of_head = 0.5


class WideHeadTrainer(HeadTrainer):
    hidden = 7


def head_weights(made: HeadTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in made.trained_head.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"use_peft": False}, {"activation_checkpointing": True}])
def test_gradients_reach_the_head_and_through_it_the_transformer(tmp_path, changes):
    recorder = RecordGradients()
    made = head_trainer(tmp_path, max_steps=1, callbacks=[recorder], learning_rate=1e-3, **changes)
    before = head_weights(made)
    made.train()
    gradients = recorder.steps[0]
    assert {f"trained_head.{name}" for name in before} <= gradients.keys()
    for name, weight in head_weights(made).items():
        assert gradients[f"trained_head.{name}"].abs().sum() > 0
        assert not torch.equal(weight, before[name]), name
    assert all(weight.dtype == torch.float32 for weight in made.trained_head.parameters())
    assert made.model.trained_head is made.trained_head and made.trained_head.layers[1].p == 0.0

    plain = VideoSFTTrainer(tiny_wan_pipeline(), copy.copy(made.args), made.train_dataset.rows)
    recorder = RecordGradients()
    plain.add_callback(recorder)
    plain.train()
    name = next(name for name in recorder.steps[0] if "blocks.0" in name and ("lora_B" in name or "lora" not in name))
    assert not torch.equal(recorder.steps[0][name], gradients[name])


@pytest.mark.parametrize("use_peft", [True, False])
def test_saved_files_are_those_of_a_run_without_a_head(tmp_path, use_peft):
    made = head_trainer(tmp_path, use_peft=use_peft, **(SAVING | {"max_steps": 2}))
    made.train()
    made.save_model(str(tmp_path / "saved"))
    made.pipeline.save_pretrained(tmp_path / "pipeline")
    files = [path for path in tmp_path.rglob("*.safetensors") if path.name != "head.safetensors"]
    assert len(files) >= 3
    for path in files:
        assert not [name for name in safetensors.torch.load_file(path) if "trained_head" in name], path
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*head*")] == ["checkpoint-2/head.safetensors"]
    assert not [name for name in made.model.state_dict() if "trained_head" in name]
    fresh = tiny_wan_pipeline(seed=1)
    if use_peft:
        fresh.load_lora_weights(str(tmp_path / "saved"), **IN_FOLDER)
    else:
        loaded = WanTransformer3DModel.from_pretrained(tmp_path / "saved", subfolder="transformer")
        assert_equal_weights(loaded.state_dict(), made.model.state_dict())


@pytest.mark.parametrize("changes", [{}, {"use_peft": False, "learning_rate": 1e-3}])
def test_resuming_is_bit_exact(tmp_path, changes):
    straight = head_trainer(tmp_path, kind=FastHeadTrainer, **SAVING, **changes)
    straight.train()
    resumed = head_trainer(tmp_path / "resumed", kind=FastHeadTrainer, max_steps=4, **changes)
    torch.manual_seed(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    assert losses(resumed) == losses(straight)


def test_another_head_or_none_is_refused(tmp_path):
    checkpoint = str(tmp_path / "checkpoint-2")
    head_trainer(tmp_path, callbacks=[StopAfter(2)], **SAVING).train()
    with pytest.raises(ValueError, match=r"their trained_head differs .*out_features=5.* / .*out_features=7"):
        head_trainer(tmp_path / "wide", kind=WideHeadTrainer).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="their trained_head differs .* / None"):
        made = head_trainer(tmp_path / "none")
        plain = VideoSFTTrainer(tiny_wan_pipeline(), made.args, made.train_dataset.rows)
        plain.train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-2" / "head.safetensors").unlink()
    write_checksums(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="Expected head.safetensors in .*, for the Head .*, got"):
        head_trainer(tmp_path / "lost").train(resume_from_checkpoint=checkpoint)


def test_the_best_checkpoint_brings_its_head(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    made = head_trainer(tmp_path, eval_dataset=head_trainer(tmp_path).train_dataset.rows, **SAVING, **best)
    made.train()
    stored = safetensors.torch.load_file(f"{made.state.best_model_checkpoint}/head.safetensors")
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_equal_weights(head_weights(made), stored)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_the_head_has_its_own_learning_rate_on_the_same_schedule(tmp_path, scheduler):
    made = head_trainer(
        tmp_path, kind=FastHeadTrainer, max_steps=3, lr_scheduler_type=scheduler, warmup_steps=1, weight_decay=0.1
    )
    made.train()
    named = {id(weight): name for name, weight in made.model.named_parameters()}
    groups = [
        (sorted(named[id(w)] for w in group["params"]), group["initial_lr"], group["lr"], group["weight_decay"])
        for group in made.optimizer.param_groups
    ]
    heads = [group for group in groups if any("trained_head" in name for name in group[0])]
    assert [(names, initial, decay) for names, initial, _, decay in heads] == [
        (["trained_head.layers.0.weight", "trained_head.layers.2.weight"], 0.5, 0.1),
        (["trained_head.layers.0.bias"], 0.5, 0.0),
    ]
    others = [group for group in groups if group not in heads]
    assert all("trained_head" not in name for group in others for name in group[0])
    assert {group[1] for group in others} == {1e-2}
    assert all(group[2] / group[1] == pytest.approx(others[0][2] / others[0][1]) for group in groups)
    trained = [name for group in groups for name in group[0]]
    assert sorted(trained) == sorted(trained_weights(made)) and len(trained) == len(set(trained))


def test_the_rate_matters_and_is_the_common_one_by_default(tmp_path):
    def moved(kind):
        made = head_trainer(tmp_path, kind=kind, max_steps=1, lr_scheduler_type="constant")
        before = head_weights(made)
        made.train()
        return max((weight - before[name]).abs().max().item() for name, weight in head_weights(made).items())

    assert moved(HeadTrainer) == pytest.approx(1e-2, rel=1e-3)  # the first step of AdamW has the size of its rate
    assert moved(FastHeadTrainer) == pytest.approx(0.5, rel=1e-3)


def test_an_optimizer_of_the_user_trains_the_head_too(tmp_path):
    def given():
        pipeline = tiny_wan_pipeline()
        return pipeline, torch.optim.SGD(pipeline.transformer.parameters(), lr=1e-3)

    for kind, rate in ((HeadTrainer, 1e-3), (FastHeadTrainer, 0.5)):
        pipeline, optimizer = given()
        made = head_trainer(tmp_path, kind=kind, model=pipeline, optimizers=(optimizer, None), use_peft=False)
        before = trained_weights(made)
        made.train()
        after = trained_weights(made)
        assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, rate]
        moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert {"blocks", "proj_out", "trained_head"} <= moved

    pipeline, optimizer = given()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"holds a scheduler.*Pass `optimizers=\(optimizer, None\)`"):
        head_trainer(tmp_path, model=pipeline, optimizers=(optimizer, scheduler), use_peft=False)


def test_the_next_trainer_of_a_transformer_starts_with_its_own_head(tmp_path):
    first = head_trainer(tmp_path)
    second = head_trainer(tmp_path, model=first.pipeline)
    assert second.model is first.model and second.model.trained_head is second.trained_head is not first.trained_head
    third = VideoSFTTrainer(first.pipeline, second.args, second.train_dataset.rows)
    assert third.trained_head is None
    assert not [name for name, _ in third.model.named_parameters() if "trained_head" in name]
