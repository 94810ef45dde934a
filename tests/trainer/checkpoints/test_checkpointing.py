"""Saving and resuming: exact, whole or absent, and never into another model."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.support import forks
from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_encoded_group, tiny_transformer, tiny_wan_pipeline
from tests.support.trainer.runs import (
    StopAfter,
    assert_equal_weights,
    config,
    disturb_adapter,
    losses,
    trained_weights,
    trainer,
)
from video_trl.files import partial_path, write_checksums
from video_trl.trainer.checkpoints.run_folder import RunFolder
from video_trl.trainer.checkpoints.weights import checkpoint_directory


STEPS = 6
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}


def generate(pipeline) -> torch.Tensor:
    return pipeline(
        "a red ball falls to the floor",
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames


def test_resuming_after_any_step_continues_bit_exactly(tmp_path):
    """Two epochs of three steps: the checkpoints are from inside epochs and from between them."""
    straight = trainer(config(tmp_path, **SAVING))
    straight.train()
    for step in range(1, STEPS):
        resumed = trainer(config(tmp_path / "resumed"))
        torch.manual_seed(step)  # whatever a new process has in its global generators
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_equal_weights(trained_weights(resumed), trained_weights(straight))
        assert losses(resumed) == losses(straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "bf16": True},
        {"use_peft": False, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "loss_type": "sum"},
    ],
    ids=["workers and evaluation", "accumulation and bf16", "all weights"],
)
def test_resuming_is_exact_in_other_settings_too(tmp_path, changes):
    settings = {**SAVING, **changes}
    evaluation = {"eval_dataset": tiny_encoded_group(3, seed=4)} if "eval_steps" in changes else {}
    plain = {**settings, "save_strategy": "no", "eval_strategy": "no", "dataloader_num_workers": 0}
    straight = trainer(config(tmp_path / "straight", **plain))
    straight.train()
    trainer(config(tmp_path / "run", **settings), callbacks=[StopAfter(4)], **evaluation).train()
    resumed = trainer(config(tmp_path / "run", **settings), **evaluation)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-1]["step"] == STEPS
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))


def test_the_saved_adapter_makes_the_same_video_in_a_fresh_pipeline(tmp_path):
    made = trainer(config(tmp_path, max_steps=2, lora_rank=4, lora_alpha=8))
    before = generate(made.pipeline)
    made.train()
    made.save_model()
    fresh = tiny_wan_pipeline()
    fresh.load_lora_weights(str(tmp_path), **IN_FOLDER)
    video = generate(made.pipeline)
    assert torch.equal(generate(fresh), video) and not torch.equal(video, before)


def test_all_weights_are_saved_as_a_transformer_folder(tmp_path):
    made = trainer(config(tmp_path, max_steps=1, use_peft=False))
    made.train()
    made.save_model()
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert_equal_weights(dict(loaded.named_parameters()), dict(made.model.named_parameters()))
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_checkpoint_holds_no_base_weights_and_no_pickled_arguments(tmp_path):
    trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(1)]).train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert names == {
        "pytorch_lora_weights.safetensors",
        "README.md",
        "video_trl_run.json",
        "video_trl_resources.json",
        "checksums.json",
        "training_args.json",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    assert json.loads((tmp_path / "checkpoint-1" / "training_args.json").read_text())["beta"] == 500.0


def test_nothing_to_train_on_or_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a `checkpoint-<step>` folder in .*/new .*, got no such folder"):
        RunFolder(tmp_path / "new").check(True)  # before anything is encoded
    with pytest.raises(ValueError, match=r"Expected a `checkpoint-<step>` folder in .*/new .*, got "):
        trainer(config(tmp_path / "new")).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"Expected a `checkpoint-<step>` folder in .*/new .*, got "):
        trainer(config(tmp_path / "new", resume_from_checkpoint="true")).train()  # it counts here too
    with pytest.raises(ValueError, match="Expected a `train_dataset` to train on, got an `eval_dataset` only"):
        trainer(config(tmp_path), train_dataset=None, eval_dataset=tiny_encoded_group(1)).train()
    with pytest.raises(ValueError, match="Expected an `eval_dataset` to evaluate on, got none"):
        trainer(config(tmp_path)).evaluate()


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    made = trainer(
        config(
            tmp_path, **settings, metric_for_best_model="rewards/margins", greater_is_better=True, save_total_limit=1
        ),
        eval_dataset=tiny_encoded_group(2, seed=1),
    )
    made.train()
    margins = {e["step"]: e["eval_rewards/margins"] for e in made.state.log_history if "eval_rewards/margins" in e}
    best = max(margins, key=margins.__getitem__)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_rewards/margins"] == margins[best]
    assert best < STEPS  # else nothing is told apart: the newest stays as well, or the run could not be resumed
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{STEPS}"}


def test_old_checkpoints_are_rotated_out(tmp_path):
    trainer(config(tmp_path, **SAVING, save_total_limit=2)).train()
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


class LimitFileSize(TrainerCallback):
    """From a step on, no file of the process may grow beyond some bytes: the operating system's own write error."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [7_000, 9_000], ids=["at the adapter", "at the optimizer state"])
