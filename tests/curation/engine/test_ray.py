"""Stages on a Ray cluster of two nodes: the same result, whatever dies. Slow: a cluster takes a while to start."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.curation.phyaug_runs import config, small_pool
from video_trl.curation.engine.manifest import Parts, Stage, new_manifest, run_stage
from video_trl.curation.engine.ray import MAX_TRIES, RayCluster, Worker, check_arrived, run_stage_on_ray
from video_trl.curation.phyaug.pipeline import load_groups, run_phyaug


ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TABLE = new_manifest(
    {"key": [f"k{row}" for row in range(60)], "number": list(range(60))}, {"key": pa.string(), "number": pa.int64()}
)
TWO = RayCluster(max_workers=2)


class Double:
    """Doubles numbers, and writes down which process did; goes on once so many processes have begun."""

    def __init__(
        self, log: Path, seconds: float = 0.0, poison: int | None = None, fault: bool = False, company: int = 1
    ) -> None:
        self.log, self.seconds, self.poison, self.fault, self.company = log, seconds, poison, fault, company

    def __call__(self, batch):
        if self.poison in batch["number"]:
            if self.fault:
                raise ValueError("a fault of the machine")
            os._exit(7)
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        while len(set(pids(self.log))) < self.company:  # on a busy machine one would be done before the other is there
            time.sleep(0.05)
        time.sleep(self.seconds)
        return {"double": [2 * number for number in batch["number"]]}


def stage(function: Double) -> Stage:
    return Stage("double", function, {"double": pa.int64()}, "key", {}, batch_size=4)


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    # Ray's workers run at a low priority of their own; on a busy machine they would hardly run.
    os.environ["RAY_worker_niceness"] = "0"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    here = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}  # else Ray asks the network which address it has
    nodes = Cluster(initialize_head=True, head_node_args={**here, "include_dashboard": False})
    second = nodes.add_node(**here)
    ray.init(address=nodes.address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield nodes, second
    ray.shutdown()
    nodes.shutdown()
    del os.environ["RAY_worker_niceness"]


def exactly_once(table: pa.Table, folder: Path) -> None:
    assert table["key"].to_pylist() == TABLE["key"].to_pylist()
    assert table["double"].to_pylist() == [2 * row for row in range(60)]
    (store,) = folder.glob("double-*")
    committed = Counter(key for part in store.glob("*.parquet") for key in pq.read_table(part)["key"].to_pylist())
    assert committed == Counter(TABLE["key"].to_pylist())


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.is_file() else []


def test_the_result_is_that_of_one_process_and_a_rerun_computes_nothing(cluster, tmp_path):
    log = tmp_path / "log"
    table = run_stage_on_ray(TABLE, stage(Double(log, company=2)), tmp_path / "ray", TWO)
    exactly_once(table, tmp_path / "ray")
    assert table.equals(run_stage(TABLE, stage(Double(tmp_path / "other")), tmp_path / "local"))
    assert len(pids(log)) == 15 and len(set(pids(log))) == 2  # both nodes worked
    run_stage_on_ray(TABLE, stage(Double(log)), tmp_path / "ray", TWO)
    assert len(pids(log)) == 15


def test_a_worker_that_is_killed_in_the_middle_costs_no_clip(cluster, tmp_path):
    log = tmp_path / "log"

    def kill_one() -> None:
        while len(pids(log)) < 4:
            time.sleep(0.05)
        os.kill(pids(log)[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    table = run_stage_on_ray(TABLE, stage(Double(log, 0.3)), tmp_path / "ray", TWO)
    killer.join()
    exactly_once(table, tmp_path / "ray")
    assert len(pids(log)) == 16  # the batch under way was done again


def test_a_batch_whose_worker_died_after_the_commit_is_not_computed_again(tmp_path):
    """What the next worker is given: a batch that is in the store, and of which nobody told the driver."""
    batch = TABLE.slice(0, 4).to_pydict()
    for _ in range(2):
        assert Worker(stage(Double(tmp_path / "log")), str(tmp_path)).compute(batch) == 4
    assert len(pids(tmp_path / "log")) == 1 and len(list(tmp_path.glob("part-*.parquet"))) == 1


def test_a_disk_that_is_not_shared_is_named(tmp_path):
    Worker(stage(Double(tmp_path / "log")), str(tmp_path)).compute(TABLE.slice(0, 4).to_pydict())
    parts = Parts(tmp_path, stage(Double(tmp_path / "log")))
    check_arrived(parts, {"k0", "k3"}, patience=0.1)
    with pytest.raises(RuntimeError, match="1 of 2 rows were computed.*a disk that all nodes of the cluster see"):
        check_arrived(parts, {"k0", "k4"}, patience=0.1)


def test_a_fault_comes_back_as_it_was_raised_and_committed_batches_stay(cluster, tmp_path):
    with pytest.raises(ValueError, match="a fault of the machine"):
        run_stage_on_ray(
            TABLE, stage(Double(tmp_path / "log", poison=50, fault=True)), tmp_path, RayCluster(max_workers=1)
        )
    before = len(pids(tmp_path / "log"))
    assert before == 12
    exactly_once(run_stage_on_ray(TABLE, stage(Double(tmp_path / "log")), tmp_path, TWO), tmp_path)
    assert len(pids(tmp_path / "log")) == 15


def test_a_batch_that_kills_its_workers_is_named(cluster, tmp_path):
    with pytest.raises(RuntimeError, match=f"{MAX_TRIES} workers died over one batch.*'k56'"):
        run_stage_on_ray(TABLE, stage(Double(tmp_path / "log", poison=57)), tmp_path, RayCluster(max_workers=1))
    assert len(pids(tmp_path / "log")) == 14


def test_a_file_that_kills_its_workers_costs_its_own_row(cluster, tmp_path):
    function = Double(tmp_path / "log", poison=57)
    table = run_stage_on_ray(TABLE, replace(stage(function), trial=function), tmp_path, RayCluster(max_workers=1))
    crashed = {row["key"]: row["detail"] for row in table.to_pylist() if row["dropped_by"] == "crashed"}
    assert list(crashed) == ["k57"] and "lost" in crashed["k57"]
    assert table["double"].to_pylist() == [None if row == 57 else 2 * row for row in range(60)]


def test_a_cluster_without_room_is_refused(cluster, tmp_path):
    with pytest.raises(ValueError, match="A worker takes 64 CPUs and 0 GPUs, the cluster has 2"):
        run_stage_on_ray(TABLE, stage(Double(tmp_path / "log")), tmp_path, RayCluster(cpus=64))


def test_what_a_cluster_does_not_name_it_has_none_of():
    RayCluster(cpus=0.5, gpus=1.0).check_room({"CPU": 0.5, "GPU": 1.0})
    for room in ({"memory": 1.0}, {"CPU": 4.0}, {"GPU": 1.0}):
        with pytest.raises(ValueError, match="A worker takes 0.5 CPUs and 0.5 GPUs, the cluster has"):
            RayCluster(cpus=0.5, gpus=0.5).check_room(room)


def test_the_whole_pipeline_runs_on_the_cluster(cluster, tmp_path):
    pool = small_pool(tmp_path, ("rolling", "static", "incline", "rolling"))
    here = run_phyaug(config(tmp_path / "here", seeds=[0], budget=2), [pool])
    there = run_phyaug(config(tmp_path / "there", seeds=[0], budget=2, engine="ray", ray_workers=1), [pool])
    assert there.summary == here.summary and there.categories == here.categories
    assert load_groups(tmp_path / "there")["seeds"] == load_groups(tmp_path / "here")["seeds"]


def test_a_node_that_is_lost_costs_no_clip(cluster, tmp_path):
    """Last: the cluster is smaller afterwards."""
    nodes, second = cluster
    log = tmp_path / "log"

    def lose_node() -> None:
        while len(set(pids(log))) < 2:
            time.sleep(0.05)
        nodes.remove_node(second, allow_graceful=False)

    loser = threading.Thread(target=lose_node)
    loser.start()
    table = run_stage_on_ray(TABLE, stage(Double(log, 0.5, company=2)), tmp_path / "ray", TWO)
    loser.join()
    exactly_once(table, tmp_path / "ray")
    assert len(pids(log)) >= 16  # the batch that was under way there was done again
