import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from tests.support.paths import PYTHONPATH
from video_trl import files
from video_trl.curation.engine import journal
from video_trl.curation.engine.manifest import (
    OUTCOME,
    Rule,
    Shard,
    Stage,
    apply_rules,
    apply_rules_to_table,
    drop_repeats,
    first_dropped,
    kept_rows,
    new_manifest,
    run_stage,
    summarize,
)


def table_of(**columns):
    """A manifest with the columns given: numbers as float64, texts as strings."""
    count = len(next(iter(columns.values())))
    columns = {"source_id": [f"clip {row}" for row in range(count)], **columns}
    text = {name: any(isinstance(value, str) for value in values) for name, values in columns.items()}
    return new_manifest(columns, {name: pa.string() if text[name] else pa.float64() for name in columns})


def squares(batch):
    return {"square": [float(value) ** 2 for value in batch["x"]]}


def stage_of(function=squares, **options):
    return Stage("squares", function, {"square": pa.float64()}, "source_id", **options)


# ---- rules -------------------------------------------------------------------------------------------------------


def test_a_rule_keeps_its_limits_and_drops_everything_outside_or_unknown():
    table = table_of(x=[0.9, 1.0, 2.0, 2.1, None, float("nan"), 1.5])
    judged = apply_rules_to_table(table, [Rule("range", "x", 1.0, 2.0)])
    assert judged["dropped_by"].to_pylist() == ["range", None, None, "range", "range", "range", None]
    assert judged["value"].to_pylist() == [0.9, None, None, 2.1, None, None, None]
    assert judged["limit"].to_pylist() == [1.0, None, None, 2.0, 1.0, 1.0, None]


def test_the_first_broken_rule_names_the_row_and_an_older_verdict_stays():
    table = table_of(x=[0.0, 0.0, 5.0], y=[0.0, 9.0, 9.0])
    first = apply_rules_to_table(table, [Rule("small x", "x", 1), Rule("small y", "y", 1)])
    assert first["dropped_by"].to_pylist() == ["small x", "small x", None]
    second = apply_rules_to_table(first, [Rule("large y", "y", maximum=1)])
    assert second["dropped_by"].to_pylist() == ["small x", "small x", "large y"]


def test_rules_are_a_batch_function_for_datasets():
    rows = datasets.Dataset.from_dict({"x": [0.0, 3.0], **{name: [None, None] for name in OUTCOME}})
    rules = [Rule("small", "x", 1.0)]
    mapped = rows.map(apply_rules, batched=True, fn_kwargs={"rules": rules})
    assert mapped["dropped_by"][:] == ["small", None] and mapped["x"][:] == [0.0, 3.0]


def test_of_equal_values_the_best_ranked_and_then_the_first_stays():
    table = table_of(content=["a", "b", "a", "a", "b"])
    kept = drop_repeats(table, "content", name="repeated", rank=[1, 0, 0, 0, 0])
    assert kept["dropped_by"].to_pylist() == ["repeated", None, None, "repeated", "repeated"]
    assert kept["detail"].to_pylist()[0] == "same as clip 2" and kept["detail"].to_pylist()[4] == "same as clip 1"


def test_the_account_adds_up_and_names_every_rule():
    table = apply_rules_to_table(
        table_of(x=[0.0, 0.0, 5.0, 50.0]), [Rule("small", "x", 1), Rule("large", "x", maximum=10)]
    )
    assert summarize(table) == "4 clips in = 1 kept + 2 small + 1 large"
    assert summarize(table.slice(0, 1)) == "1 clip in = 0 kept + 1 small"
    assert len(kept_rows(table)) == 1
    assert first_dropped(table) == ["small: clip 0, 0, the limit is 1", "large: clip 3, 50, the limit is 10"]


# ---- stages ------------------------------------------------------------------------------------------------------


def test_a_stage_fills_in_what_is_there_and_leaves_dropped_rows_alone(tmp_path):
    table = apply_rules_to_table(table_of(x=[1.0, 2.0, 3.0]), [Rule("two", "x", maximum=2.5)])
    done = run_stage(table, stage_of(), tmp_path)
    assert done["square"].to_pylist() == [1.0, 4.0, None]
    assert done["dropped_by"].to_pylist() == [None, None, "two"]
    assert done["source_id"].equals(table["source_id"])


def test_a_stage_can_drop_rows_with_value_and_words(tmp_path):
    def odd(batch):
        bad = [value % 2 == 1 for value in batch["x"]]
        return {
            **squares(batch),
            "dropped_by": ["odd" if b else None for b in bad],
            "detail": ["not even" if b else None for b in bad],
        }

    done = run_stage(table_of(x=[1.0, 2.0]), stage_of(odd), tmp_path)
    assert done["dropped_by"].to_pylist() == ["odd", None] and done["detail"].to_pylist() == ["not even", None]


