"""Whose an output folder is, which checkpoint is resumed, and what damage is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.trainer.runs import StopAfter, assert_equal_weights, config, trained_weights, trainer
from video_trl.files import file_checksum, find_damage, write_checksums
from video_trl.trainer.checkpoints import run_folder
from video_trl.trainer.checkpoints.run_folder import RunFolder


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def run(directory: Path, stop: int | None = None, resume: str | bool | None = None, **changes):
    made = trainer(config(directory, **(SAVING | changes)), callbacks=[] if stop is None else [StopAfter(stop)])
    made.train(resume_from_checkpoint=resume)
    return made


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in directory.glob("checkpoint-*"))


def contents(directory: Path) -> dict[str, str]:
    return {str(path): file_checksum(path) for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of four steps, its weights saved; to be copied by those who change it."""
    directory = tmp_path_factory.mktemp("run") / "finished"
    run(directory).save_model()
    return directory


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_another_run_is_refused_and_nothing_changes(copy):
    before = contents(copy)
    for seed in (42, 1):
        with pytest.raises(ValueError, match=r"holds another run \(.*\), which was started at .*overwrite_output_dir"):
            run(copy, seed=seed)
    with pytest.raises(ValueError, match="holds another run"):
        run(copy, resume=str(shutil.copytree(copy / "checkpoint-2", copy.parent / "elsewhere" / "checkpoint-2")))
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(copy / name)
    with pytest.raises(ValueError, match=r"another run \(pytorch_lora_weights\.safetensors\)"):
        run(copy, resume="auto")
    assert contents(copy).items() <= before.items()


def test_another_run_is_deleted_by_option_and_nothing_else(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "checkpoint-best").mkdir()
    (copy / "emissions.csv").write_text("run_id,energy_consumed\nold,5.0\n")  # the card would count it as this run's
    for name in ("data", "step_7", "mine"):  # the first two would be published as the new run's
        (copy / "samples" / name).mkdir(parents=True)
    (copy / "checkpoint-7").mkdir()  # a folder of that name that no run of this package has written
    made = run(copy, stop=2, overwrite_output_dir=True)
    assert {path.name for path in copy.glob("checkpoint-*")} == {
        "checkpoint-1", "checkpoint-2", "checkpoint-7", "checkpoint-best",
    }  # fmt: skip
    assert not (copy / "pytorch_lora_weights.safetensors").exists() and (copy / "notes.txt").read_text() == "mine"
    assert made.state.global_step == 2 and not (copy / "emissions.csv").exists()
    assert [path.name for path in (copy / "samples").iterdir()] == ["mine"]


@pytest.mark.parametrize("max_steps", [4, 3], ids=["within an epoch", "at the end of one"])
def test_a_finished_run_resumed_changes_nothing(tmp_path, max_steps):
    made = run(tmp_path, max_steps=max_steps)
    made.save_model()
    before = contents(tmp_path)
    for resume in (True, "auto", str(tmp_path / f"checkpoint-{max_steps}")):
        again = run(tmp_path, max_steps=max_steps, resume=resume)
        again.save_model()
        assert again.state.global_step == max_steps
        assert_equal_weights(trained_weights(again), trained_weights(made))
    assert contents(tmp_path) == before
    assert (
        run(tmp_path, max_steps=max_steps + 1, resume=True).state.global_step == max_steps + 1
    )  # a longer one goes on


def test_the_newest_checkpoint_stays_whatever_its_time(tmp_path):
    run(tmp_path, stop=1, save_total_limit=1)
    os.utime(tmp_path / "checkpoint-1", (2**32, 2**32))
    run(tmp_path, resume=True, save_total_limit=1)
    assert steps(tmp_path) == [4]


def test_who_goes_back_starts_a_new_line_whose_checkpoints_are_its_own(copy):
    """The steps after the earlier checkpoint are of the old line: neither resumed from, nor counted, nor deleted."""
    run(copy, stop=3, resume=str(copy / "checkpoint-2"), save_total_limit=2, learning_rate=1e-3)
    assert steps(copy) == [2, 3, 4]
    assert run(copy, resume=True, save_total_limit=2, learning_rate=1e-3).state.global_step == 4
    lines = json.loads((copy / run_folder.RUN_NAME).read_text())
    of_checkpoint = json.loads((copy / "checkpoint-4" / "video_trl_run.json").read_text())["run"]
    assert of_checkpoint == lines["run"] and lines["continues"][0][1] == 2


