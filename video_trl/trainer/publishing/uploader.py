"""
Upload weights, card and samples in the background; a failed upload never stops a run.

An upload works on a snapshot of the folder. When the Hub refuses or is away there is a warning, the files stay where
they are, and the next save tries again.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from ...hub import CARD_NAME, LORA_FILE_NAME, HubUploadError
from ...hub.lora import AVERAGE_FOLDER
from ...hub.upload import again, bytes_below, explained, is_refusal, upload
from ..base_config import VideoConfig
from ..checkpoints.weights import TRANSFORMER_FOLDER


logger = logging.getLogger(__name__)

# The underscore keeps a snapshot from being taken for a checkpoint.
_SNAPSHOT_PREFIX = "_upload-"
_LAST_CHECKPOINT = "last-checkpoint"
_WEIGHTS_AND_CARD = (LORA_FILE_NAME, CARD_NAME, TRANSFORMER_FOLDER, AVERAGE_FOLDER)
_SHOWN = ("samples", "runs")


def make_repository(args: VideoConfig, token: str | None = None, private: bool | None = None) -> str | None:
    """
    Make the repository of a run, where it is not there yet.

    Args:
        args (`VideoConfig`): Name the repository, by default after the run's folder, and its visibility.
        token (`str`, *optional*): Access token; by default that of `args`, or the one logged in with.
        private (`bool`, *optional*): Visibility of a new repository; by default that of `args`.

    Returns:
        `str`: Its full id; `None` if the Hub cannot be reached.

    Raises:
        ValueError: If the Hub refuses: a wrong token, or a name that the token may not write to.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    api = HfApi(token=token or args.hub_token)
    try:
        return explained(lambda: api.create_repo(name, private=private, exist_ok=True).repo_id, "")
    except HubUploadError as error:
        if is_refusal(error):
            raise ValueError(f"`push_to_hub` as {name!r}: {error} Or train without `push_to_hub`.") from error
        logger.warning(
            "%sTraining goes on; every save tries to upload to %r again, and everything stays in %s.",
            error,
            name,
            args.output_dir,
        )
        return None


