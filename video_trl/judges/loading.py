"""A judge by name."""

import os
from pathlib import Path
from typing import Any

from . import VideoJudge
from .weights import read_config, resolve_weights


_TABLES = (".csv", ".jsonl", ".parquet")
_KINDS = ("videocon-physics", "videophy2", "qwen-vl")
_REPOSITORIES = {
    "videophysics/videocon_physics": "videocon-physics",
    "videophysics/videophy_2_auto": "videophy2",
}


def load_judge(
    name_or_path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None, **options: Any
) -> VideoJudge:
    """
    Makes a judge.

    Args:
        name_or_path: one of

            - `"sandbox"`: the exact judge of simulated clips;
            - `"videocon-physics"`, `"videophy2"`: the published judges, or with a folder or repository of their
              weights, `"videophy2:/data/weights"`;
            - `"qwen-vl:Qwen/Qwen2.5-VL-7B-Instruct"`, a folder, or a repository whose `config.json` says what it is;
            - `"http://localhost:8000/v1"`: a server; needs `model=`;
            - a `.csv`, `.jsonl` or `.parquet` file with scores.
        cache: SQLite file that remembers scores; see `CachedJudge`.
        options: of the judge's class.

    Returns:
        The judge, wrapped in a `CachedJudge` where a cache is given.

    Raises:
        ValueError: a name that means none of these, weights that are missing or of another model.
        TypeError: an option that the judge's class does not have.
    """
    judge = _load(os.fspath(name_or_path), options)
    if cache is None:
        return judge
    from .cache import CachedJudge

    return CachedJudge(judge, cache)


def check_judge(name_or_path: str | os.PathLike[str], **options: Any) -> None:
    """
    Finds what `load_judge` would stumble over at the end of a long run: a name that means nothing, a server without
    `model`, a table or a checkpoint that is not there. Reads no weights and asks no server.

    Args:
        name_or_path, options: as for `load_judge`.

    Raises:
        ValueError, TypeError: as `load_judge`.
    """
    name = os.fspath(name_or_path)
    revision = options.get("revision")
    kind, weights = _kind_and_weights(name, revision)
    if kind in _KINDS:
        resolve_weights(weights, revision, ["config.json"])
    else:
        _load(name, options)


def _load(name: str, options: dict[str, Any]) -> VideoJudge:
    kind, weights = _kind_and_weights(name, options.get("revision"))
    if kind == "sandbox":
        from ..sandbox.judge.judge import SandboxJudge

        return SandboxJudge(**options)
    if kind == "server":
        from .remote import RemoteJudge

        if "model" not in options:
            raise ValueError(f"{name} needs `model`, the model's name on the server, for example 'Qwen3-VL-8B'.")
        return RemoteJudge(name, **options)
    if kind == "table":
        from .precomputed import PrecomputedJudge

        return PrecomputedJudge(name, **options)
    if kind == "qwen-vl":
        from .qwen_vl import QwenVLJudge

        return QwenVLJudge(weights, **options)
    from .mplug_owl import VideoConPhysicsJudge, VideoPhy2Judge

    return (VideoConPhysicsJudge if kind == "videocon-physics" else VideoPhy2Judge)(weights, **options)


def _kind_and_weights(name: str, revision: str | None) -> tuple[str, str]:
    """What a name means: "sandbox", "server", "table" or one of `_KINDS`; and the folder or repository of weights."""
    if name == "sandbox":
        return "sandbox", ""
    if name.startswith(("http://", "https://")):
        return "server", ""
    if Path(name).suffix in _TABLES:
        return "table", ""
    kind, _, weights = name.partition(":")
    if kind in _KINDS:
        published = {kind: repository for repository, kind in _REPOSITORIES.items()}
        if not weights and kind not in published:
            raise ValueError("Expected a model after 'qwen-vl:', for example 'qwen-vl:Qwen/Qwen2.5-VL-7B-Instruct'.")
        return kind, weights or published[kind]
    return _REPOSITORIES.get(name) or _kind_of(name, revision), name


def _kind_of(name: str, revision: str | None) -> str:
    """What a folder or repository holds, by its `config.json`."""
    if "/" not in name and not Path(name).is_dir():
        raise ValueError(
            f"No judge {name!r}: expected 'sandbox', {', '.join(repr(kind) for kind in _KINDS)} (each may be followed "
            "by ':' and a folder or repository), a folder, a repository id, a server's URL, or a table "
            f"({', '.join(_TABLES)})."
        )
    kind = read_config(resolve_weights(name, revision, ["config.json"])).get("model_type")
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        return "qwen-vl"
    if kind == "mplug-owl":
        raise ValueError(
            f"{name} may be either of two judges that share a network: say which, as 'videocon-physics:{name}' or "
            f"'videophy2:{name}'."
        )
    raise ValueError(f"{name}: no judge for model_type {kind!r}; expected 'qwen2_5_vl', 'qwen3_vl' or 'mplug-owl'.")
