"""The model card of a run: everything that a reader asks, from what happened, and a snippet that runs."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers.integrations import CodeCarbonCallback

from tests.support.hub_server import USER, serving, use
from tests.support.tiny import PROMPTS, tiny_encoded_group, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import StopAfter, config, disturb_adapter, trainer
from video_trl import hub
from video_trl.data import probe_video
from video_trl.files import write_checksums
from video_trl.trainer import LogVideosCallback
from video_trl.trainer.publishing.run_card import (
    TrainingData,
    hyperparameters,
    log_table,
    loss_parameters,
    measured_energy,
)


def judge(pipeline, *, output_dir, step):
    return {"pc": 0.5 + step / 100, "pc_low": 0.4, "pc_high": 0.75}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything: raw data, samples, evaluations."""
    folder = tmp_path_factory.mktemp("run")
    args = config(
        folder,
        max_steps=4,
        per_device_train_batch_size=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_grad_norm=0.5,
        beta=700.0,
        cache_dir=str(folder / "cache"),
    )
    rows = tiny_group_dataset(2, 2)
    samples = LogVideosCallback(PROMPTS[:2], every_steps=4, call_kwargs={"num_inference_steps": 1})
    made = trainer(args, train_dataset=rows, eval_dataset=rows, callbacks=[samples], evaluator=judge)
    made.train()
    made.save_model()
    return made


