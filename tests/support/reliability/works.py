"""What is attacked: each kind of long work of the package, at small size and with real files."""

import http.client
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.support.curation.clips import SMALL, first_stages, write_clip
from tests.support.evaluation.runs import ColourJudge, make_run
from tests.support.hub_server import USER, HubServer
from tests.support.reliability.kills import Work
from tests.support.tiny import MAX_SEQUENCE_LENGTH, tiny_mp4, tiny_video, tiny_wan_pipeline
from tests.support.trainer.runs import config, trainer
from video_trl import hub
from video_trl.curation.gt_pair.pipeline import GTPairConfig
from video_trl.data import EncodedDataset, encode_dataset
from video_trl.data.encoding import store
from video_trl.evaluation.evaluate import evaluate_model
from video_trl.evaluation.runs.score import score_run
from video_trl.evaluation.votes.server import VotingServer
from video_trl.evaluation.votes.study import read_votes
from video_trl.files import file_checksum, find_damage


LORA = "pytorch_lora_weights.safetensors"


def contents(folder: Path, *patterns: str) -> dict[str, str]:
    """Checksums of the files that match one of the patterns."""
    paths = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): file_checksum(path) for path in sorted(paths)}


# ---- training -------------------------------------------------------------------------------------------------------


def train(folder: Path, rank: int) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_strategy": "no"}
    made = trainer(config(folder / "run", **settings))
    made.train(resume_from_checkpoint="auto")
    made.save_model()


def train_in_two_processes(folder: Path, rank: int) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)  # what other tests of this process have set up
    PartialState._reset_state()
    port = 20_000 + (os.getppid() * 7 + int(folder.stat().st_ino)) % 20_000
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "ddp_backend": "gloo"}
    made = trainer(config(folder / "run", **settings, per_device_train_batch_size=1))
    made.train(resume_from_checkpoint="auto")
    made.save_model()


def trained(folder: Path) -> dict[str, str]:
    checkpoints = sorted((folder / "run").glob("checkpoint-*"))
    assert all(find_damage(path) is None for path in checkpoints), checkpoints
    return contents(folder, LORA, "optimizer.pt")


# ---- encoded data ---------------------------------------------------------------------------------------------------


def encode(folder: Path, rank: int) -> None:
    store._SECONDS_AT_STAKE = store._PROPORTION_AT_STAKE = 0
    rows = [{"prompt": f"a ball {word}", "video": tiny_video(n)} for n, word in enumerate(["falls", "rolls"] * 6)]
    options: dict[str, Any] = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "device": "cpu", "batch_size": 2}
    pipeline = tiny_wan_pipeline()
    family = trainer_family(pipeline)
    encode_dataset(rows, pipeline, family, "video", cache_dir=folder / "cache", **options)


def trainer_family(pipeline: Any) -> Any:
    from video_trl.trainer.setup.models import find_family

    return find_family(pipeline, pipeline.transformer)


def encoded(folder: Path) -> list[Any]:
    (directory,) = (folder / "cache").iterdir()
    return [
        [row["prompt"], *(row[name].tolist() for name in ("latents", "prompt_embeds"))]
        for row in EncodedDataset(directory)
    ]


# ---- curation -------------------------------------------------------------------------------------------------------


def write_clips(folder: Path) -> None:
    for seed in range(4):
        write_clip(folder / "clips" / f"{seed}.mp4", seed=seed)


def curate(folder: Path, rank: int) -> None:
    settings = GTPairConfig(sources=[str(folder / "clips")], output_dir=str(folder / "out"), **SMALL)
    table = first_stages(settings)
    from video_trl.curation.engine.manifest import write_table

    write_table(table.select([name for name in table.column_names if "path" not in name]), folder / "manifest.parquet")


def curated(folder: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "manifest.parquet").to_pydict()
    rows = {name: table[name] for name in ("content", "dropped_by", "value")}
    return rows | {"clips": [Path(name).name for name in table["source_id"]]} | contents(folder / "out", "*.mp4")


# ---- evaluation -----------------------------------------------------------------------------------------------------


def make_videos(folder: Path) -> None:
    make_run(folder / "run", "model", [(number / 16, 0.5) for number in range(16)], scored=False)


def score(folder: Path, rank: int) -> None:
    score_run(folder / "run", ColourJudge(), batch_size=2)


