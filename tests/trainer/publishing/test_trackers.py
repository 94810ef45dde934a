"""Curves and videos in the trackers of `report_to`, without a network, read back from what they keep."""

import io
import json
import time

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.tiny import PROMPTS, tiny_encoded_group
from tests.support.trainer.runs import config, losses, trainer
from video_trl.data import read_video
from video_trl.trainer import LogVideosCallback


def tracked_run(folder, tracker, **changes):
    """Four steps with two sets of videos after the first one, and an evaluation."""
    settings = {"max_steps": 4, "report_to": tracker, "eval_strategy": "steps", "eval_steps": 4, "run_name": "first"}
    samples = LogVideosCallback(PROMPTS[:2], every_steps=2, call_kwargs={"num_inference_steps": 1})
    args = config(folder, **(settings | changes))
    made = trainer(args, callbacks=[samples], eval_dataset=tiny_encoded_group(1))
    made.train()
    return made


def test_tensorboard_has_curves_videos_and_the_configuration(tmp_path):
    made = tracked_run(tmp_path, "tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents*")
    kept = EventAccumulator(str(events.parent), size_guidance={"images": 0, "scalars": 0})
    kept.Reload()
    curve = [(event.step, event.value) for event in kept.Scalars("train/loss")]
    assert [step for step, _ in curve] == [1, 2, 3, 4]
    assert [value for _, value in curve] == pytest.approx(losses(made), rel=1e-6)
    assert {"train/rewards/margins", "eval/loss", "eval/rewards/accuracies"} <= set(kept.Tags()["scalars"])
    for number in range(2):
        videos = kept.Images(f"samples/{number:02d}")
        assert [video.step for video in videos] == [0, 2, 4]
        with Image.open(io.BytesIO(videos[-1].encoded_image_string)) as gif:
            assert (gif.format, gif.n_frames, gif.size) == ("GIF", 5, (32, 32))
    assert "beta" in str(kept.Tensors("args/text_summary")[0].tensor_proto.string_val)


def test_trackio_has_curves_and_videos(tmp_path):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    # transformers 5.5 would send the run to a Space on the Hub if not told otherwise.
    made = tracked_run(tmp_path, "trackio", project=tmp_path.name, trackio_space_id=None)
    logs = SQLiteStorage.get_logs(tmp_path.name, "first")
    curve = [entry["train/loss"] for entry in logs if "train/loss" in entry]
    assert curve == pytest.approx(losses(made))
    assert any("eval/rewards/accuracies" in entry for entry in logs)
    shown = [entry for entry in logs if "samples/00" in entry]
    assert [entry["train/global_step"] for entry in shown] == [0, 2, 4]
    for step, entry in zip((0, 2, 4), shown, strict=True):
        for number in range(2):
            video = entry[f"samples/{number:02d}"]
            assert video["_type"] == "trackio.video" and video["caption"] == PROMPTS[number]
            kept = MEDIA_DIR / video["file_path"]
            mine = tmp_path / "samples" / f"step_{step}" / f"{number:02d}.mp4"
            assert (read_video(kept) == read_video(mine)).all()


@pytest.mark.slow  # its service takes long to start
def test_wandb_keeps_curves_and_videos_for_a_later_upload(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb").mkdir()
    made = tracked_run(tmp_path / "run", "wandb", project="tiny")
    wandb.finish()
    (kept,) = (tmp_path / "wandb").rglob("*.wandb")
    found = _wandb_history(kept)
    for _ in range(100):  # its service writes the file, and may do so behind us
        if any("train/train_runtime" in entry for entry in found):
            break
        time.sleep(0.2)
        found = _wandb_history(kept)
    assert [float(entry["train/loss"]) for entry in found if "train/loss" in entry] == pytest.approx(losses(made))
    shown = [entry for entry in found if any(name.startswith("samples/00") for name in entry)]
    assert [entry["train/global_step"] for entry in shown] == [0, 2, 4]
    videos = list((tmp_path / "wandb").rglob("media/videos/samples/*.mp4"))
    assert len(videos) == 6


def _wandb_history(path) -> list[dict]:
    """Logged entries of the file: records in blocks, as LevelDB writes its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, found = path.read_bytes(), 7, b"", []  # behind the file's own header
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(whole).history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            whole = b""
    return found
