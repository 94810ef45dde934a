"""What `load_teacher` finds and what it says when there is nothing to find."""

import json

import pytest
import torch

from video_trl.load import load_teacher


def test_a_repo_or_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="Cannot load a teacher from 'nobody/nothing'"):
        load_teacher("nobody/nothing")
    with pytest.raises(ValueError, match="has no config.json"):
        load_teacher(str(tmp_path))
    with pytest.raises(ValueError, match="There is no file"):
        load_teacher(str(tmp_path / "weights.pth"))


def test_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="'clip'; a teacher is one of videomae, vjepa2"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_teacher(str(tmp_path / name))


def test_a_file_of_something_else(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="got list"):
        load_teacher(str(tmp_path / "weights.pth"))


def test_the_sandbox_teacher_by_name():
    teacher = load_teacher("sandbox", device="cpu", dtype=torch.bfloat16)
    assert teacher.name == "sandbox-videomae" and teacher.model.dtype == torch.bfloat16
