"""Uploads of a run, to a Hub on this machine: what is sent when, and runs that outlive their Hub."""

import logging
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from tests.support.hub_server import TOKEN, USER, serving, use
from tests.support.tiny import PROMPTS, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import (
    StopAfter,
    assert_equal_weights,
    config,
    disturb_adapter,
    trained_weights,
    trainer,
)
from video_trl.hub import LORA_FILE_NAME, HubUploadError
from video_trl.trainer import LogVideosCallback
from video_trl.trainer.publishing.uploader import make_repository


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
CARD_AND_ADAPTER = {"README.md", LORA_FILE_NAME}


@pytest.fixture
def server(monkeypatch):
    with serving() as made:
        made.clock = use(made, monkeypatch)
        yield made


def pushing(folder: Path, **changes):
    settings = {**SAVING, "push_to_hub": True, "hub_model_id": f"{USER}/run", "hub_token": TOKEN}
    return config(folder, **(settings | changes))


def samples(**changes) -> LogVideosCallback:
    return LogVideosCallback(PROMPTS[:1], **({"every_steps": 2, "call_kwargs": {"num_inference_steps": 1}} | changes))


def names(commit) -> set[str]:
    return set(commit[2])


def test_every_save_sends_adapter_card_and_videos(server, tmp_path):
    made = trainer(pushing(tmp_path, hub_always_push=True), callbacks=[samples()])
    made.train()
    _, *commits = server.model("run").commits
    assert [message for _, message, _ in commits] == [f"Training in progress, step {step}" for step in (2, 4)]
    videos = [{f"samples/step_{step}/00.mp4" for step in steps} for steps in ((0, 2), (0, 4))]
    assert [names(commit) for commit in commits] == [CARD_AND_ADAPTER | shown for shown in videos]
    for step, (_, _, files) in zip((2, 4), commits, strict=True):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert files[LORA_FILE_NAME] == (checkpoint / LORA_FILE_NAME).read_bytes()
        assert files["README.md"] == (checkpoint / "README.md").read_bytes()
        front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert front["widget"] == [{"text": PROMPTS[0], "output": {"url": f"samples/step_{step}/00.mp4"}}]
    assert not list(tmp_path.glob("_upload-*"))


@pytest.mark.parametrize("strategy", ["checkpoint", pytest.param("all_checkpoints", marks=pytest.mark.slow)])
def test_checkpoints_are_sent_whole_and_resumed_on_another_machine(server, tmp_path, strategy):
    straight = trainer(config(tmp_path / "straight", max_steps=4))
    straight.train()
    args = pushing(tmp_path / "here", hub_strategy=strategy, save_total_limit=1, hub_always_push=True)
    trainer(args, callbacks=[StopAfter(2)]).train()
    folder = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-2"
    files = server.model("run").files
    local = {f"{folder}/{path.name}": path.read_bytes() for path in (tmp_path / "here" / "checkpoint-2").iterdir()}
    assert {path: data for path, data in files.items() if path.startswith(folder)} == local
    assert f"{folder}/optimizer.pt" in files and CARD_AND_ADAPTER <= set(files)

    there = snapshot_download(f"{USER}/run", cache_dir=str(tmp_path / "there"))
    resumed = trainer(config(tmp_path / "resumed", max_steps=4))
    resumed.train(resume_from_checkpoint=f"{there}/{folder}")
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))


def test_end_sends_when_the_model_is_saved(server, tmp_path):
    made = trainer(pushing(tmp_path, hub_strategy="end", ema_decay=0.5))
    made.train()
    assert len(server.model("run").commits) == 1
    made.save_model()
    assert names(server.model("run").commits[-1]) == CARD_AND_ADAPTER | {f"ema/{LORA_FILE_NAME}"}
    assert "subfolder='ema'" in server.model("run").files["README.md"].decode()  # what its numbers are of
    made.push_to_hub(dataset_name="somebody/groups", commit_message="The end")
    assert server.model("run").commits[-1][1] == "The end"
    assert "on somebody/groups" in server.model("run").files["README.md"].decode()


def test_the_repository_loads_into_the_pipeline_as_the_model_that_was_trained(server, tmp_path):
    made = trainer(pushing(tmp_path, hub_strategy="end", lora_rank=4, lora_alpha=32))
    made.train()
    disturb_adapter(made)
    made.push_to_hub()
    pipeline = tiny_wan_pipeline()
    pipeline.load_lora_weights(f"{USER}/run", weight_name=LORA_FILE_NAME, adapter_name="default")
    loaded = {name: weight for name, weight in pipeline.transformer.named_parameters() if "lora_" in name}
    assert_equal_weights(loaded, trained_weights(made))
    assert pipeline.transformer.peft_config["default"].lora_alpha == 32


def test_all_weights_are_sent_as_a_transformer(server, tmp_path):
    made = trainer(pushing(tmp_path, hub_strategy="end", use_peft=False, max_steps=1))
    made.train()
    made.save_model()
    weights = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert set(server.model("run").files) == weights | {"README.md"}
    card = server.model("run").files["README.md"].decode()
    assert "full-finetune" in card and "WanTransformer3DModel.from_pretrained('somebody/run'" in card


