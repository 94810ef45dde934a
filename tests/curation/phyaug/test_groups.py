"""What leaves PhyAugPipe: scored rejected videos, a folder that can go anywhere, and its upload."""

import base64
import json
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from tests.support.curation.clips import write_clip
from tests.support.curation.phyaug_runs import config, small_pool
from tests.support.paths import ROOT
from video_trl.curation.phyaug.groups import JudgeBatch
from video_trl.curation.phyaug.pipeline import export_groups, push_groups, run_phyaug
from video_trl.data import read_video
from video_trl.load import load_judge
from video_trl.losses import physics_weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pool = small_pool(tmp_path_factory.mktemp("pool"), ("rolling", "incline", "rolling"))
    notes = {"license": "cc-by-4.0", "license_notes": "Clips: nobody's | everybody's."}
    return folder, run_phyaug(config(folder, budget=3, seeds=[0], **notes), [pool])


def test_a_video_that_cannot_be_judged_costs_nobody_else_the_score(tmp_path):
    for seed in range(3):
        write_clip(tmp_path / f"{seed}.mp4", seed=seed)
    stage = JudgeBatch(partial(load_judge, "sandbox"), tmp_path)
    prompts = ["A red ball falls and bounces on the floor.", "No sentence of the sandbox.", "A red ball is thrown."]
    columns = pickle.loads(pickle.dumps(stage))({"rejected": ["0.mp4", "1.mp4", "2.mp4"], "prompt": prompts})
    assert columns["dropped_by"] == [None, "not_judged", None] and "names no motion" in columns["detail"][1]
    assert columns["sa"][1] is None and all(0 <= columns["pc"][row] <= 1 for row in (0, 2))


def test_a_judge_is_asked_with_videos_and_prompts_and_its_words_are_kept(tmp_path):
    class Judge:
        identity = "judge"

        def score(self, videos, prompts):
            assert videos == [str(tmp_path / "a.mp4")] and prompts == ["a ball"]
            return [{"sa": None, "pc": 0.5, "error": "x" * 2000}]

    columns = JudgeBatch(Judge, tmp_path)({"rejected": ["a.mp4"], "prompt": ["a ball"]})
    assert columns["judge"] == ["judge"] and columns["detail"] == ["x" * 1000]


def test_weights_in_the_rows_are_those_of_the_scores(finished):
    for row in finished[1].groups:
        sa, pc = (torch.tensor([score[name] for score in row["rejected_scores"]]) for name in ("sa", "pc"))
        alpha, gamma = physics_weights(sa, pc)
        assert [weight["alpha"] for weight in row["rejected_weights"]] == pytest.approx(alpha.tolist())
        assert [weight["gamma"] for weight in row["rejected_weights"]] == pytest.approx(gamma.tolist())


def test_an_export_holds_its_videos_and_reads_back(finished, tmp_path):
    folder, result = finished
    exported = export_groups(folder, rows_per_file=2)
    assert sorted(path.name for path in (exported / "data").iterdir()) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    moved = exported.rename(tmp_path / "elsewhere")
    loaded = datasets.load_dataset(str(moved), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == result.groups.features and loaded["prompt"] == result.groups["prompt"]
    for row, original in zip(loaded, result.groups, strict=True):
        assert row["chosen"]["bytes"] == Path(original["chosen"]["path"]).read_bytes()
        assert read_video(row["rejected"][0]).shape == (13, 64, 64, 3)


def test_the_card_has_front_matter_that_the_hub_reads(finished):
    folder, _ = finished
    card = (folder / "groups" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["task_categories"] == ["text-to-video"]
    assert front["configs"][0]["data_files"][0]["split"] == "train"
    assert "Clips: nobody's \\| everybody's." in card and "| budget | 3 |" in card


def test_nothing_is_sent_before_the_run_is_finished(finished, tmp_path):
    with pytest.raises(ValueError, match="no run"):
        push_groups(tmp_path, "somebody/groups")
    (tmp_path / "run.json").write_text(json.dumps({"state": "running"}))
    with pytest.raises(ValueError, match="not finished"):
        push_groups(tmp_path, "somebody/groups")


class HubOfOneDataset(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as one upload needs; `received` maps each path to its bytes."""

    received: dict[str, bytes]
    blobs: dict[str, bytes]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        here = f"http://127.0.0.1:{self.server.server_port}"
        answer: dict = {}
        if self.path == "/api/repos/create":
            assert json.loads(body)["type"] == "dataset"
            answer = {"url": f"{here}/datasets/somebody/groups"}
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": p, "uploadMode": "regular" if p == "README.md" else "lfs", "shouldIgnore": False}
                    for p in paths
                ]
            }
        elif self.path.endswith("/info/lfs/objects/batch"):
            actions = [
                o | {"actions": {"upload": {"href": f"{here}/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            answer = {"transfer": "basic", "objects": actions}
        elif self.path.endswith("/commit/main"):
            for value in (json.loads(line)["value"] for line in body.splitlines()[1:]):
                stored = self.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
                self.received[value["path"]] = stored
            answer = {"commitUrl": f"{here}/datasets/somebody/groups/commit/{'0' * 40}", "commitOid": "0" * 40}
        self.answer(json.dumps(answer).encode())

    def do_PUT(self):
        self.blobs[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"{}")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.mark.slow  # huggingface_hub reads its address when it is imported, hence a process of its own
def test_a_push_uploads_card_and_tables(finished):
    folder, _ = finished
    handler = type("Handler", (HubOfOneDataset,), {"received": {}, "blobs": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_of_nobody",
            "PYTHONPATH": str(ROOT),
        }
        code = f"from video_trl.curation import push_groups; push_groups({str(folder)!r}, 'somebody/groups')"
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=200)
        server.shutdown()
    assert run.returncode == 0, run.stderr[-3000:]
    exported = folder / "export"
    sent = {str(path.relative_to(exported)): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert handler.received == sent and set(sent) == {"README.md", "data/train-00000-of-00001.parquet"}
