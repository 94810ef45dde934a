"""`push` and `export`, as from the shell, against a Hub on this machine."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors import safe_open

from tests.hub.test_lora_and_card import generate, with_adapter
from tests.support.adapters import IN_FOLDER
from tests.support.evaluation.runs import make_run
from tests.support.hub_server import USER, serving, use
from tests.support.tiny import tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import config, trainer
from video_trl import hub
from video_trl.cli import main
from video_trl.curation.engine.manifest import write_table
from video_trl.files import fingerprint, read_json


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serving() as made:
        use(made, monkeypatch)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", made.url)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.USE_PARQUET_EXPORT", False)  # asks another server than the Hub's
        yield made


def test_an_adapter_is_pushed_with_the_numbers_of_a_run(server, capsys):
    made = trainer(config("out", max_steps=1))
    made.train()
    made.save_model()
    make_run("runs", "ours", [(0.9, 0.2), (0.2, 0.2), (0.6, 0.6), (0.9, 0.9)])
    assert main(["push", "out", f"{USER}/ours", "--private", "--evaluation", "runs", "--message", "Numbers"]) == 0
    repository = server.model("ours")
    assert repository.private and repository.commits[-1][1] == "Numbers"
    assert repository.commits[-1][0] in capsys.readouterr().out
    front = yaml.safe_load(repository.files["README.md"].decode().split("---\n")[1])
    metrics = {m["type"]: m for result in front["model-index"][0]["results"] for m in result["metrics"]}
    assert metrics["sa"]["value"] == 0.75 and metrics["sa"]["args"]["videos"] == 4
    low, high = metrics["sa"]["args"]["interval"]
    assert 0.3 < low < 0.75 < high < 0.96
    run, file = read_json(Path("runs/run.json")), Path("out/pytorch_lora_weights.safetensors")
    for made_by, model, words in (
        (None, "m", "made with no adapter, not with out/"),
        ("0" * 32, "m", "made with theirs"),
        (None, "run in out", None),
        (fingerprint(file), "m", None),
    ):
        run["generation"]["adapter_hash"] = made_by
        run["provenance"] = {"model": model, "adapter": "theirs" if made_by else None}
        Path("runs/run.json").write_text(json.dumps(run))
        code = main(["push", "out", f"{USER}/ours", "--evaluation", "runs"])
        error = capsys.readouterr().err
        assert (code, error.count("Traceback")) == ((0, 0) if words is None else (1, 0)) and (words or "") in error


def test_datasets_are_pushed_as_they_are_saved(server, tmp_path):
    tiny_group_dataset(2, 1).save_to_disk("pairs")
    assert main(["push", "pairs", f"{USER}/pairs", "--license", "cc-by-4.0"]) == 0
    loaded = load_dataset(f"{USER}/pairs", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["prompt"] == tiny_group_dataset(2, 1)["prompt"]
    assert "license: cc-by-4.0" in server.dataset("pairs").files["README.md"].decode()


def test_the_pairs_of_a_curation_are_pushed_and_none_of_its_other_tables(server, capsys):
    """As the page has it: the folder `pairs` of a run, or the run itself."""
    write_table(tiny_group_dataset(2, 1).with_format("arrow")[:], Path("run/pairs/train.parquet"))
    for name in ("manifest", "generations"):
        write_table(pa.table({"prompt": ["secret"]}), Path(f"run/{name}.parquet"))
    for number, folder in enumerate(("run/pairs", "run")):
        assert main(["push", folder, f"{USER}/own{number}", "--license", "mit"]) == 0
        files = server.dataset(f"own{number}").files
        assert [name for name in files if name.endswith(".parquet")] == ["data/train-00000-of-00001.parquet"]
        table = pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))
        assert table["prompt"].to_pylist() == tiny_group_dataset(2, 1)["prompt"][:]
    with pytest.raises(ValueError, match="holds no dataset"):
        hub.push_dataset("run", f"{USER}/third")


def test_options_of_something_else_are_refused(server, capsys):
    hub.save_lora(with_adapter().transformer, "out")
    tiny_group_dataset(2, 1).save_to_disk("pairs")
    for folder, option in (("out", "--license"), ("out", "--description"), ("pairs", "--message")):
        assert main(["push", folder, f"{USER}/ours", option, "mit"]) == 2
        assert f"{option} has no effect on a" in capsys.readouterr().err
    assert not server.repositories


def test_what_the_hub_refuses_is_one_line_and_exit_code_1(server, capsys):
    hub.save_lora(with_adapter().transformer, "out")
    assert main(["push", "out", "someone-else/ours"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("video-trl push: Upload failed with 403") and "video-trl push out someone-else/ours" in said
    assert main(["push", "out"]) == 2


def test_export_takes_folders_and_repositories_and_goes_back(server, capsys):
    file = hub.save_lora(with_adapter(lora_alpha=8).transformer, "out")
    hub.push("out", f"{USER}/ours")
    assert main(["export", "out", "here.safetensors"]) == 0
    assert main(["export", f"{USER}/ours", "there.safetensors"]) == 0
    assert capsys.readouterr().out.split() == ["here.safetensors", "there.safetensors"]
    with safe_open("here.safetensors", "pt") as here, safe_open("there.safetensors", "pt") as there:
        assert list(here.keys()) == list(there.keys())
        assert all(torch.equal(here.get_tensor(key), there.get_tensor(key)) for key in here.keys())
    assert main(["export", "here.safetensors", "back", "--to", "diffusers"]) == 0
    pipeline = tiny_wan_pipeline()
    pipeline.load_lora_weights("back", **IN_FOLDER)
    assert torch.equal(generate(pipeline), generate(with_adapter(lora_alpha=8))) and file.is_file()
    assert main(["export", "out"]) == 2
    assert main(["export", "out", "here.bin"]) == 1