def card_of(folder) -> tuple[dict, str]:
    text = (Path(folder) / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_front_matter_is_what_the_hub_reads(run):
    front, _ = card_of(run.args.output_dir)
    assert front["tags"] == ["video-trl", "group-dpo", "text-to-video", "diffusers", "lora"]
    assert (front["pipeline_tag"], front["library_name"]) == ("text-to-video", "diffusers")
    assert front["widget"] == [{"text": PROMPTS[k], "output": {"url": f"samples/step_4/0{k}.mp4"}} for k in range(2)]
    (model,) = front["model-index"]
    found = {metric["type"]: metric for result in model["results"] for metric in result["metrics"]}
    assert found["pc"]["value"] == 0.54 and found["pc"]["args"]["interval"] == [0.4, 0.75]
    assert "pc_low" not in found and "runtime" not in found
    assert ModelCard((Path(run.args.output_dir) / "README.md").read_text()).data.eval_results


def test_the_text_tells_data_method_settings_log_cost_and_versions(run):
    folder = Path(run.args.output_dir)
    _, text = card_of(folder)
    for number in range(2):
        for name in ("chosen", "rejected_1", "rejected_2"):
            assert f'src="samples/data/row_{number}_{name}.mp4"' in text
            assert probe_video(folder / "samples" / "data" / f"row_{number}_{name}.mp4").num_frames == 5
    assert "2 rows, 2 rejected videos in the first row" in text
    assert run.summary in text and run.citation in text
    assert "| beta | 700 |" in text and "| max_grad_norm | 0.5 |" in text and "| learning_rate | 0.01 |" in text
    assert "| optimizer steps | 4 |" in text and "| evaluation at step 4 | pc | 0.54 | [0.400, 0.750]" in text
    assert "output_dir" not in text and "eval_steps" not in text.split("## Training\n")[0]
    assert "| hardware |" in text and "| hours |" in text and "| diffusers |" in text
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert f"| 4 | {logged[-1]['loss']:.4g} |" in text
    written = text.split("## Citation")[0]  # BibTeX has braces of its own
    assert "None" not in written and "{{" not in written and "\n\n\n" not in text


def test_checkpoints_have_their_own_card(run):
    _, text = card_of(Path(run.args.output_dir) / "checkpoint-2")
    assert "| optimizer steps | 2 |" in text and "| optimizer steps | 4 |" not in text
    assert "samples/step_0/00.mp4" in text  # the last videos by then


def test_the_snippet_runs_against_a_hub(tmp_path, monkeypatch):
    """Copied as it stands: base model and adapter come from repositories, with their revision."""
    with serving() as server:
        use(server, monkeypatch)
        from huggingface_hub import HfApi

        tiny_wan_pipeline().save_pretrained(tmp_path / "base")
        api = HfApi()
        api.create_repo(f"{USER}/base")
        (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
        revision = api.upload_folder(repo_id=f"{USER}/base", folder_path=tmp_path / "base").oid
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        options = {"revision": revision, "cache_dir": str(tmp_path / "cache")}
        args = config(
            tmp_path / "run", max_steps=1, push_to_hub=True, hub_model_id=f"{USER}/run", model_init_kwargs=options
        )
        made = trainer(args, model=f"{USER}/base")
        made.train()
        disturb_adapter(made)
        made.push_to_hub()
        front, text = card_of(tmp_path / "run")
        assert (front["base_model"], front["base_model_relation"], front["license"]) == (
            f"{USER}/base",
            "adapter",
            "mit",
        )
        assert f"revision `{revision}`" in text
        monkeypatch.chdir(tmp_path)
        exec(text.split("```python\n")[1].split("```")[0], {})
    assert probe_video(tmp_path / "video.mp4").num_frames == 5


def test_time_is_added_up_over_interruptions(tmp_path):
    args = config(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer(args, callbacks=[StopAfter(2)]).train()
    path = tmp_path / "checkpoint-2" / "video_trl_resources.json"
    spent = json.loads(path.read_text())
    assert spent["seconds"] > 0
    path.write_text(json.dumps(spent | {"seconds": 7200.0}))
    write_checksums(path.parent)
    made = trainer(args)
    made.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-4" / path.name).read_text())["seconds"] > 7200.0
    made.save_model()
    assert "| hours | 2" in card_of(tmp_path)[1]


def test_settings_are_the_ones_that_matter_or_differ(tmp_path):
    args = config(tmp_path, gradient_accumulation_steps=3, fps=12.0, hub_token="hf_secret", lora_alpha=8)
    assert loss_parameters(args)["beta"] == 500.0 and "learning_rate" not in loss_parameters(args)
    found = hyperparameters(args)
    assert found["gradient_accumulation_steps"] == 3 and found["fps"] == 12.0 and found["lora_alpha"] == 8
    assert not {"output_dir", "hub_token", "use_cpu", "logging_steps", "num_frames", "max_grad_norm"} & set(found)


def test_a_long_log_becomes_a_short_table():
    history = [{"step": k, "loss": 1 / k, "epoch": k / 10, "grad_norm": 1.0, "a|b": k} for k in range(1, 101)]
    history.insert(50, {"step": 50, "eval_loss": 0.5, "eval_runtime": 3.0})
    history.append({"step": 100, "train_runtime": 9.0, "train_loss": 0.1})
    rows = log_table(history)
    assert [row["step"] for row in rows][::9] == [1, 100] and len(rows) == 10
    assert list(rows[0]) == ["step", "loss", "a|b", "eval_loss"] and rows[0]["eval_loss"] == ""
    assert log_table([]) == [] and "| a\\|b |" in hub.card.table(rows)


def test_numbers_of_a_later_evaluation_replace_those_of_the_card(tmp_path):
    made = trainer(config(tmp_path, max_steps=1, heldout_evaluations=0), eval_dataset=tiny_encoded_group(1))
    made.train()
    made.save_model()
    before = card_of(tmp_path)[1]
    assert "## Evaluation" not in before
    for value in (0.25, 0.5):
        numbers = [hub.Measurement("joint", value, value - 0.1, value + 0.1, 0.95, "VideoPhy-2", 590)]
        hub.add_evaluation(tmp_path / "README.md", numbers)
    front, text = card_of(tmp_path)
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "VideoPhy-2" and result["metrics"][0]["value"] == 0.5
    assert "| VideoPhy-2 | joint | 0.5 | [0.400, 0.600] (95 %) | 590 |" in text and text.count("## Evaluation") == 1
    assert front["tags"] == yaml.safe_load(before.split("---\n")[1])["tags"]
    (tmp_path / "other.md").write_text("# mine")
    with pytest.raises(ValueError, match="no section for evaluations"):
        hub.add_evaluation(tmp_path / "other.md", numbers)


def test_energy_that_codecarbon_has_written_is_added_up(tmp_path):
    """Over the starts of a run; a tracker that was flushed has written more than one row, each with its sum so far."""
    trainer(config(tmp_path, max_steps=1)).create_model_card()
    assert "energy in kWh" not in card_of(tmp_path)[1] and measured_energy(tmp_path) is None
    rows = ["run_id,duration,energy_consumed,country_name", "a,10,0.25,", "a,20,0.75,", "b,5,0.125,"]
    (tmp_path / "emissions.csv").write_text("\n".join(rows) + "\n")
    trainer(config(tmp_path, max_steps=1)).create_model_card()
    assert "| energy in kWh (CodeCarbon) | 0.875 |" in card_of(tmp_path)[1]


def test_a_tracker_of_codecarbon_without_a_network(tmp_path, monkeypatch):
    codecarbon = pytest.importorskip("codecarbon", reason="needs video-trl[energy]")

    def refuse(*arguments, **options):
        raise AssertionError(f"CodeCarbon went on-line: {arguments}")

    monkeypatch.setattr("requests.sessions.Session.request", refuse)
    energy = CodeCarbonCallback()
    energy.tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="FRA", output_dir=str(tmp_path), log_level="error"
    )
    made = trainer(config(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), callbacks=[energy])
    made.create_model_card()
    made.train()
    spent = energy.tracker.final_emissions_data.energy_consumed
    assert spent > 0 and measured_energy(tmp_path) == pytest.approx(spent)
    assert f"| energy in kWh (CodeCarbon) | {hub.card.cell(spent)} |" in card_of(tmp_path)[1]


def test_a_video_that_cannot_be_read_is_left_out(tmp_path, caplog):
    """Rows with bad videos are skipped in training, and must not end it at the first save."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [{"prompt": "a", "video": str(tmp_path / name)} for name in ("gone.mp4", "broken.mp4")]
    facts = TrainingData(rows).facts(tmp_path / "run", 8, "words")
    assert facts.samples == [{"prompt": "a", "videos": {}}] * 2 and facts.name == "words"
    assert caplog.text.count("goes without the video video") == 2


def test_a_readme_of_somebody_else_stays(tmp_path, caplog):
    (tmp_path / "README.md").write_text("# My thesis\n\nNot a card.\n")
    made = trainer(config(tmp_path, max_steps=1))
    made.train()
    made.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# My thesis\n\nNot a card.\n"
    assert "is not a card of video_trl" in caplog.text


def test_a_card_does_not_tell_where_files_lie_on_this_machine(tmp_path):
    shown = [
        hyperparameters(config(tmp_path, init_adapter=source))["init_adapter"]
        for source in ("/home/ann/secret/sft", "ann/sft")
    ]
    assert shown == ["sft", "ann/sft"]
