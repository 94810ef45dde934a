"""The script that compares two checkouts sees every kind of change, and nothing else."""

import json
import math

import pytest
import safetensors.torch
import torch

from tests.support import golden_runs
from tests.support.golden_cases import VARIES, Reader


RUN = {"log": {"entries": 1, "step 1": {"loss": (0.1).hex(), "epoch": 1}}, "files": {"README.md": "one\ntwo"}}
RECORD = {"data": {}, "sft": {"whole": RUN, "checkpoint": {}, "resumed": RUN}}


def changed(**values):
    log = {"entries": 1, "step 1": {"loss": (0.1).hex(), "epoch": 1} | values}
    return {"data": {}, "sft": {"whole": {**RUN, "log": log}, "checkpoint": {}, "resumed": RUN}}


@pytest.mark.parametrize(
    ("values", "path", "text"),
    [
        ({"loss": math.nextafter(0.1, 1).hex()}, "sft/whole/log/step 1/loss", "0x1.999999999999bp-4 (0.1)"),
        ({"epoch": True}, "sft/whole/log/step 1/epoch", "1 -> True"),
        ({"more": 2}, "sft/whole/log/step 1/more", "missing -> 2"),
    ],
)
def test_one_changed_value_is_named(values, path, text):
    found = golden_runs.differences(RECORD, changed(**values))
    assert list(found) == [path] and text in found[path]
    assert not golden_runs.differences(RECORD, RECORD)


def test_what_only_the_old_one_has_is_a_difference_too():
    found = golden_runs.differences(changed(more=2), RECORD)
    assert found == {"sft/whole/log/step 1/more": "2 -> missing"}
    assert golden_runs.differences({"a": {"x": 1}}, {"a": {}}) == {"a/x": "1 -> missing", "a": "missing -> {}"}


def test_of_a_text_the_changed_lines_are_shown():
    (text,) = golden_runs.differences({"card": "one\ntwo\nthree"}, {"card": "one\n2\nthree"}).values()
    assert [line.strip() for line in text.split("\n")] == ["", "-two", "+2"]


def test_what_was_renamed_or_is_ignored_does_not_count():
    old, new = {"sft": {"auxiliary.safetensors": {"a": 1}}}, {"sft": {"head.safetensors": {"a": 1}, "b": 2}}
    assert len(golden_runs.compare(old, new, [], [])) == 3
    assert golden_runs.compare(old, new, ["^auxiliary=head"], []) == {"sft/b": "missing -> 2"}
    assert not golden_runs.compare(old, new, ["^auxiliary=head"], ["/b$"])


def test_a_resumed_run_may_only_have_another_mean_loss():
    assert not golden_runs.resume_differences(changed(train_loss=1))
    assert golden_runs.resume_differences(changed(loss=1)).keys() == {"sft/log/step 1/loss"}


def test_the_exit_status_says_whether_anything_differs(tmp_path, monkeypatch, capsys):
    for name, content in (("old", RECORD), ("same", RECORD), ("other", changed(loss=1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / golden_runs.RECORD_NAME).write_text(json.dumps(content))
    for name, status in (("same", 0), ("other", 1)):
        monkeypatch.setattr("sys.argv", ["", "compare", str(tmp_path / "old"), str(tmp_path / name)])
        with pytest.raises(SystemExit) as ended:
            golden_runs.main()
        assert ended.value.code == status
        assert ("whole/log/step 1/loss" in capsys.readouterr().out) == bool(status)


def test_files_are_read_to_the_last_bit_but_for_times_and_places(tmp_path):
    read = Reader({tmp_path: "<out>"})
    weights = {"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    found = []
    for number, tensors in enumerate((weights, weights, {**weights, "a": weights["a"] + 2**-23})):
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"path": str(tmp_path / "x")})
        (tmp_path / "state.json").write_text(json.dumps({"log_history": [{"step": 1, "eval_runtime": number}]}))
        (tmp_path / "README.md").write_text(f"# {tmp_path}/x\n## Resources\n| hours | {number} |\nLog:\n| 1 | 2 |\n")
        found.append(read.folder(tmp_path))
    assert found[0] == found[1]
    assert list(golden_runs.differences(found[1], found[2])) == ["x.safetensors/a"]
    assert found[0]["x.safetensors"]["metadata"] == {"path": "<out>"}
    parts = {"Start": "# <out>\n", "## Resources": "| hours |\n", "Log:": "| 1 | 2 |\n"}
    assert found[0]["README.md"] == parts
    assert found[0]["state.json"]["log_history"]["step 1"]["eval_runtime"] == VARIES
