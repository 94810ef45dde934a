"""Judges by name."""

import json
import re

import pytest
import torch

from tests.support.judges.server import free_port
from tests.support.judges.tiny_owl import tiny_model, write_checkpoint
from tests.support.judges.tiny_qwen import write_qwen
from tests.support.paths import DOCS
from video_trl.judges import (
    CachedJudge,
    PrecomputedJudge,
    QwenVLJudge,
    RemoteJudge,
    VideoConPhysicsJudge,
    VideoPhy2Judge,
)
from video_trl.load import check_judge, load_judge
from video_trl.sandbox import SandboxJudge, simulate


def test_sandbox_and_cache(tmp_path):
    assert isinstance(load_judge("sandbox"), SandboxJudge) and load_judge("sandbox", fps=4.0).fps == 4.0
    judge = load_judge("sandbox", cache=tmp_path / "cache.sqlite")
    clip = simulate(0)
    assert isinstance(judge, CachedJudge)
    assert judge.score([clip.video], [clip.prompt]) == SandboxJudge().score([clip.video], [clip.prompt])


def test_sandbox_identity_follows_the_frame_rate():
    assert SandboxJudge().identity == SandboxJudge().identity != SandboxJudge(fps=4).identity


def test_the_two_published_judges(tmp_path):
    folder = write_checkpoint(tmp_path, tiny_model())
    options = {"device": "cpu", "dtype": torch.float32}
    assert isinstance(load_judge(f"videocon-physics:{folder}", **options), VideoConPhysicsJudge)
    judge = load_judge(f"videophy2:{folder}", mode="generate", **options)
    assert isinstance(judge, VideoPhy2Judge) and judge.mode == "generate"
    with pytest.raises(ValueError, match=r"'videocon-physics:.*' or 'videophy2:.*'"):
        load_judge(folder)


@pytest.mark.parametrize(
    "name", ["videocon-physics", "videophy2", "videophysics/videocon_physics", "videophy2:no/such"]
)
def test_published_names_ask_the_hub(name):
    with pytest.raises(ValueError, match="No weights at (videophysics|no)/"):
        load_judge(name)


@pytest.mark.parametrize("prefix", ["", "qwen-vl:"])
def test_qwen(tmp_path, prefix):
    write_qwen(tmp_path, "qwen3_vl")
    assert isinstance(load_judge(f"{prefix}{tmp_path}", device="cpu", dtype=torch.float32), QwenVLJudge)


def test_server(monkeypatch):
    judge = load_judge("http://localhost:8000/v1", model="m", concurrency=2)
    assert isinstance(judge, RemoteJudge) and judge.client.concurrency == 2
    with pytest.raises(ValueError, match="needs `model`"):
        load_judge("https://localhost/v1")


def test_table(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "prompt": "x", "sa": 1, "pc": 0}))
    assert isinstance(load_judge(path), PrecomputedJudge)


def test_a_check_reads_no_weights_and_asks_no_server(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    for name in (tmp_path, f"qwen-vl:{tmp_path}", f"videophy2:{tmp_path}", "sandbox"):
        check_judge(name)
    check_judge(f"http://127.0.0.1:{free_port()}/v1", model="m")
    with pytest.raises(ValueError, match="No weights at no/such"):
        check_judge("videophy2:no/such")
    with pytest.raises(ValueError, match="No judge 'sandbx'"):
        check_judge("sandbx")
    with pytest.raises(TypeError, match="speed"):
        check_judge("sandbox", speed=3)


def test_code_of_the_documentation_runs():
    page = DOCS / "data" / "judges.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    lawful, wrong = names["scores"]
    assert lawful["pc"] > 0.9 > 0.6 > wrong["pc"]
    assert names["client"].model == "Qwen/Qwen3-VL-8B-Instruct"


def test_names_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match="No judge 'sandbx'"):
        load_judge("sandbx")
    with pytest.raises(ValueError, match="Expected a model after 'qwen-vl:'"):
        load_judge("qwen-vl")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="no judge for model_type 'bert'"):
        load_judge(tmp_path)
    with pytest.raises(TypeError, match="speed"):
        load_judge("sandbox", speed=3)
