"""The output folder of a run: which run it belongs to, who may write to it, and which checkpoints are that run's."""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ... import files
from ...hub.lora import AVERAGE_FOLDER, LORA_FILE_NAME
from .weights import DESCRIPTION_NAME, RUN_KEY, TRANSFORMER_FOLDER, remove_leftovers


logger = logging.getLogger(__name__)

RUN_NAME = "video_trl_output.json"
AUTO = "auto"
_LOCK_NAME = ".video_trl.lock"
_SECONDS_FOR_LOCK = 10.0  # a process that was killed may have children that hold its lock for some seconds more
_UNREADABLE = "?"  # stands for the run of a checkpoint that does not say
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_SAMPLES = re.compile(r"data|step_\d+")  # in `samples`: of the data, and what was made in a run


class RunFolder:
    """
    The output folder of a run.

    `video_trl_output.json` in it is written before anything else. It names the run, and the runs that it continues up
    to a step: whoever goes back to an earlier checkpoint starts a new line, and the checkpoints after it are none of
    the new line's. Each checkpoint says which run wrote it.

    Args:
        directory (`Path`): The folder; made where needed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        #: Runs, the present one last, with the last step that is a part of it; none: all steps.
        self.lineage: list[tuple[str | None, int | None]] = []

    @property
    def run(self) -> str | None:
        """Identity of the present run; none before it has begun."""
        return self.lineage[-1][0] if self.lineage else None

    @contextmanager
    def opened(self, resume: str | bool | None, *, overwrite: bool) -> Iterator[Path | None]:
        """
        Lock the folder, decide where the run starts, and write down whose folder it is.

        Args:
            resume (`str` or `bool`, *optional*): As of `train(resume_from_checkpoint=...)`.
            overwrite (`bool`): Whether what another run left is deleted when a new one starts.

        Yields:
            `Path` or `None`: Checkpoint to start from.

        Raises:
            ValueError: As [`check`], or another process is training into the folder.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        waiting = f"Another process has locked {self.directory}; waiting for {_SECONDS_FOR_LOCK:.0f} seconds."
        try:
            lock = files.lock(self.directory / _LOCK_NAME, seconds=_SECONDS_FOR_LOCK, waiting=waiting)
        except TimeoutError as error:
            raise ValueError(
                f"{self.directory} is in use: another process trains into it ({error}). Pass another `output_dir`, or "
                "end that process first."
            ) from error
        try:
            remove_leftovers(self.directory)
            checkpoint = self.check(resume, overwrite=overwrite)
            if overwrite and not self._contains(checkpoint):
                self._clear()
            self._begin(checkpoint)
            yield checkpoint
        finally:
            lock.release()

    def check(self, resume: str | bool | None, *, overwrite: bool = False) -> Path | None:
        """
        Where a run with these options starts. Changes nothing.

        Args:
            resume (`str` or `bool`, *optional*): A checkpoint's folder; `True` for the newest whole one of the run in
                this folder; `"auto"` for that one if there is any, else none; `False` or none for a new run.
            overwrite (`bool`): Whether what another run left may be deleted.

        Returns:
            `Path` or `None`: The checkpoint.

        Raises:
            ValueError: The folder holds another run; there is no checkpoint; or it is damaged or incomplete, with what
                is wrong and the one before it.
        """
        record = self._read()
        self.lineage = [] if record is None else [*map(tuple, record["continues"]), (record["run"], None)]
        own = self.checkpoints()
        if not resume or (resume == AUTO and not own):
            if not overwrite:
                self._refuse_another_run(record)
            return None
        if isinstance(resume, str | os.PathLike) and resume != AUTO:
            path = Path(resume)
            if (path / DESCRIPTION_NAME).is_file() and (reason := files.find_damage(path)) is not None:
                raise _damaged(path, reason, [each for each in own if each[0] < _step(path)])
            if not overwrite and not self._contains(path):
                self._refuse_another_run(record)
            return path
        if not own:
            listing = sorted(os.listdir(self.directory))[:10] if self.directory.is_dir() else "no such folder"
            raise ValueError(
                f"Expected a `checkpoint-<step>` folder in {self.directory} to resume from, got {listing}. Leave "
                "`resume_from_checkpoint` out to start a run, or name the folder of the checkpoint."
            )
        while (reason := files.find_damage(own[-1][1])) is not None:
            error = _damaged(own[-1][1], reason, own[:-1])
            if resume != AUTO or len(own) == 1:
                raise error
            logger.warning("%s", error)  # nobody is there to choose
            own.pop()
        return own[-1][1]

    def checkpoints(self, directory: Path | None = None) -> list[tuple[int, Path]]:
        """The checkpoints of this run in the folder, or in another one, with their steps, in order."""
        found = []
        for path in (directory or self.directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path.is_dir() and _CHECKPOINT.fullmatch(path.name):
                found.append((_step(path), path, _run_of(path)))
        found.sort()
        readable = [run for *_, run in found if run != _UNREADABLE]
        lineage = self.lineage or [(run, None) for run in readable[-1:]]  # a folder of an older version
        return [
            (step, path)
            for step, path, run in found
            # One that cannot be read is taken for the run's own, for its damage is to be named.
            if any(run in (name, _UNREADABLE) and (last is None or step <= last) for name, last in lineage)
        ]

    def rotate(self, directory: Path, limit: int | None, best: str | None) -> None:
        """
        Delete the oldest checkpoints of this run, by step; never the newest, nor the best.

        Args:
            directory (`Path`): Where they are.
            limit (`int`, *optional*): How many stay; all where it is none or 0.
            best (`str`, *optional*): Folder of the best one.
        """
        paths = [path for _, path in self.checkpoints(directory)]
        kept = {path.resolve() for path in paths[-1:]} | ({Path(best).resolve()} if best else set())
        superfluous = len(paths) - max(limit or len(paths), sum(path.resolve() in kept for path in paths))
        for path in [path for path in paths if path.resolve() not in kept][: max(superfluous, 0)]:
            files.remove_folder(path)

    def _begin(self, checkpoint: Path | None) -> None:
        """Decide which run it is that starts there, and write it down."""
        own = [path.resolve() for _, path in self.checkpoints()]
        if checkpoint is not None and self.lineage and own[-1:] == [checkpoint.resolve()]:
            return  # the run that is written down goes on
        ancestors: list[tuple[str | None, int | None]] = []
        if checkpoint is not None:
            step = _step(checkpoint)
            ancestors = [(_run_of(checkpoint), step)]
            if self.lineage and checkpoint.resolve() in own:
                ancestors = [(run, step if last is None else min(last, step)) for run, last in self.lineage]
        self.lineage = [*ancestors, (secrets.token_hex(8), None)]
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"run": self.run, "continues": ancestors, "started": started}
        files.write_json(self.directory / RUN_NAME, record, indent=1)

    def _contains(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and checkpoint.resolve().parent == self.directory.resolve()

    def _read(self) -> dict[str, Any] | None:
        path = self.directory / RUN_NAME
        return files.read_json(path) if path.is_file() else None

    def _left(self) -> list[Path]:
        """What a run leaves in its folder: checkpoints of any run, and weights."""
        checkpoints = (path for path in self.directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
        found = [path for path in checkpoints if _CHECKPOINT.fullmatch(path.name)]
        weights = [self.directory / name for name in (AVERAGE_FOLDER, LORA_FILE_NAME, TRANSFORMER_FOLDER)]
        return sorted(found, key=_step) + [path for path in weights if path.exists()]

    def _refuse_another_run(self, record: dict[str, Any] | None) -> None:
        left = self._left()
        if left:
            started = "" if record is None else f", which was started at {record['started']}"
            raise ValueError(
                f"{self.directory} holds another run ({left[-1].name}){started}; a new one would mix its files with "
                "that one's. Pass another `output_dir`; or `resume_from_checkpoint=True` to continue that run "
                f"('{AUTO}' where one command starts and continues it); or `overwrite_output_dir=True` to delete it."
            )

    def _clear(self) -> None:
        """Delete what runs have left; nothing else in the folder."""
        for path in self.directory.glob("samples/*"):  # a card would show them as this run's, and an upload take them
            if _SAMPLES.fullmatch(path.name) and path.is_dir():
                files.remove_folder(path)
        (self.directory / "emissions.csv").unlink(missing_ok=True)  # CodeCarbon's; the card would add its energy up
        for path in self._left():
            if path.is_file():
                path.unlink()
            elif path.name == TRANSFORMER_FOLDER or (path / DESCRIPTION_NAME).is_file():
                files.remove_folder(path)


def _step(checkpoint: Path) -> int:
    """Step in the name of a checkpoint's folder; 0 for one with another name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return 0 if match is None else int(match[1])


def _run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; none for one that an older version wrote."""
    try:
        return files.read_json(checkpoint / DESCRIPTION_NAME).get(RUN_KEY)
    except ValueError:
        return _UNREADABLE


def _damaged(path: Path, reason: str, earlier: list[tuple[int, Path]]) -> ValueError:
    whole = next((before for _, before in reversed(earlier) if files.find_damage(before) is None), None)
    way_out = (
        "There is no whole checkpoint before it: start anew in another folder."
        if whole is None
        else f"The one before it is whole: pass `resume_from_checkpoint='{whole}'` to go on from there."
    )
    return ValueError(f"{path} is damaged: {reason} {way_out}")