def test_what_is_committed_is_never_computed_again_whatever_interrupts(tmp_path):
    seen = []

    def fragile(batch):
        if len(seen) == 4 and batch["source_id"][0] not in seen:
            raise OSError("disk full")
        seen.extend(batch["source_id"])
        return squares(batch)

    table = table_of(x=[float(x) for x in range(7)])
    with pytest.raises(OSError, match="disk full"):
        run_stage(table, stage_of(fragile, batch_size=2), tmp_path)
    first = list(seen)
    seen.append("the run goes on")
    done = run_stage(table, stage_of(fragile, batch_size=3), tmp_path)
    assert done["square"].to_pylist() == [float(x * x) for x in range(7)]
    assert first + seen[5:] == table["source_id"].to_pylist()  # every row once, in two runs of other batch sizes


def test_what_had_no_answer_is_asked_again_by_the_next_launch(tmp_path):
    """And nothing else: neither what was answered beside it, nor what was dropped for good."""
    asked, silent = [], {"clip 1", "clip 2"}

    def ask(batch):
        asked.append(batch["source_id"])
        reasons = ["no_answer" if name in silent else "odd" if name == "clip 3" else None for name in asked[-1]]
        return {**squares(batch), "dropped_by": reasons}

    def run(shard=None):
        stage = stage_of(ask, batch_size=2, again=("no_answer",))
        return run_stage(table_of(x=[0.0, 1.0, 2.0, 3.0]), stage, tmp_path, shard)["dropped_by"].to_pylist()

    assert run() == [None, "no_answer", "no_answer", "odd"] and len(asked) == 2
    silent.remove("clip 2")
    assert run() == [None, "no_answer", None, "odd"] and asked[2:] == [["clip 1", "clip 2"]]
    assert run() == [None, "no_answer", None, "odd"] and asked[3:] == [["clip 1"]]
    silent.clear()
    assert run(Shard(0, 2))[1] == "no_answer" and len(asked) == 4  # of several processes each must see the same
    assert run() == [None, None, None, "odd"] and asked[4:] == [["clip 1"]]
    assert run() == [None, None, None, "odd"] and len(asked) == 5


def test_new_rows_are_added_and_other_settings_start_afresh(tmp_path):
    seen = []

    def counted(batch):
        seen.extend(batch["x"])
        return squares(batch)

    run_stage(table_of(x=[1.0, 2.0]), stage_of(counted), tmp_path)
    grown = run_stage(table_of(x=[1.0, 2.0, 3.0]), stage_of(counted), tmp_path)
    assert seen == [1.0, 2.0, 3.0] and grown["square"].to_pylist() == [1.0, 4.0, 9.0]
    run_stage(table_of(x=[1.0]), stage_of(counted, settings={"version": 2}), tmp_path)
    assert seen == [1.0, 2.0, 3.0, 1.0]


def test_a_half_written_part_is_no_part(tmp_path):
    table = table_of(x=[1.0, 2.0])
    store = tmp_path / stage_of().folder
    run_stage(table, stage_of(), tmp_path)
    (whole,) = store.glob("part-*")
    whole.rename(store / f".{whole.name}.123")  # as a kill between writing and renaming leaves it
    assert run_stage(table, stage_of(), tmp_path)["square"].to_pylist() == [1.0, 4.0]


def test_keys_that_repeat_are_a_fault_of_the_caller(tmp_path):
    table = table_of(x=[1.0, 2.0], name=["a", "a"])
    stage = Stage("squares", squares, {"square": pa.float64()}, "name")
    with pytest.raises(AssertionError, match="`name` must be unique"):
        run_stage(table, stage, tmp_path)


class Decoder:
    """Squares numbers, and dies over some of them, as a decoder may; a file in `folder` stands for the other cause."""

    def __init__(self, folder, deadly, how=signal.SIGKILL):
        self.folder, self.deadly, self.how = folder, deadly, how

    def __call__(self, batch):
        if self.deadly in batch["x"]:
            faulthandler.disable()  # no need to print where
            os.kill(os.getpid(), self.how)
        if (self.folder / "power cut").exists():
            (self.folder / "power cut").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return squares(batch)


def run_and_die(table, stage, folder):
    """The signal that ended a run."""
    process = multiprocessing.get_context("fork").Process(target=run_stage, args=(table, stage, folder))
    process.start()
    process.join(60)
    return -process.exitcode


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV], ids=lambda how: how.name)
def test_a_row_that_kills_the_process_ends_one_run_and_is_named_by_the_next(tmp_path, how):
    table = table_of(x=[float(x) for x in range(7)])
    function = Decoder(tmp_path, 4.0, how)
    stage = stage_of(function, batch_size=3, trial=function)
    assert run_and_die(table, stage, tmp_path) == how
    done = run_stage(table, stage, tmp_path)
    assert done["dropped_by"].to_pylist() == [None] * 4 + ["crashed"] + [None] * 2
    assert how.name in done["detail"][4].as_py() and done["square"].to_pylist() == [0, 1, 4, 9, None, 25, 36]
    assert not list(tmp_path.rglob("computing-*"))
    assert run_stage(table, stage, tmp_path).equals(done)


