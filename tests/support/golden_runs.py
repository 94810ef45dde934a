"""
Proves that a refactoring changes no number: short runs of every trainer, made by two checkouts on one machine and
compared bit for bit.

    python tests/support/golden_runs.py record CHECKOUT OUT_DIR [--data DIR]
    python tests/support/golden_runs.py compare OLD NEW [--work_dir DIR] [--rename PATTERN=NEW] [--ignore PATTERN]

`record` runs the package of CHECKOUT and writes OUT_DIR/record.json: metrics, trainer states and files of all runs
(`golden_cases.py`), floats as hexadecimal numbers, tensors as hashes, without what depends on clock, paths or
versions. `compare` records both checkouts, the new one on the datasets that the old one has made, and lists what
differs; a commit without changes is recorded once, and a folder that `record` has written stands for its checkout.
Both verbs also compare each resumed run with the uninterrupted one. The exit status is 1 if anything differs.

Bits are worth nothing on another processor, so the repository keeps no record.
"""

import argparse
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


CASES = Path(__file__).resolve().with_name("golden_cases.py")
RECORD_NAME = "record.json"
LOG_NAME = "log.txt"
# What differs between a resumed run and an uninterrupted one that are equal: the loss is averaged over the steps since
# the start, and the log that a checkpoint brings along is in alphabetical order, in which the card shows its columns.
_OF_ONE_START = re.compile(r"(^|/)(train_loss|training_loss|README\.md/Log:)$")


def record(checkout: Path, out_dir: Path, data: Path | None = None) -> dict[str, Any]:
    """
    Make all runs with the package of a checkout.

    Args:
        checkout: folder that holds `video_trl/`.
        out_dir: new or empty folder; gets the record, the datasets that the package makes, and a log.
        data: `out_dir` of another record, to train on its datasets; by default on those of this one.

    Returns:
        Nested dicts: "data", "cache", and for each case "whole", "checkpoint" and "resumed".
    """
    if not (checkout / "video_trl" / "__init__.py").is_file():
        raise SystemExit(f"Expected a checkout with a folder video_trl, got {checkout}.")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise SystemExit(f"Expected a new or an empty folder, got {out_dir}, which holds {os.listdir(out_dir)[:5]}.")
    out_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    made: dict[str, Any] = {}
    for name, launcher in (("single.json", []), ("processes.json", several)):
        arguments = [*launcher, str(CASES), str(checkout), str(out_dir), str(data or out_dir), name]
        _make_runs(arguments, checkout, out_dir)
        made |= json.loads((out_dir / name).read_text())
        (out_dir / name).unlink()
    partial = out_dir / f"{RECORD_NAME}.partial"
    partial.write_text(json.dumps(made, indent=1))
    partial.rename(out_dir / RECORD_NAME)  # a folder with a record is taken for a complete one
    count = sum("resumed" in case for case in made.values())
    sys.stdout.write(f"Recorded {count} cases of {checkout} in {time.monotonic() - start:.0f} seconds.\n")
    return made