def test_a_failing_disk_leaves_the_previous_checkpoint_intact(tmp_path, size, caplog):
    made = trainer(config(tmp_path, **SAVING), callbacks=[LimitFileSize(3, size)])
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises((OSError, RuntimeError)):
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "checkpoint-3 failed" in caplog.text
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    straight = trainer(config(tmp_path / "straight", max_steps=STEPS))
    straight.train()
    resumed = trainer(config(tmp_path, **SAVING))
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_1.pth"])
def test_a_file_that_lost_its_end_without_a_word_is_not_published(tmp_path, name):
    """So does `torch.save` of torch 2.6 on a full disk, with files of less than 4 KiB and with the end of others."""
    final = tmp_path / "checkpoint-1"
    with pytest.raises(OSError, match=rf"{name} was cut off at 900 bytes"):
        with checkpoint_directory(final, Accelerator(cpu=True), should_save=True) as partial:
            partial.mkdir()
            torch.save({"state": torch.zeros(3)}, partial / name)
            os.truncate(partial / name, 900)
    assert not any(tmp_path.iterdir())


def test_leftovers_of_an_interrupted_save_are_ignored_and_then_removed(tmp_path):
    trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(2)]).train()
    leftover = tmp_path / "_partial-checkpoint-9"
    leftover.mkdir()
    (leftover / "optimizer.pt").write_bytes(b"half")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    resumed = trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(3)])
    resumed.train(resume_from_checkpoint=True)
    assert not leftover.exists() and (tmp_path / "checkpoint-3").is_dir()


def test_a_checkpoint_whose_replacement_was_killed_is_resumed_from_and_stays(tmp_path):
    """Between the two renames the folder has a temporary name, and the new one is in `_partial-...`."""
    trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(2)]).train()
    (tmp_path / "checkpoint-2").rename(partial_path(tmp_path / "checkpoint-2", "replaced"))
    (tmp_path / "_partial-checkpoint-2").mkdir()
    resumed = trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(3)])
    resumed.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}


def test_a_checkpoint_of_the_same_step_is_replaced_as_a_whole(tmp_path):
    trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(2)]).train()
    (tmp_path / "checkpoint-2" / "stale").touch()
    resumed = trainer(config(tmp_path, **SAVING), callbacks=[StopAfter(2)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "checkpoint-2" / "stale").exists()
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


VICTIM = """
import sys
from pathlib import Path
from tests.support.trainer.runs import config, trainer

made = trainer(config(Path(sys.argv[1]), max_steps=10_000, save_strategy="steps", save_steps=1, save_total_limit=3))
made.train(resume_from_checkpoint=True if list(Path(sys.argv[1]).glob("checkpoint-*")) else None)
"""


def kill_when(directory: Path, condition: Callable[[], bool]) -> None:
    """Run the victim until a condition holds and kill it with SIGKILL at that moment."""
    process = forks.start("-c", VICTIM, str(directory))
    deadline = time.monotonic() + 200
    while not condition():
        assert not process.ended(), process.errors
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == [-signal.SIGKILL]


def check_resume_after_kill(directory: Path, straight_directory: Path) -> None:
    """The last checkpoint is whole, and two more steps from it are those of a run that was never killed."""
    last = int(get_last_checkpoint(str(directory)).rsplit("-", 1)[1])
    settings = {"max_steps": 10_000, "save_steps": 1, "save_total_limit": 3}
    resumed = trainer(config(directory, **settings, save_strategy="steps"), callbacks=[StopAfter(last + 2)])
    resumed.train(resume_from_checkpoint=True)
    straight = trainer(config(straight_directory, **settings), callbacks=[StopAfter(last + 2)])
    straight.train()
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    assert losses(resumed) == losses(straight)


def test_resuming_after_kill_9_is_exact(tmp_path):
    directory = tmp_path / "run"
    kill_when(directory, (directory / "checkpoint-3").exists)
    check_resume_after_kill(directory, tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resuming_after_kill_9_in_the_middle_of_saving_is_exact(tmp_path):
    directory, interrupted = tmp_path / "run", 0
    for attempt in range(4):
        last = int(get_last_checkpoint(str(directory)).rsplit("-", 1)[1]) if attempt else 0
        kill_when(directory, (directory / f"_partial-checkpoint-{last + 3}").exists)
        interrupted += any(directory.glob("_partial-*"))
        copy = tmp_path / f"copy-{attempt}"
        shutil.copytree(directory, copy)
        check_resume_after_kill(copy, tmp_path / f"straight-{attempt}")
    assert interrupted > 0


def checkpoint(directory: Path, **changes) -> str:
    arguments = {name: changes.pop(name) for name in ("model",) if name in changes}
    trainer(config(directory, **SAVING, **changes), callbacks=[StopAfter(1)], **arguments).train()
    return str(directory / "checkpoint-1")


def test_a_checkpoint_of_another_rank_is_refused_naming_both(tmp_path):
    path = checkpoint(tmp_path / "four")
    with pytest.raises(ValueError, match=r"adapter differs.*lora_alpha: 4 / 6, r: 4 / 6"):
        trainer(config(tmp_path / "six", lora_rank=6, lora_alpha=6)).train(resume_from_checkpoint=path)


def test_a_checkpoint_of_another_architecture_is_refused_naming_both(tmp_path):
    path = checkpoint(tmp_path / "two")
    with pytest.raises(ValueError, match=r"config differs.*num_layers: 2 / 3"):
        made = trainer(config(tmp_path / "three", max_sequence_length=16), model=tiny_transformer(num_layers=3))
        made.train(resume_from_checkpoint=path)


def test_a_checkpoint_of_another_base_is_refused_naming_both(tmp_path):
    path = checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=r"other base weights.*hash [0-9a-f]{16} / [0-9a-f]{16}.*another base model"):
        trainer(config(tmp_path / "other"), model=tiny_wan_pipeline(seed=1)).train(resume_from_checkpoint=path)


def test_a_checkpoint_of_all_weights_is_refused_by_an_adapter_and_the_other_way_round(tmp_path):
    adapter, full = checkpoint(tmp_path / "adapter"), checkpoint(tmp_path / "full", use_peft=False)
    with pytest.raises(ValueError, match="adapter differs.*None / "):
        trainer(config(tmp_path / "a")).train(resume_from_checkpoint=full)
    with pytest.raises(ValueError, match="adapter differs.*/ None"):
        trainer(config(tmp_path / "b", use_peft=False)).train(resume_from_checkpoint=adapter)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "something").mkdir()
    for path in (tmp_path / "something", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="Expected a checkpoint with video_trl_run.json in .*thing"):
            trainer(config(tmp_path / "run")).train(resume_from_checkpoint=str(path))


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path):
    """The description fits, the file was exchanged."""
    path = checkpoint(tmp_path / "run")
    wide = Path(checkpoint(tmp_path / "wide", lora_rank=6))
    shutil.copy(wide / "pytorch_lora_weights.safetensors", path)
    write_checksums(Path(path))
    with pytest.raises(ValueError, match=r"do not fit the model .*lora_A.*\(6, 24\) / \(4, 24\)"):
        trainer(config(tmp_path / "again")).train(resume_from_checkpoint=path)


