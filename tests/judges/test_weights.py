"""Checkpoints that are missing, damaged, unsafe or of another model are refused with their names."""

import datetime
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support.judges.tiny_owl import published_state_dict, tiny_model, write_checkpoint
from video_trl.judges.mplug_owl_loading import convert_state_dict, load_mplug_owl
from video_trl.judges.weights import read_config, read_state_dict, resolve_weights, weights_identity


MODEL = tiny_model()
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", MODEL)


def _rewrite(folder, change):
    state = published_state_dict(MODEL)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def test_a_folder_or_a_repository(folder, tmp_path):
    assert resolve_weights(folder) == folder
    with pytest.raises(ValueError, match="No weights at nobody/nothing.*HF_HUB_OFFLINE"):
        resolve_weights("nobody/nothing")
    with pytest.raises(ValueError, match="No weights at .*absent"):
        resolve_weights(tmp_path / "absent")


def test_safetensors_serve_as_well(folder):
    state = read_state_dict(folder)
    (folder / "pytorch_model.bin").unlink()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    again = read_state_dict(folder)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    load_mplug_owl(folder, torch.float32, CPU)


def test_no_weights(folder):
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"No weights in .*expected one of model\.safetensors.*'config\.json'"):
        read_state_dict(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_checkpoint(tmp_path, MODEL, shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ValueError, match=r"missing: pytorch_model-00002-of-00003\.bin"):
        read_state_dict(folder)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04 cut off"])
def test_damaged_weights_are_named(folder, content):
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: cannot be read as tensors"):
        read_state_dict(folder)


def test_a_file_with_more_than_tensors_is_not_unpickled(folder):
    torch.save({"query_tokens": datetime.timedelta(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_state_dict(folder)


def test_another_key_layout_is_refused_with_the_names(folder):
    def rename(state):
        state["vision.query"] = state.pop("query_tokens")
        state["abstractor.vit_eos"] = torch.zeros(1, 1, 8)

    _rewrite(folder, rename)
    with pytest.raises(ValueError) as caught:
        load_mplug_owl(folder, torch.float32, CPU)
    for part in (
        "missing (1): query_tokens",
        "unexpected (1): vision.query",
        "of another shape (1): abstractor.vit_eos (1, 1, 8) instead of (1, 1, 16)",
    ):
        assert part in str(caught.value)


def test_many_wrong_keys_are_counted(folder):
    _rewrite(folder, lambda state: [state.pop(name) for name in list(state) if "abstractor" in name])
    with pytest.raises(ValueError, match=r"missing \(\d\d\): abstractor.*, \.\.\."):
        load_mplug_owl(folder, torch.float32, CPU)


def test_conversion_keeps_what_is_flat_already():
    flat = convert_state_dict(MODEL.state_dict(), torch.bfloat16)
    assert flat.keys() == MODEL.state_dict().keys() and {t.dtype for t in flat.values()} == {torch.bfloat16}


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_config(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        read_config(folder)


def test_identity_is_the_content_or_the_commit(folder, tmp_path):
    first = weights_identity(folder)
    assert weights_identity(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    (folder / "config.json").write_text(json.dumps({"model_type": "mplug-owl"}))
    assert weights_identity(folder) != first
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = write_checkpoint(tmp_path / "models--x" / "snapshots" / commit, MODEL)
    assert weights_identity(snapshot) == commit
