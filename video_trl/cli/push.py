"""
Upload an adapter, with its model card and sample videos, to the Hub. Checkpoints stay at home.

Examples:

  video-trl push out/phygdpo my-name/wan-phygdpo --private
  video-trl push out/phygdpo my-name/wan-phygdpo --message "Second run"

The token is that of `hf auth login`, or HF_TOKEN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .frame import UsageError, parse, say


@dataclass
class PushArguments:
    """How it is uploaded."""

    private: bool | None = field(
        default=None, metadata={"help": "Visibility of a new repository. Unset: the account's default."}
    )
    message: str = field(default="Upload a video_trl adapter", metadata={"help": "Message of the commit."})


def run(argv: Sequence[str]) -> int:
    args, where = parse(
        "push", __doc__, [PushArguments], argv, positional="folder_and_repository",
        positional_help="Folder of the adapter, and repository id 'owner/name'.",
    )  # fmt: skip
    if len(where) != 2:
        raise UsageError(f"expected a folder and a repository id, got {' '.join(where)}.")
    from ..hub import push

    say(push(*where, private=args.private, commit_message=args.message).commit_url)
    return 0