def test_another_seed_is_pointed_out(tmp_path, caplog):
    path = checkpoint(tmp_path / "run")
    trainer(config(tmp_path / "again", seed=5, max_steps=2)).train(resume_from_checkpoint=path)
    assert "seed 42 with seed 5" in caplog.text


def test_saving_does_not_change_what_is_trained(tmp_path):
    made = trainer(config(tmp_path))
    disturb_adapter(made)
    before = trained_weights(made)
    made.save_model()
    assert_equal_weights(trained_weights(made), before)


def test_the_model_card_shows_how_to_make_such_videos(tmp_path):
    made = trainer(config(tmp_path, max_steps=1, fps=8))
    made.train()
    made.create_model_card(dataset_name="someone/groups", license="apache-2.0")
    card = (tmp_path / "README.md").read_text()
    assert "max_sequence_length=16, num_frames=5, height=32, width=32" in card and "fps=8" in card
    assert "on someone/groups" in card and "license: apache-2.0" in card
    assert (
        "| beta | 500 |" in card
        and "| lr_scheduler_type | cosine_with_min_lr |" in card
        and "| optimizer steps | 1 |" in card
    )


def test_full_tuning_resumes_only_from_its_own_base(tmp_path):
    straight = trainer(config(tmp_path, use_peft=False, **SAVING))
    straight.train()
    path = str(tmp_path / "checkpoint-3")
    resumed = trainer(config(tmp_path / "same", use_peft=False))
    resumed.train(resume_from_checkpoint=path)
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    other = trainer(config(tmp_path / "other", use_peft=False), model=tiny_wan_pipeline(seed=1))
    with pytest.raises(ValueError, match=r"other base weights.*hash [0-9a-f]{16} / [0-9a-f]{16}"):
        other.train(resume_from_checkpoint=path)


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_separate_reference_must_be_the_same(tmp_path, use_peft):
    settings = {"use_peft": use_peft, "max_steps": 2}
    made = trainer(config(tmp_path, **settings, save_strategy="steps", save_steps=1), ref_model=tiny_transformer(1))
    made.train()
    path = str(tmp_path / "checkpoint-1")
    trainer(config(tmp_path / "a", **settings), ref_model=tiny_transformer(1)).train(resume_from_checkpoint=path)
    for arguments in ({"ref_model": tiny_transformer(2)}, {}):
        with pytest.raises(ValueError, match="other reference weights.*another reference model"):
            trainer(config(tmp_path / "b", **settings), **arguments).train(resume_from_checkpoint=path)