def evaluate(folder: Path, rank: int) -> None:
    evaluate_model(folder / "run", num_prompts=4, call_kwargs={"num_inference_steps": 1}, batch_size=1)


def scored(folder: Path) -> dict[str, str]:
    return contents(folder / "run", "scores/*/0*.json", "*.mp4")


# ---- votes ----------------------------------------------------------------------------------------------------------

RATERS = ("Ada", "Bo", "Cy", "Di")


def make_two_runs(folder: Path) -> None:
    for name in ("ours", "base"):
        make_run(folder / name, name, [(0.5, 0.5)] * 6, scored=False)


def vote(folder: Path, rank: int) -> None:
    """Raters at the voting page, all at once; a vote that the server has acknowledged is noted, and must be there."""
    noted = folder / "acknowledged.txt"
    if noted.exists():
        lost = set(noted.read_text().splitlines()) - {f"{who} {prompt}" for who, prompt, _ in voted(folder)}
        assert not lost, lost

    def rate(server: VotingServer, rater: str) -> None:
        while task := ask(server, f"/api/task?rater={rater}")["task"]:
            answers = dict.fromkeys(("video_quality", "prompt_following"), "same")
            body = {"rater": rater, "task": task["task"], "answers": answers, "seconds": 1.0}
            assert ask(server, "/api/vote", body) == {"saved": True}
            with open(noted, "a", buffering=1) as file:
                file.write(f"{rater} {task['prompt']}\n")

    with VotingServer([folder / "ours", folder / "base"], folder / "votes.jsonl", port=0) as server:
        with ThreadPoolExecutor(len(RATERS)) as raters:
            for done in [raters.submit(rate, server, rater) for rater in RATERS]:
                done.result()


def ask(server: VotingServer, path: str, body: Any = None) -> Any:
    """The answer of the voting page's server; an error unless it is a good one."""
    host = f"127.0.0.1:{server.port}"
    headers = {"Origin": f"http://{host}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    return answer


def voted(folder: Path) -> list[tuple[str, str, dict[str, str]]]:
    _, votes = read_votes(folder / "votes.jsonl")
    return sorted((vote.rater, vote.prompt, dict(vote.answers)) for vote in votes)


# ---- export and the Hub ---------------------------------------------------------------------------------------------


def write_pairs(folder: Path) -> None:
    for number in range(6):
        for name in ("chosen", "rejected"):
            (folder / f"{name}{number}.mp4").write_bytes(tiny_mp4(2 * number + (name == "rejected")))


def pairs_in(folder: Path) -> Dataset:
    cells = [{name: str(folder / f"{name}{n}.mp4") for name in ("chosen", "rejected")} for n in range(6)]
    return Dataset.from_list([{"prompt": f"a ball {number}", **cell} for number, cell in enumerate(cells)])


def export(folder: Path, rank: int) -> None:
    hub.dataset._ROWS_PER_FILE = 2
    hub.export_dataset(pairs_in(folder), folder / "export", name="somebody/pairs")


def exported(folder: Path) -> dict[str, str]:
    return contents(folder / "export", "*")


def push_to(server: HubServer) -> Work:
    """Write an export and send it to a repository of the folder's name on a loopback Hub."""

    def push(folder: Path, rank: int) -> None:
        hub.dataset._ROWS_PER_FILE = 2
        if not (folder / "export" / "README.md").is_file():
            hub.export_dataset(pairs_in(folder), folder / "export", name="somebody/pairs")
        hub.push_dataset(folder / "export", f"{USER}/{folder.parent.name}-{folder.name}")

    def pushed(folder: Path) -> Any:
        files = server.dataset(f"{folder.parent.name}-{folder.name}").files
        local = {path: (folder / "export" / path).read_bytes() for path in exported(folder)}
        return [sorted(files), files == local, exported(folder)]

    return Work("push to a Hub", push, pushed, write_pairs)


WORKS = {
    work.name: work
    for work in (
        Work("training", train, trained),
        Work("training, 2 processes", train_in_two_processes, trained, processes=2),
        Work("encoding", encode, encoded),
        Work("curation", curate, curated, write_clips),
        Work("scoring", score, scored, make_videos),
        Work("evaluation", evaluate, scored),
        Work("export", export, exported, write_pairs),
        Work("voting", vote, voted, make_two_runs),
    )
}
