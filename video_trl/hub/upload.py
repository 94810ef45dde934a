"""Upload a run to the Hub: which files are published, and clear errors when an upload fails."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one since Python 3.11
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter of its client, httpx or httpx2
from huggingface_hub.utils import validate_repo_id

from ..files import PARTIAL_PATTERN
from ..load import SANDBOX
from .card import CARD_NAME, is_repo_id
from .lora import AVERAGE_FOLDER, LORA_FILE_NAME


logger = logging.getLogger(__name__)

T = TypeVar("T")

# What leaves a machine, and nothing else: a run's folder also holds checkpoints, arguments, encoded data, and whatever
# else its owner keeps there.
PUBLISHED = (
    CARD_NAME, LORA_FILE_NAME, "transformer/*", "samples/*", "comfyui/*", "runs/*",
    f"{AVERAGE_FOLDER}/{LORA_FILE_NAME}", f"{AVERAGE_FOLDER}/transformer/*",
)  # fmt: skip
CHECKPOINTS = ("last-checkpoint/*", "checkpoint-*")
# Of the videos made during training, those of other steps than the ones that are uploaded.
OUTDATED = "samples/step_*"
# Answers that will be the same tomorrow: a person has to do something. All others may pass.
REFUSALS = (400, 401, 403, 404, 410, 413)
# What the Hub may take: so many seconds for its answers, and for the files at so many bytes a second.
_SECONDS, _BYTES_PER_SECOND = 180.0, 100_000
_CONFLICT_WAITS = (1.0, 4.0, 16.0)  # seconds; another commit was being made at the same time


class HubUploadError(OSError):
    """An upload failed; the message says why, that nothing is lost, and how to do it again."""


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload with video_trl",
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Upload trained weights, their card and sample videos to the Hub; the repository is made where needed.

    Everything else in the folder stays at home: checkpoints, arguments, logs and data. A second push replaces what
    changed and sends nothing twice.

    Args:
        folder (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors`, or with a `transformer` folder, and
            as a rule a `README.md`; that of a run or of one checkpoint.
        repo_id (`str`): Repository, `"user/name"`.
        private (`bool`, *optional*): Visibility of a new repository; the account's default.
        commit_message (`str`, *optional*): Message of the commit.
        revision (`str`, *optional*): Branch; by default the main one.
        token (`str`, *optional*): Access token; the one logged in with.

    Returns:
        `huggingface_hub.CommitInfo`: The commit, with its URL.

    Raises:
        ValueError: There are no weights in the folder, or the id is none. Raised before anything is sent.
        HubUploadError: The Hub refused, for instance because the token may not write, or cannot be reached.
    """
    folder = Path(folder)
    if not (folder / LORA_FILE_NAME).is_file() and not (folder / "transformer" / "config.json").is_file():
        raise ValueError(
            f"Nothing to push: {folder} has no {LORA_FILE_NAME} and no transformer/config.json. Save the adapter with "
            "`save_lora`, or the trainer's with `trainer.save_model()`, first."
        )
    check_repo_id(repo_id)

    def send() -> CommitInfo:
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return upload(api, repository, folder, commit_message, revision=revision)

    return explained(send, again(folder, repo_id), bytes_below(folder))


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if a name can be no repository on the Hub."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"Expected a repository on the Hub as 'user/name', of at most 96 letters, digits, '-', '_' and '.' each, "
            f"got {repo_id!r}."
        ) from error


def upload(
    api: HfApi,
    repo_id: str,
    folder: Path,
    commit_message: str,
    *,
    revision: str | None = None,
    checkpoints: bool = False,
) -> CommitInfo:
    """Upload what `PUBLISHED` names, and on request the folder's checkpoints, as one commit of a repository."""
    steps = [path for path in folder.glob(OUTDATED) if path.is_dir()]
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    current = {path for path in steps if f"samples/{path.name}/" in text} or set(sorted(steps, key=_step)[-1:])
    current |= set(sorted(steps, key=_step)[:1])  # the model before training, beside what it is now
    dropped = [f"samples/{path.name}/*" for path in steps if path not in current]
    return without_conflict(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            allow_patterns=[*PUBLISHED, *(CHECKPOINTS if checkpoints else ())],
            ignore_patterns=[*dropped, PARTIAL_PATTERN],  # what a callback is writing meanwhile
            delete_patterns=f"{OUTDATED}/*",
            revision=revision,
        )
    )


