"""Uploads of adapters to a Hub on this machine, by the real client: whole, again, refused, cut off, and back."""

import json
import os
import subprocess
import sys

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from tests.hub.test_lora_and_card import generate, with_adapter
from tests.support.hub_server import TOKEN, USER, Clock, HubServer, serving, use
from tests.support.paths import PYTHONPATH
from tests.support.tiny import tiny_wan_pipeline
from video_trl import hub
from video_trl.data import write_video
from video_trl.files import partial_path
from video_trl.hub import upload
from video_trl.hub.upload import inherited_license


REPOSITORY = f"{USER}/adapter"


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def clock(server: HubServer, monkeypatch) -> Clock:
    return use(server, monkeypatch)


@pytest.fixture
def adapter(tmp_path):
    """Folder of a run with all that may lie in one."""
    folder = tmp_path / "run"
    path = hub.save_lora(with_adapter(lora_alpha=32).transformer, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# adapter\n![](samples/step_20/00.mp4)\n")
    for step in (0, 10, 20):
        write_video(folder / "samples" / f"step_{step}" / "00.mp4", torch.full((2, 32, 32, 3), step).byte().numpy(), 8)
    partial_path(folder / "samples" / "step_20" / "01.mp4").write_bytes(b"half a video")
    for name in ("checkpoint-10/optimizer.pt", "training_args.bin", "training_args.json", "dataset/rows.arrow"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    assert path.parent == folder
    return folder


EXPECTED = {"README.md", hub.LORA_FILE_NAME, "samples/step_0/00.mp4", "samples/step_20/00.mp4"}


@pytest.mark.parametrize("several_parts", [False, True])
def test_a_push_sends_weights_card_and_videos_and_nothing_else(server, clock, adapter, several_parts):
    server.several_parts = several_parts
    commit = hub.push(adapter, REPOSITORY, private=True, commit_message="First")
    files = server.model("adapter").files
    assert {path: files[path] for path in EXPECTED} == {path: (adapter / path).read_bytes() for path in EXPECTED}
    assert set(files) == EXPECTED and server.model("adapter").private
    assert commit.oid == server.model("adapter").commits[-1][0] and server.model("adapter").commits[-1][1] == "First"
    assert clock.waits == []


def test_a_second_push_sends_what_changed_and_drops_older_videos(server, clock, adapter):
    hub.push(adapter, REPOSITORY)
    before = len(server.model("adapter").commits)
    (adapter / "samples" / "step_20").rename(adapter / "samples" / "step_30")
    card = adapter / "README.md"
    card.write_text(card.read_text().replace("step_20", "step_30"))
    server.requests.clear()
    hub.push(adapter, REPOSITORY)
    assert not [request for request in server.requests if request.startswith("PUT")]  # the videos are there already
    assert len(server.model("adapter").commits) == before + 1
    assert set(server.model("adapter").files) == {path.replace("20", "30") for path in EXPECTED}


def test_another_machine_loads_the_adapter_to_bit_equal_video(server, clock, adapter, tmp_path, monkeypatch):
    hub.push(adapter, REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-cache"))
    pipeline = tiny_wan_pipeline()
    pipeline.load_lora_weights(REPOSITORY, weight_name=hub.LORA_FILE_NAME, cache_dir=str(tmp_path / "another-cache"))
    assert torch.equal(generate(pipeline), generate(with_adapter(lora_alpha=32)))
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 32
    assert any(request.startswith("GET /cdn/") for request in server.requests)  # followed the redirect
    folder = snapshot_download(REPOSITORY, cache_dir=str(tmp_path / "another-cache"))
    assert hub.load_lora_state(folder)[1].lora_alpha == 32


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("POST /api/repos/create", 401, "does not know the token.*hf auth login.*video-trl push"),
        ("POST /api/repos/create", 403, "may not write there.*role 'write'"),
        ("*/commit/main", 403, "may not write there"),
        ("*/commit/main", 413, "larger than the account allows"),
    ],
)
def test_a_refusal_is_told_at_once_with_a_way_out(server, clock, adapter, pattern, status, message):
    server.fail(pattern, status)
    with pytest.raises(hub.HubUploadError, match=f"Upload failed with {status}.*{message}") as caught:
        hub.push(adapter, REPOSITORY)
    assert clock.waits == [] and TOKEN not in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_a_wrong_token_and_a_foreign_repository_are_refused_by_the_hub_itself(server, adapter, monkeypatch):
    use(server, monkeypatch)
    with pytest.raises(hub.HubUploadError, match="403.*may not write there"):
        hub.push(adapter, "someone-else/adapter")
    with pytest.raises(hub.HubUploadError, match="401.*does not know the token") as caught:
        hub.push(adapter, REPOSITORY, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value) and not server.repositories


@pytest.mark.parametrize("pattern", ["*/preupload/main", "*/lfs/objects/batch", "PUT /lfs/*"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for_as_long_as_it_asks(server, clock, adapter, pattern, status):
    server.fail(pattern, status, times=2, headers={"Retry-After": "7"})
    hub.push(adapter, REPOSITORY)
    assert set(server.model("adapter").files) == EXPECTED
    assert len(clock.waits) >= 2 and clock.waits[:2] == [8.0, 8.0]


def test_a_commit_that_meets_another_is_made_again(server, clock, adapter):
    server.fail("*/commit/main", 409, times=2)
    hub.push(adapter, REPOSITORY)
    assert set(server.model("adapter").files) == EXPECTED and clock.waits == [1.0, 4.0]
    server.fail("*/commit/main", 409, times=4)
    (adapter / "README.md").write_text("# other")
    with pytest.raises(hub.HubUploadError, match="409: another commit was being made at the same time"):
        hub.push(adapter, REPOSITORY)


@pytest.mark.parametrize("several_parts", [False, True])
def test_a_connection_that_is_cut_in_the_middle_of_a_file_is_taken_up(server, clock, adapter, several_parts):
    server.several_parts = several_parts
    server.fail("PUT /lfs/*", 0, times=2, read=100)
    hub.push(adapter, REPOSITORY)
    files = server.model("adapter").files
    assert files[hub.LORA_FILE_NAME] == (adapter / hub.LORA_FILE_NAME).read_bytes() and clock.waits


def test_a_hub_that_stays_away_costs_nothing_but_the_upload(server, clock, adapter):
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    server.fail("PUT /lfs/*", 500, times=1000)
    with pytest.raises(
        hub.HubUploadError, match="500: the Hub has a problem.*Everything is in .*run; `video-trl push"
    ):
        hub.push(adapter, REPOSITORY)
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert not server.model("adapter").files  # no commit of a part
    server.failures.clear()
    hub.push(adapter, REPOSITORY)
    assert set(server.model("adapter").files) == EXPECTED


def test_no_hub_at_all(adapter, monkeypatch):
    with serving() as gone:
        use(gone, monkeypatch)
    with pytest.raises(hub.HubUploadError, match="The Hub cannot be reached.*Connect"):
        hub.push(adapter, REPOSITORY)


def test_the_licence_of_the_base_model_is_found(server, clock, tmp_path, caplog):
    api = HfApi(token=TOKEN)
    api.create_repo(f"{USER}/base")
    card = b"---\nlicense: other\nlicense_name: cogvideox\nlicense_link: LICENSE\ntags: [a]\n---\n# base"
    api.upload_file(repo_id=f"{USER}/base", path_or_fileobj=card, path_in_repo="README.md")
    expected = {"license": "other", "license_name": "cogvideox", "license_link": "LICENSE"}
    assert inherited_license(f"{USER}/base") == expected
    server.requests.clear()
    assert inherited_license(f"{USER}/base", ask_hub=False) == {} and not server.requests
    (tmp_path / "README.md").write_bytes(card)
    assert inherited_license(str(tmp_path)) == expected
    assert inherited_license("sandbox") == {"license": "apache-2.0"}
    assert inherited_license(f"{USER}/unknown") == {} and "licence of somebody/unknown is not known" in caplog.text


def test_the_server_is_as_strict_as_the_hub(server, clock):
    """What would make the tests above pass for nothing."""
    api = HfApi(token=TOKEN)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.upload_file(repo_id=REPOSITORY, path_or_fileobj=b"1", path_in_repo="a")
    api.create_repo(REPOSITORY)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPOSITORY)
    api.upload_file(repo_id=REPOSITORY, path_or_fileobj=b"1", path_in_repo="a.pt")
    answer = httpx2.put(f"{server.url}/lfs/{'0' * 64}", content=b"not that")
    assert answer.status_code == 400 and json.loads(answer.content)["error"] == "the content has another hash"
    assert hf_hub_download(REPOSITORY, "a.pt").endswith("a.pt")
    assert ModelCard("---\ntags: [a]\n---\n").data.tags == ["a"]


PULL = """
import torch
from datasets import config, load_dataset

from tests.hub.test_lora_and_card import generate, with_adapter
from tests.support.tiny import tiny_group_dataset, tiny_wan_pipeline
from video_trl.hub import LORA_FILE_NAME

config.USE_PARQUET_EXPORT = False  # asks another server than the Hub's
pipeline = tiny_wan_pipeline()
pipeline.load_lora_weights("somebody/adapter", weight_name=LORA_FILE_NAME)
assert torch.equal(generate(pipeline), generate(with_adapter(lora_alpha=32)))
rows = load_dataset("somebody/groups", split="train")
assert rows[1]["chosen"]["bytes"] == tiny_group_dataset(2, 1)[1]["chosen"]["bytes"]
"""
PUSH = """
import sys

from tests.support.tiny import tiny_group_dataset
from video_trl import hub

hub.push(sys.argv[1], "somebody/adapter")
hub.push_dataset(tiny_group_dataset(2, 1), "somebody/groups")
"""


@pytest.mark.slow  # two processes that import everything
def test_two_processes_with_caches_of_their_own_share_an_adapter_and_a_dataset(server, adapter, tmp_path):
    """Nothing is replaced here: the clients read their address and token from the environment."""
    for number, code in enumerate((PUSH, PULL)):
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / f"machine-{number}"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": PYTHONPATH,
        }
        command = [sys.executable, "-c", code, str(adapter)]
        run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=280)
        assert run.returncode == 0, run.stderr[-3000:]
        assert TOKEN not in run.stdout + run.stderr
    assert set(server.model("adapter").files) == EXPECTED


@pytest.mark.parametrize("pattern", ["POST */repos/create", "*/preupload/*", "*/commit/main"])
def test_a_hub_that_never_ends_an_answer_is_given_up(server, clock, adapter, monkeypatch, pattern):
    monkeypatch.setattr(upload, "_SECONDS", 0.5)
    monkeypatch.setattr(upload, "_BYTES_PER_SECOND", 10**9)
    server.fail(pattern, -1)
    with pytest.raises(
        hub.HubUploadError, match=r"cannot be reached \(TimeoutError: no answer within .*push .* uploads it later"
    ):
        hub.push(adapter, REPOSITORY)