def test_an_older_run_in_the_folder_is_not_resumed(copy, finished):
    """As an older version left it: a run of two steps on top of one of four."""
    other = copy.parent / "other"
    run(other, stop=2)
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(copy / name)
        shutil.copytree(other / name, copy / name)
    shutil.copy(other / run_folder.RUN_NAME, copy)
    assert RunFolder(copy).check(True) == copy / "checkpoint-2"


def test_a_folder_without_its_identity_is_continued_and_gets_one(copy):
    (copy / run_folder.RUN_NAME).unlink()
    assert run(copy, resume=True, max_steps=5).state.global_step == 5
    assert RunFolder(copy).check(True) == copy / "checkpoint-5"


def test_the_identity_is_there_before_anything_else(tmp_path):
    seen = []

    class Look(StopAfter):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.extend(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))

    trainer(config(tmp_path), callbacks=[Look(1)]).train()
    assert seen == [run_folder.RUN_NAME]
    trainer(config(tmp_path), callbacks=[StopAfter(1)]).train()  # the first one has left nothing that could be lost


def test_auto_starts_a_run_and_goes_on_with_it(tmp_path):
    assert run(tmp_path, stop=2, resume="auto").state.global_step == 2
    assert run(tmp_path, resume="auto").state.global_step == 4


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_SECONDS_FOR_LOCK", 0.1)
    with FileLock(tmp_path / ".video_trl.lock"):
        (tmp_path / ".video_trl.lock").write_text("pid 7 on node3")
        with pytest.raises(ValueError, match=r"is in use: another process trains into it \(.*pid 7 on node3\)"):
            run(tmp_path)
    run(tmp_path, stop=1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("optimizer.pt", flip, "checksum differs"),
        ("optimizer.pt", cut, r"has \d+ bytes, expected \d+"),
        ("pytorch_lora_weights.safetensors", flip, "checksum differs"),
        ("trainer_state.json", flip, "checksum differs"),
        ("video_trl_run.json", cut, r"has \d+ bytes, expected \d+"),
        ("rng_state.pth", Path.unlink, "is missing"),
        ("checksums.json", cut, "cannot be read as JSON"),
        ("checksums.json", Path.unlink, "cannot be read as JSON"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_offered(copy, name, damage, words):
    damage(copy / "checkpoint-4" / name)
    before = contents(copy)
    offer = f"The one before it is whole: pass `resume_from_checkpoint='{copy / 'checkpoint-3'}'`"
    with pytest.raises(ValueError, match=rf"checkpoint-4 is damaged: .*{name}.*{words}.*{offer}"):
        run(copy, resume=True)
    assert contents(copy) == before
    assert RunFolder(copy).check("auto") == copy / "checkpoint-3"  # unattended, with a warning
    made = run(copy, resume=str(copy / "checkpoint-3"))
    straight = trainer(config(copy.parent / "straight", max_steps=4))
    straight.train()
    assert_equal_weights(trained_weights(made), trained_weights(straight))
    assert find_damage(copy / "checkpoint-4") is None


def test_damage_in_all_checkpoints_leaves_nothing_to_offer(copy):
    for step in range(1, 5):
        cut(copy / f"checkpoint-{step}" / "optimizer.pt")
    for resume in (True, "auto", str(copy / "checkpoint-4")):
        with pytest.raises(ValueError, match=r"optimizer\.pt has .* There is no whole checkpoint before it"):
            run(copy, resume=resume)


def test_a_checksum_sees_every_byte_and_every_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "large").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "small").write_bytes(b"x")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / "another").write_bytes(b"of the user's")
    assert find_damage(tmp_path) is None
    flip(tmp_path / "inner" / "large")
    assert "inner/large has other content" in find_damage(tmp_path)


def test_what_a_stopped_machine_left_is_cleared_by_the_one_that_goes_on(copy):
    """A job that is started again on another machine: the lock of the folder says that nobody else is writing."""
    (copy / "checkpoint-4").rename(copy / ".checkpoint-4.0000000011111111.replaced")
    (copy / ".README.md.0000000022222222.partial").touch()
    run(copy, resume=True)
    assert steps(copy) == [1, 2, 3, 4] and not list(copy.glob(".*.partial")) + list(copy.glob(".*.replaced"))
