"""Long work takes no more memory, handles and threads at its end than at its beginning."""

import logging
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import TrainerCallback

from tests.support.tiny import tiny_mp4
from tests.support.trainer.runs import config, trainer
from video_trl.curation.clips.sources import list_clips
from video_trl.curation.engine.manifest import Shard
from video_trl.curation.gt_pair.pipeline import GTPairConfig, acquire


logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


class Gauge:
    """Memory in MB, open handles and threads, noted again and again."""

    def __init__(self) -> None:
        self.process, self.notes = psutil.Process(), []

    def note(self) -> None:
        memory = self.process.memory_info().rss / 1e6
        self.notes.append((memory, self.process.num_fds(), threading.active_count()))

    def growth(self) -> np.ndarray:
        """Of each, from the median of the second fifth to that of the last: the first fifth warms up."""
        notes = np.array(self.notes)
        fifth = len(notes) // 5
        return np.median(notes[-fifth:], axis=0) - np.median(notes[fifth : 2 * fifth], axis=0)

    def check(self, what: str, megabytes: float) -> None:
        memory, handles, threads = self.growth()
        logger.info(
            "%s: %+.1f MB, %+g handles, %+g threads over %d notes", what, memory, handles, threads, len(self.notes)
        )
        assert memory < megabytes and handles <= 0 and threads <= 0


def test_the_gauge_sees_what_grows(tmp_path):
    gauge, kept = Gauge(), []
    for number in range(20):
        kept += [np.ones(1_000_000), open(tmp_path / str(number), "w")]
        gauge.note()
    memory, handles, threads = gauge.growth()
    assert memory > 50 and handles > 5 and threads == 0


def test_two_thousand_steps(tmp_path):
    gauge = Gauge()

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step % 20 == 0:
                gauge.note()

    settings = {"max_steps": 2000, "save_strategy": "steps", "save_steps": 200, "save_total_limit": 2}
    made = trainer(config(tmp_path, **settings, logging_steps=50), callbacks=[Note()])
    made.train()
    gauge.check("2,000 steps", 30)


def test_five_thousand_clips(tmp_path):
    """Listed, hashed and opened, every one another file."""
    content, gauge = tiny_mp4(0), Gauge()
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(5000):
        # A box of a kind that no reader knows makes each file another one, and stays a whole mp4.
        (clips / f"{number:04d}.mp4").write_bytes(
            content + (12).to_bytes(4, "big") + b"free" + number.to_bytes(4, "big")
        )
        (clips / f"{number:04d}.txt").write_text("a ball falls")
    settings = GTPairConfig(sources=[str(clips)], output_dir=str(tmp_path / "out"))
    table = list_clips(settings.sources, spool=tmp_path / "out" / "sources")
    for start in range(0, 5000, 100):
        acquire(table.slice(start, 100), settings, Path(tmp_path / "out" / "stages"), Shard(), needs_prompt=True)
        gauge.note()
    gauge.check("5,000 clips", 60)