def without_conflict(send: Callable[[], T], waits: Sequence[float] = _CONFLICT_WAITS) -> T:
    """The result of an upload, tried again while the Hub answers 409: someone else's commit came first."""
    for wait in waits:
        try:
            return send()
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            logger.info("The Hub is busy with another commit; trying again in %g s.", wait)
            time.sleep(wait)
    return send()


def explained(send: Callable[[], T], way_out: str, num_bytes: int = 0) -> T:
    """
    The result of an upload, its errors in words.

    Args:
        send (`Callable`): Does the upload.
        way_out (`str`): What can be done later, appended to the message.
        num_bytes (`int`, defaults to `0`): Size of what is sent.

    Raises:
        HubUploadError: For every error of the Hub or of the connection to it, and where it has not ended after three
            minutes and as long as the files take at 100 kB a second.
    """
    try:
        return within(_SECONDS + num_bytes / _BYTES_PER_SECOND, send)
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
        raise HubUploadError(f"{reason(error)} {way_out}") from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """
    The result of a call of the Hub, whose client waits for an answer without end.

    Raises:
        TimeoutError: After so many seconds. The call goes on in a thread that nobody waits for.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        return result.result(seconds)
    except (TimeoutError, FutureTimeoutError) as error:
        raise error if result.done() else TimeoutError(f"no answer within {seconds:.0f} s") from None


def bytes_below(folder: Path) -> int:
    """Size of what is in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # temporary files go meanwhile
            total += path.stat().st_size
    return total


def again(folder: Path, repo_id: str) -> str:
    """How to upload a folder later."""
    return f"Everything is in {folder}; `video-trl push {folder} {repo_id}` uploads it later."


def reason(error: Exception) -> str:
    """Why an upload failed, for a person. Holds no token: neither requests nor their headers are shown."""
    answer = _answer(error)
    if answer is None:
        away = isinstance(error, HTTPError | ConnectionError | TimeoutError)
        what = "The Hub cannot be reached" if away else "The upload failed"
        return f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
    status = answer.response.status_code
    causes = {
        401: "the Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN",
        403: "the token may not write there. Make one with the role 'write', or name a repository of your own",
        404: "there is no such repository, or the token may not see it",
        409: "another commit was being made at the same time",
        413: "the files are larger than the account allows",
        429: "too many requests; the limit passes in minutes",
    }
    lines = (answer.server_message or "").strip().splitlines()
    what = causes.get(status, "the Hub has a problem" if status >= 500 else "the Hub refused")
    return f"Upload failed with {status}: {what}{f' ({lines[0]})' if lines else ''}."


def is_refusal(error: HubUploadError) -> bool:
    """Whether the Hub said no, so that trying again is of no use; else it was only not there."""
    answer = _answer(error)
    return answer is not None and answer.response.status_code in REFUSALS


def inherited_license(
    base_model: str, revision: str | None = None, *, ask_hub: bool = True, token: str | None = None
) -> dict[str, str]:
    """
    Licence of a base model, which an adapter of it has to keep to: the entries of its card's front matter.

    Args:
        base_model (`str`): Repository id, folder, or `"sandbox"`.
        revision (`str`, *optional*): Revision of the repository.
        ask_hub (`bool`, defaults to `True`): Whether the Hub may be asked.
        token (`str`, *optional*): Access token; the one logged in with.

    Returns:
        `dict[str, str]`: `license` and, where given, `license_name` and `license_link`; empty where not known.
    """
    if base_model == SANDBOX:
        return {"license": "apache-2.0"}
    data = None
    if (Path(base_model) / CARD_NAME).is_file():
        data = ModelCard.load(Path(base_model) / CARD_NAME, ignore_metadata_errors=True).data
    elif ask_hub and is_repo_id(base_model):
        try:
            api = HfApi(token=token)
            data = within(30.0, lambda: api.model_info(base_model, revision=revision, timeout=10)).card_data
        except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError) as error:
            logger.warning("The licence of %s is not known: %s", base_model, reason(error))
    entries = {} if data is None else data.to_dict()
    return {name: str(entries[name]) for name in ("license", "license_name", "license_link") if entries.get(name)}


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """What the Hub answered, where that is behind an error: uploads of large files wrap it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause


def _step(path: Path) -> int:
    digits = path.name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0
