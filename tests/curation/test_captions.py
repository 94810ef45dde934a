"""Captions from a server and from a model in this process."""

import pytest

from tests.support.curation.clips import write_clip
from tests.support.judges.server import Step, free_port, serving
from tests.support.judges.tiny_qwen import write_qwen
from video_trl.curation.captions import check_captioner, load_captioner
from video_trl.judges.chat import ChatUnavailableError


OPTIONS = {"model": "tiny", "num_frames": 3, "max_retries": 0, "max_repairs": 0, "concurrency": 1}


def test_a_server_describes_each_clip_and_a_bad_answer_costs_one(tmp_path):
    videos = [str(write_clip(tmp_path / f"{seed}.mp4", seed=seed)) for seed in range(3)]
    script = [Step({"caption": "A ball rolls."}), Step("no json"), Step({"caption": "A ball falls.", "mood": "calm"})]
    with serving(*script) as server:
        captioner = load_captioner(server.url, OPTIONS)
        assert captioner(videos) == ["A ball rolls.", "", "A ball falls."]
        assert "frames=3" in captioner.name and "tiny" in captioner.name
        (message,) = [m for m in server.requests[0]["messages"] if m["role"] == "user"]
    images = [part for part in message["content"] if part["type"] == "image_url"]
    assert len(images) == 3 and "at these seconds: 0.00, " in message["content"][-1]["text"]


def test_a_server_that_is_not_there_stops_the_run(tmp_path):
    captioner = load_captioner(f"http://127.0.0.1:{free_port()}/v1", OPTIONS | {"backoff": 1e-3})
    with pytest.raises(ChatUnavailableError):
        captioner([str(write_clip(tmp_path / "clip.mp4"))])


def test_a_model_in_this_process_writes_text_that_depends_on_the_clip(tmp_path):
    folder = write_qwen(tmp_path / "qwen", "qwen2_5_vl")
    check_captioner(str(folder), {})
    captioner = load_captioner(str(folder), {"num_frames": 3, "max_pixels": 64 * 64, "max_tokens": 4, "device": "cpu"})
    videos = [str(write_clip(tmp_path / f"{seed}.mp4", seed=seed)) for seed in range(2)]
    first, second = captioner(videos)
    assert isinstance(first, str) and captioner(videos) == [first, second]
    assert captioner.name.startswith("qwen-vl:v1:weights=")


@pytest.mark.parametrize(("name", "options", "message"), [
    ("http://localhost:1/v1", {}, "captioner 'http://localhost:1/v1'.*model"),
    ("http://localhost:1/v1", {"model": "m", "speed": 1}, "speed.*Check `captioner_options`"),
    ("no/such-model", {}, "no/such-model"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_the_run(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_captioner(name, options)