class Uploader:
    """
    Uploads of a run. Without `push_to_hub` it does nothing until it is asked to.

    Args:
        args (`VideoConfig`): Output folder, repository, token and strategy.
        announce (`Callable`): Called before an upload: a tracker may upload curves of its own.

    Attributes:
        repository (`str`, *optional*): Id of the repository, once there is one.
    """

    def __init__(self, args: VideoConfig, announce: Callable[[], object]) -> None:
        self.args = args
        self.repository: str | None = None
        self._announce = announce
        self._is_open = False
        self._uploads: list[tuple[Future[CommitInfo], str]] = []

    def open(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository, on the main process and once; a Hub that is away is tried again by every upload.

        Raises:
            ValueError: If the Hub refuses.
        """
        if self._is_open or self.args.process_index != 0:
            return
        self._is_open = True
        for leftover in Path(self.args.output_dir).glob(f"{_SNAPSHOT_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.repository = make_repository(self.args, token, private)

    def announce(self) -> None:
        """Tell the trackers that an upload follows."""
        try:
            self._announce()
        except Exception as error:  # whatever that tracker raises, it is not worth a run
            logger.warning("A tracker could not upload its curves (%s: %s).", type(error).__name__, error)

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """Context in which an upload that fails is a warning: the files are saved."""
        try:
            yield
        except HubUploadError as error:
            logger.warning("%s", error)

    def upload(self, step: int, message: str, *, blocking: bool, **how: Any) -> CommitInfo | Future[CommitInfo]:
        """
        Upload weights, card, samples and curves from the output folder, after the uploads before it.

        Args:
            step (`int`): Optimizer steps done so far.
            message (`str`): Of the commit.
            blocking (`bool`): Whether to wait for the end.
            **how: `token`, `revision` and `private`, where they differ from those of the arguments.

        Raises:
            HubUploadError: If the Hub refuses or cannot be reached.
        """
        self.finish()
        output_dir = Path(self.args.output_dir)
        if blocking:
            return self._send(output_dir, message, output_dir, **how)
        return self._start(self._snapshot(output_dir, step, None), message, output_dir, **how)

    def upload_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` says; never an error."""
        if self.args.process_index != 0 or self.args.hub_strategy == HubStrategy.END:
            return
        self._report(finish=False)
        if self._uploads and not self.args.hub_always_push:
            logger.info("Step %d is not uploaded: the last upload is still going on.", step)
            return
        self.announce()
        whole = {HubStrategy.CHECKPOINT: _LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        try:
            snapshot = self._snapshot(checkpoint, step, whole.get(HubStrategy(self.args.hub_strategy)))
        except OSError as error:  # a full disk, for instance
            logger.warning("Step %d is not uploaded: %s", step, error)
            return
        self._start(snapshot, f"Training in progress, step {step}", checkpoint)

    def finish(self) -> None:
        """Wait for the uploads under way, and warn of those that failed."""
        self._report(finish=True)

    def _snapshot(self, source: Path, step: int, checkpoint_as: str | None) -> Path:
        """
        A folder with what is to be uploaded. Files are linked, not copied: they cost nothing, and stay what they are
        when the run goes on, writes the next ones and deletes old checkpoints.
        """
        output_dir = Path(self.args.output_dir)
        snapshot = output_dir / f"{_SNAPSHOT_PREFIX}{step}-{len(self._uploads)}"
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir(parents=True)
        parts = [source / name for name in _WEIGHTS_AND_CARD] + [output_dir / name for name in _SHOWN]
        for part in parts:
            if part.is_file():
                _link(part, snapshot / part.name)
            elif part.is_dir():
                shutil.copytree(part, snapshot / part.name, copy_function=_link)
        if checkpoint_as is not None:
            shutil.copytree(source, snapshot / checkpoint_as, copy_function=_link)
        return snapshot

    def _start(self, snapshot: Path, message: str, source: Path, **how: Any) -> Future[CommitInfo]:
        """Upload a snapshot in the background, after those before it, and delete it."""
        earlier = [future for future, _ in self._uploads]

        def run() -> CommitInfo:
            wait(earlier)  # the repository ends with the newest
            try:
                return self._send(snapshot, message, source, **how)
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)

        executor = ThreadPoolExecutor(1, thread_name_prefix="upload")
        future = executor.submit(run)
        executor.shutdown(wait=False)
        self._uploads.append((future, message))
        return future

    def _send(
        self,
        folder: Path,
        message: str,
        source: Path,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo:
        """Upload a folder that looks like `source`, which stays."""
        name = self.repository or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

        def send() -> CommitInfo:
            api = HfApi(token=token or self.args.hub_token)
            if self.repository is None:  # the Hub was away when training began
                visibility = self.args.hub_private_repo if private is None else private
                self.repository = api.create_repo(name, private=visibility, exist_ok=True).repo_id
            return upload(
                api,
                self.repository,
                folder,
                message,
                revision=revision or self.args.hub_revision,
                checkpoints=folder != source,
            )

        return explained(send, again(source, name), bytes_below(folder))

    def _report(self, *, finish: bool) -> None:
        """Say how the uploads that are done, or with `finish` all, have ended."""
        remaining = []
        for future, message in self._uploads:
            if not finish and not future.done():
                remaining.append((future, message))
                continue
            error = future.exception()
            if isinstance(error, HubUploadError):
                logger.warning("'%s' was not uploaded; training is not affected. %s", message, error)
            elif error is not None:  # whatever it is, it is no reason to end a run
                logger.warning("'%s' was not uploaded; training is not affected.", message, exc_info=error)
        self._uploads = remaining


def _link(source: str | Path, target: str | Path) -> None:
    # TensorBoard appends to its files, in place: those are copied, as is everything where links are not supported.
    if ".tfevents." in os.path.basename(source):
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