def test_a_kill_from_outside_costs_no_row(tmp_path):
    table = table_of(x=[float(x) for x in range(5)])
    stage = stage_of(Decoder(tmp_path, None), batch_size=2, trial=squares)
    for _ in range(3):  # in the first run over two rows, then over one of them
        (tmp_path / "power cut").touch()
        assert run_and_die(table, stage, tmp_path) == signal.SIGKILL
    done = run_stage(table, stage, tmp_path)
    assert done["dropped_by"].to_pylist() == [None] * 5 and done["square"].to_pylist() == [0, 1, 4, 9, 16]


def test_a_row_that_kills_only_the_real_process_is_not_tried_for_ever(tmp_path):
    table = table_of(x=[0.0, 1.0, 2.0])
    stage = stage_of(Decoder(tmp_path, 1.0), trial=squares)
    assert [run_and_die(table, stage, tmp_path) for _ in range(6)] == [signal.SIGKILL] * 6
    assert run_stage(table, stage, tmp_path)["dropped_by"].to_pylist() == [None, "crashed", None]


def test_an_exception_leaves_no_suspicion(tmp_path):
    def failing(batch):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_stage(table_of(x=[1.0]), stage_of(failing, trial=failing), tmp_path)
    assert not list(tmp_path.rglob("computing-*"))


def test_a_trial_ends_by_itself_and_what_it_raises_kills_nobody():
    assert journal.death_of(lambda: time.sleep(60), seconds=0.1) is None
    assert journal.death_of(lambda: 1 / 0) is None
    assert journal.death_of(lambda: os._exit(7)) == "ended with exit code 7"


def test_processes_share_the_rows_and_all_get_the_whole_result(tmp_path):
    """Two real processes, with nothing between them but the disk."""
    script = textwrap.dedent(
        """
        import os, sys
        import pyarrow as pa
        from video_trl.curation.engine.manifest import Stage, new_manifest, run_stage

        def squares(batch):
            with open(f"{sys.argv[1]}/rows-{os.environ['RANK']}", "a") as file:
                file.writelines(name + "\\n" for name in batch["source_id"])
            return {"square": [float(name) ** 2 for name in batch["source_id"]]}

        table = new_manifest({"source_id": [str(row) for row in range(11)]}, {"source_id": pa.string()})
        stage = Stage("squares", squares, {"square": pa.float64()}, "source_id", batch_size=2)
        done = run_stage(table, stage, sys.argv[1])
        assert done["square"].to_pylist() == [float(row * row) for row in range(11)]
        """
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": PYTHONPATH},
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    shares = [(tmp_path / f"rows-{rank}").read_text().splitlines() for rank in range(2)]
    assert shares == [[str(row) for row in range(rank, 11, 2)] for rank in range(2)]
    parts = [pq.read_table(part) for part in (tmp_path / stage_of().folder).glob("part-*")]
    committed = [name for part in parts for name in part["source_id"].to_pylist()]
    assert sorted(committed) == sorted(shares[0] + shares[1])


def test_each_file_of_a_store_is_read_once(tmp_path, monkeypatch):
    table = table_of(x=[float(row) for row in range(7)])
    first = run_stage(table.slice(0, 4), stage_of(batch_size=1), tmp_path)
    read, names = pq.read_table, []
    monkeypatch.setattr(pq, "read_table", lambda path, **options: names.append(path.name) or read(path, **options))
    whole = run_stage(table, stage_of(batch_size=1), tmp_path)
    assert len(names) == len(set(names)) == 7
    assert whole["square"].to_pylist() == [float(row**2) for row in range(7)]
    assert whole.slice(0, 4)["square"].to_pylist() == first["square"].to_pylist()


def test_a_process_that_is_not_there_or_has_died_is_told_and_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_SECONDS_TO_WARN", 0.0)
    monkeypatch.setattr(files, "_SECONDS_TO_WAIT", 0.1)
    table = table_of(x=[0.0, 1.0, 2.0, 3.0, 4.0])
    words = r"RANK=0 of WORLD_SIZE=2, waits .* \(RANK 1\)\. .* unset RANK and WORLD_SIZE"
    with pytest.raises(RuntimeError, match=words):
        run_stage(table, stage_of(), tmp_path, Shard(0, 2))
    assert "Giving up in" in caplog.text
    with FileLock(tmp_path / ".process-1.lock"):  # it lives: no limit to how long it may take
        absence = files.Absence(tmp_path, 0, 2)
        for _ in range(5):
            time.sleep(0.1)
            absence.check([0, 1])
    assert run_stage(table, stage_of(), tmp_path, Shard())["square"].to_pylist() == [0, 1, 4, 9, 16]


def test_shard_comes_from_the_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.from_environment() == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.from_environment() == Shard(2, 3)
    with pytest.raises(ValueError, match=r"index in \[0, 2\), got 2"):
        Shard(2, 2)