def test_a_running_upload_keeps_what_it_began_with_and_the_next_waits(server, tmp_path):
    """The first upload is held up until the second checkpoint has replaced the first."""
    server.fail("*/preupload/main", 503, times=1, headers={"Retry-After": "1"})
    waiting = made_by_now = None

    class Slow(type(server.clock)):
        def sleep(self, seconds):
            import time

            while not (tmp_path / "checkpoint-4").exists():
                time.sleep(0.02)
            super().sleep(seconds)

    server.clock.__class__ = Slow
    made = trainer(pushing(tmp_path, save_total_limit=1, hub_always_push=True))
    made.train()
    waiting, made_by_now = server.model("run").commits[1:]
    assert waiting[1].endswith("step 2") and made_by_now[1].endswith("step 4")
    assert waiting[2][LORA_FILE_NAME] != made_by_now[2][LORA_FILE_NAME]
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_training_outlives_a_hub_that_goes_away(server, tmp_path, caplog):
    plain = trainer(config(tmp_path / "plain", max_steps=4))
    plain.train()
    server_fails = ("*/preupload/*", "POST /api/repos/create")
    made = trainer(pushing(tmp_path / "run", hub_always_push=True))
    for pattern in server_fails:
        server.fail(pattern, 503, times=10_000)
    made.train()
    made.save_model()
    assert made.state.global_step == 4
    assert_equal_weights(trained_weights(made), trained_weights(plain))
    assert {"checkpoint-2", "checkpoint-4", *CARD_AND_ADAPTER} <= {path.name for path in (tmp_path / "run").iterdir()}
    said = [record.getMessage() for record in caplog.records if record.name == "video_trl.trainer.publishing.uploader"]
    assert [text for text in said if "step 2' was not uploaded; training is not affected." in text]
    assert f"video-trl push {tmp_path / 'run'} {USER}/run" in said[-1]
    assert not list((tmp_path / "run").glob("_upload-*"))
    with pytest.raises(HubUploadError, match="503: the Hub has a problem.*uploads it later"):
        made.push_to_hub()
    server.failures.clear()
    made.push_to_hub()
    assert set(server.model("run").files) == CARD_AND_ADAPTER


def test_a_training_starts_without_a_hub_and_uploads_once_it_is_back(server, tmp_path, caplog):
    server.fail("POST /api/repos/create", 503, times=1)
    made = trainer(pushing(tmp_path, hub_model_id="run", max_steps=2))
    assert "every save tries to upload to 'run' again" in caplog.text and not server.repositories
    made.train()
    assert set(server.model("run").files) == CARD_AND_ADAPTER


def test_what_will_not_work_later_is_refused_before_anything_is_encoded(server, tmp_path):
    raw = {"train_dataset": tiny_group_dataset(1, 1), "rows": 1}
    with pytest.raises(ValueError, match="`push_to_hub` as 'other/run': .*403.*train without `push_to_hub`"):
        trainer(pushing(tmp_path, hub_model_id="other/run", cache_dir=str(tmp_path / "cache")), **raw)
    with pytest.raises(ValueError, match="401.*hf auth login"):
        trainer(pushing(tmp_path, hub_token="hf_wrong", cache_dir=str(tmp_path / "cache")), **raw)
    assert not (tmp_path / "cache").exists()


def test_offline_mode_is_a_hub_that_is_away(tmp_path, caplog):
    assert make_repository(pushing(tmp_path)) is None
    assert f"The Hub cannot be reached ({OfflineModeIsEnabled.__name__}" in caplog.text


def test_no_token_in_files_logs_or_repository(server, tmp_path, caplog):
    other = "hf_AnotherSecretToken0123456789"
    caplog.set_level(logging.DEBUG)
    tiny_wan_pipeline().save_pretrained(tmp_path / "base")
    options = {"token": other}
    args = pushing(
        tmp_path / "run", hub_strategy="checkpoint", report_to="tensorboard", model_init_kwargs=options, max_steps=2
    )
    made = trainer(args, model=str(tmp_path / "base"))
    made.train()
    made.save_model()
    made.push_to_hub()
    server.fail("*/preupload/*", 401)
    with pytest.raises(HubUploadError) as refused:
        made.push_to_hub()
    places = {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    places |= {
        f"hub/{oid}/{path}": data for oid, _, files in server.model("run").commits for path, data in files.items()
    }
    places |= {
        "log": caplog.text.encode(),
        "error": str(refused.value).encode(),
        "repr": f"{made.args} {made.args!r}".encode(),
    }
    assert any("tfevents" in name for name in places) and any("last-checkpoint" in name for name in places)
    secret = re.compile(rf"{TOKEN}|{other}".encode())
    assert [name for name, data in places.items() if secret.search(data)] == []
    assert "<TOKEN>" in (tmp_path / "run" / "training_args.json").read_text()
