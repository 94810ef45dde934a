"""Cache the scores of any judge on disk."""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ..files import fingerprint
from .base import Video, VideoJudge
from .frames import check_request


_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    judge TEXT NOT NULL, video TEXT NOT NULL, prompt TEXT NOT NULL, result TEXT NOT NULL,
    PRIMARY KEY (judge, video, prompt)
) WITHOUT ROWID
"""
_COLUMNS = ["judge", "video", "prompt", "result"]


class CachedJudge:
    """
    Wraps a judge so that a video and its sentence are scored once, whatever happens in between.

    Scores lie in an SQLite file under the judge's identity and the hashes of the video's content and of the prompt: a
    renamed file is found again, and another judge, other weights or another prompt template never answer. The judge
    is called for `chunk_size` videos at a time and each chunk is committed, so that a kill costs at most the call that
    was under way. Several processes on one machine may share a file; a network file system may not hold it. Videos
    without a score (`sa` or `pc` None) are not remembered.

    Args:
        judge: the judge to wrap.
        path: SQLite file; made where needed.
        chunk_size: videos in one call of the judge.

    Raises:
        ValueError: `chunk_size` below 1, or a file that is no score cache.
    """

    def __init__(self, judge: VideoJudge, path: str | os.PathLike[str], *, chunk_size: int = 16) -> None:
        if chunk_size < 1:
            raise ValueError(f"Expected `chunk_size` >= 1, got {chunk_size}.")
        self.judge, self.path, self.chunk_size = judge, Path(path), chunk_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns = [row[1] for row in database.execute("PRAGMA table_info(scores)")]
            if tables and (tables, columns) != (["scores"], _COLUMNS):
                raise ValueError(
                    f"{self.path} is the database of something else, with the tables {', '.join(tables)}, and is not "
                    "changed. Pass another path."
                )
            database.execute(_SCHEMA)

    @property
    def name(self) -> str:
        """The wrapped judge's name."""
        return self.judge.name

    @property
    def identity(self) -> str:
        """The wrapped judge's identity."""
        return self.judge.identity

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video, from the file where it is known; see `VideoJudge.score`.

        Returns:
            What the judge returned, after a way through JSON. Equal pairs are scored once.

        Raises:
            ValueError: a request that cannot be answered, or a cache file that is damaged.
            Exception: whatever the judge raises; what was scored before that stays.
        """
        from ..data.video_io import video_hash

        check_request(videos, prompts)
        identity = self.identity
        keys = [(video_hash(video), fingerprint(prompt)) for video, prompt in zip(videos, prompts, strict=True)]
        scores: dict[tuple[str, str], dict[str, Any]] = {}
        with self._open() as database:
            for video, prompt in dict.fromkeys(keys):
                row = database.execute(
                    "SELECT result FROM scores WHERE judge = ? AND video = ? AND prompt = ?", (identity, video, prompt)
                ).fetchone()
                if row:
                    scores[video, prompt] = json.loads(row[0])
        # The last index of each new key: equal pairs are asked for once.
        unknown = list({key: index for index, key in enumerate(keys) if key not in scores}.values())
        for start in range(0, len(unknown), self.chunk_size):
            chunk = unknown[start : start + self.chunk_size]
            results = self.judge.score([videos[i] for i in chunk], [prompts[i] for i in chunk])
            texts = [json.dumps(result) for result in results]
            scores |= {keys[i]: json.loads(text) for i, text in zip(chunk, texts, strict=True)}
            rows = [
                (identity, *keys[i], text)
                for i, result, text in zip(chunk, results, texts, strict=True)
                if result["sa"] is not None and result["pc"] is not None
            ]
            with self._open() as database:
                database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
        return [dict(scores[key]) for key in keys]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction of its own each time: nothing is held open while a judge works, nor across a fork."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise ValueError(
                f"{self.path}: cannot be used as a score cache ({error}). Pass another path, or move the file away if "
                "its scores can be computed again."
            ) from error
