"""
Uploads of a training: what `transformers.Trainer` sends of its own models, sent for a video transformer.

An upload works on a snapshot of the folder and runs beside the training, which it can neither stop nor slow down: when
the Hub refuses or is away there is a warning, the files stay where they are, and the next save tries again.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy, TrainOutput

from ...data.columns import MapDataset
from ...hub import CARD_NAME, LORA_FILE_NAME, HubUploadError, Measurement
from ...hub.upload import again, explained, is_refusal, upload
from ..base_config import VideoConfig
from ..checkpoints.checkpointer import _SavingTrainer
from ..checkpoints.weights import TRANSFORMER_FOLDER, find_checkpoint
from .run_card import ModelCardCallback, TrainingData


logger = logging.getLogger(__name__)

# The underscore keeps a snapshot from being taken for a checkpoint.
_SNAPSHOT_PREFIX = "_upload-"
_LAST_CHECKPOINT = "last-checkpoint"
_WEIGHTS_AND_CARD = (LORA_FILE_NAME, CARD_NAME, TRANSFORMER_FOLDER)
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


class _SharingTrainer(_SavingTrainer):
    """
    Trainer whose uploads hold weights, their card and videos, and never end a training.

    Attributes:
        hub_model_id (`str`, *optional*): The repository, once there is one.
    """

    hub_model_id: str | None = None
    _card: ModelCardCallback

    # ---- The card ----

    def begin_sharing(self, dataset: MapDataset) -> None:
        """
        Make the repository, and look at the rows for the card, before they are encoded.

        Raises:
            ValueError: If there is to be a repository and the Hub refuses.
        """
        if self.args.push_to_hub:
            self.init_hf_repo()
        self._card = ModelCardCallback(TrainingData(dataset))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        checkpoint = find_checkpoint(resume_from_checkpoint, Path(self.args.output_dir))
        if checkpoint is not None:
            self._card.restore(Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        license: str | None = None,
        evaluation: Sequence[Measurement] | None = None,
    ) -> None:
        """
        Write the model card into `output_dir`. [`~transformers.Trainer.push_to_hub`] hands its keyword arguments here.

        Args:
            model_name (`str`, *optional*): Title of the card while the repository is not known.
            dataset_name (`str`, *optional*): What was trained on; by default the repository that a dataset came from.
            license (`str`, *optional*): Licence identifier, such as `"apache-2.0"`; by default that of the base model.
            evaluation (list of [`~video_trl.hub.Measurement`], *optional*): Results; by default the last evaluation's.
        """
        if self.is_world_process_zero():
            self._card.write(
                Path(self.args.output_dir),
                model_name=model_name,
                dataset_name=dataset_name,
                license=license,
                evaluation=evaluation,
            )

    def _write_card(self, directory: Path) -> None:
        self._card.write(directory)

    # ---- What Trainer calls ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `transformers.Trainer`, but once, and a Hub that is away is tried again later."""
        if "_repository" not in self.__dict__:
            self._uploads: list[tuple[Future[CommitInfo], str]] = []
            self._repository: str | None = None
            if self.is_world_process_zero():
                for leftover in Path(self.args.output_dir).glob(f"{_SNAPSHOT_PREFIX}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                self._repository = make_repository(self.args, token, private)
        self.hub_model_id = self._repository

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`; a failed upload is a warning, for the files are saved."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            except HubUploadError as error:
                logger.warning("%s", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Upload weights, model card, sample videos and TensorBoard's curves. Nothing else of `output_dir` is sent.

        Args:
            commit_message (`str`, defaults to `"End of training"`): Message of the commit.
            blocking (`bool`, defaults to `True`): Whether to wait for the end.
            token (`str`, *optional*): Access token; by default that of the arguments, or the one logged in with.
            revision (`str`, *optional*): Branch; by default that of the arguments.
            private (`bool`, *optional*): Visibility of a new repository.
            **kwargs: Passed on to `create_model_card`.

        Returns:
            `CommitInfo`, or a `Future` of one where not `blocking`; `None` on all processes but the first.

        Raises:
            HubUploadError: If the Hub refuses or cannot be reached. Everything is in `output_dir` then, and the
                message says how to upload it later.
        """
        self._announce()
        super().save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        output_dir = Path(self.args.output_dir)
        how: dict[str, Any] = {"token": token, "revision": revision, "private": private}
        if blocking:
            return self._send(output_dir, commit_message or "Model save", output_dir, **how)
        return self._start(self._snapshot(output_dir, None), commit_message or "Model save", output_dir, **how)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._report(finish=False)
        if self._uploads and not self.args.hub_always_push:
            logger.info("Step %d is not uploaded: the last upload is still going on.", self.state.global_step)
            return
        self._announce()
        checkpoint = Path(checkpoint_folder)
        whole = {HubStrategy.CHECKPOINT: _LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        try:
            snapshot = self._snapshot(checkpoint, whole.get(HubStrategy(self.args.hub_strategy)))
        except OSError as error:  # a full disk, for instance
            logger.warning("Step %d is not uploaded: %s", self.state.global_step, error)
            return
        self._start(snapshot, f"Training in progress, step {self.state.global_step}", checkpoint)

    def _finish_current_push(self) -> None:
        self._report(finish=True)

    # ---- How ----

    def _snapshot(self, source: Path, checkpoint_as: str | None) -> Path:
        """
        A folder with what is to be uploaded. Files are linked, not copied: they cost nothing, and stay what they are
        when the training goes on, writes the next ones and deletes old checkpoints.
        """
        output_dir = Path(self.args.output_dir)
        snapshot = output_dir / f"{_SNAPSHOT_PREFIX}{self.state.global_step}-{len(self._uploads)}"
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
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

        def send() -> CommitInfo:
            api = HfApi(token=token or self.args.hub_token)
            if self.hub_model_id is None:  # the Hub was away when training began
                visibility = self.args.hub_private_repo if private is None else private
                self.hub_model_id = api.create_repo(name, private=visibility, exist_ok=True).repo_id
            return upload(
                api,
                self.hub_model_id,
                folder,
                message,
                revision=revision or self.args.hub_revision,
                checkpoints=folder != source,
            )

        return explained(send, again(source, name))

    def _announce(self) -> None:
        """Tell the callbacks, of which a tracker may upload curves of its own."""
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # whatever that tracker raises, it is not worth a training
            logger.warning("A tracker could not upload its curves (%s: %s).", type(error).__name__, error)

    def _report(self, *, finish: bool) -> None:
        """Say how the uploads that are done, or with `finish` all, have ended."""
        left = []
        for future, message in self.__dict__.get("_uploads", []):
            if not finish and not future.done():
                left.append((future, message))
                continue
            error = future.exception()
            if isinstance(error, HubUploadError):
                logger.warning("'%s' was not uploaded; training is not affected. %s", message, error)
            elif error is not None:  # whatever it is, it is no reason to end a training
                logger.warning("'%s' was not uploaded; training is not affected.", message, exc_info=error)
        self._uploads = left


def _link(source: str | Path, target: str | Path) -> None:
    # TensorBoard appends to its files, in place: those are copied, as is everything where links are not supported.
    if ".tfevents." in os.path.basename(source):
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