def _make_runs(arguments: list[str], checkout: Path, out_dir: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONSAFEPATH": "1",  # the folder of the script holds other modules, which must not hide any
        "PYTHONHASHSEED": "0",  # some libraries write sets of strings in their order
        # x264 (macroblock tree with AVX-512) reads memory that it has not written: equal frames give different files.
        "MALLOC_PERTURB_": "165",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(out_dir / "hf"),  # nothing that another checkout has cached
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (out_dir / LOG_NAME).open("a") as log:
        command = [sys.executable, *arguments]
        status = subprocess.run(command, cwd=out_dir, env=environment, stdout=log, stderr=log, check=False).returncode
    if status:
        tail = (out_dir / LOG_NAME).read_text()[-4000:]
        raise SystemExit(f"{tail}\nThe runs of {checkout} failed, see {out_dir / LOG_NAME}.")


def recorded(source: Path, work_dir: Path, data: Path | None = None) -> Path:
    """Folder of a record: `source` itself, or that of a checkout, made where `work_dir` has none of its commit."""
    if (source / RECORD_NAME).is_file():
        return source
    git = ["git", "-C", str(source)]
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    uncommitted = subprocess.check_output([*git, "status", "--porcelain"], text=True).strip()
    facts = [_environment(), str(data)]
    if uncommitted:
        facts.append(str(source))
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder = work_dir / f"{commit[:12]}{'-uncommitted' if uncommitted else ''}-{digest}"
    if uncommitted or not (folder / RECORD_NAME).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of another state, or of runs that failed
        record(source, folder, data)
    return folder


def _environment() -> str:
    """What a record depends on beside the commit: the cases, the installed packages and the processor."""
    packages = sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions())
    processor = Path("/proc/cpuinfo")
    facts = re.findall(r"(?m)^(?:model name|flags).*", processor.read_text())[:2] if processor.is_file() else []
    parts = [CASES.read_text(), Path(__file__).read_text(), sys.version, platform.platform(), *facts, *packages]
    return "\n".join(parts)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of nested dicts and lists; an empty dict or list is a leaf."""
    if not isinstance(value, dict | list) or not value:
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flatten(inner, f"{name}/{key}" if name else str(key))


def differences(old: Any, new: Any) -> dict[str, str]:
    """Path -> what has changed, for each value that is not the same, or that only one of the two has."""
    before, after = dict(flatten(old)), dict(flatten(new))
    found = {}
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            found[name] = f"{_shown(before[name])} -> missing"
        elif name not in before:
            found[name] = f"missing -> {_shown(after[name])}"
        elif (type(before[name]), before[name]) != (type(after[name]), after[name]):  # 1 == 1.0 == True
            found[name] = _change(before[name], after[name])
    return found


def compare(old: dict[str, Any], new: dict[str, Any], rename: list[str], ignore: list[str]) -> dict[str, str]:
    """
    Differences between two records.

    Args:
        rename: "PATTERN=NEW" each: matches in the names of the old record are replaced, for what is meant to have
            another name.
        ignore: patterns of paths that are meant to differ.
    """
    for rule in rename:
        pattern, _, replacement = rule.partition("=")
        old = _rename(old, re.compile(pattern), replacement)
    found = differences(old, new)
    return {name: text for name, text in found.items() if not any(re.search(pattern, name) for pattern in ignore)}


def resume_differences(made: dict[str, Any]) -> dict[str, str]:
    """Where a resumed run has not become what the uninterrupted one is, in all cases of a record."""
    found = {}
    for name, case in made.items():
        if "resumed" in case:
            changes = differences(case["whole"], case["resumed"])
            found |= {f"{name}/{path}": text for path, text in changes.items() if not _OF_ONE_START.search(path)}
    return found


def _rename(value: Any, pattern: re.Pattern[str], replacement: str) -> Any:
    if isinstance(value, list):
        return [_rename(item, pattern, replacement) for item in value]
    if not isinstance(value, dict):
        return value
    return {pattern.sub(replacement, key): _rename(inner, pattern, replacement) for key, inner in value.items()}


def _change(old: Any, new: Any) -> str:
    if isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
        return "".join(f"\n      {line}" for line in lines if not line.startswith(("---", "+++", "@@")))
    return f"{_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"-?0x[01]\.[0-9a-f]+p[+-]\d+", value):
        return f"{value} ({float.fromhex(value):.9g})"
    text = str(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def report(headline: str, found: dict[str, str], limit: int) -> None:
    """Print differences case by case, the first `limit` of each."""
    by_case: dict[str, list[str]] = {}
    for name, text in found.items():
        case, _, path = name.partition("/")
        by_case.setdefault(case, []).append(f"{path}: {text}")
    if found:
        sys.stdout.write(f"{headline}\n")
    for case, texts in by_case.items():
        sys.stdout.write(f"  {case}: {len(texts)}\n")
        sys.stdout.writelines(f"    {text}\n" for text in texts[:limit])
        if len(texts) > limit:
            sys.stdout.write(f"    ... and {len(texts) - limit} more (see --limit)\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("record", help="make all runs with the package of one checkout")
    one.add_argument("checkout", type=Path)
    one.add_argument("out_dir", type=Path)
    one.add_argument("--data", type=Path, help="out_dir of another record, to train on its datasets")
    two = verbs.add_parser("compare", help="record two checkouts and list what differs")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    work_dir = Path(tempfile.gettempdir()) / "video_trl_golden_runs"
    two.add_argument("--work_dir", type=Path, default=work_dir, help="folder of the records (default: %(default)s)")
    two.add_argument("--rename", action="append", default=[], metavar="PATTERN=NEW", help="regex; of old names")
    two.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="regex; of paths of values")
    for verb in (one, two):
        verb.add_argument("--limit", type=int, default=8, help="differences shown of each case (default: %(default)s)")
    arguments = parser.parse_args()

    changes: dict[str, str] = {}
    if arguments.verb == "record":
        data = arguments.data.resolve() if arguments.data else None
        new = record(arguments.checkout.resolve(), arguments.out_dir.resolve(), data)
    else:
        work_dir = arguments.work_dir.resolve()
        first = recorded(arguments.old.resolve(), work_dir)
        second = recorded(arguments.new.resolve(), work_dir, data=first)
        old, new = (json.loads((folder / RECORD_NAME).read_text()) for folder in (first, second))
        changes = compare(old, new, arguments.rename, arguments.ignore)
    resuming = resume_differences(new)
    report("Old and new differ:", changes, arguments.limit)
    report("The uninterrupted run and the resumed one differ:", resuming, arguments.limit)
    sys.stdout.write(
        f"{sum(1 for _ in flatten(new))} values: {len(changes)} differ between old and new, {len(resuming)} between "
        "uninterrupted and resumed runs.\n"
    )
    sys.exit(1 if changes or resuming else 0)


if __name__ == "__main__":
    main()
