"""
What video_trl depends on, from the metadata of the packages that are installed.

python .ci/dependencies.py licences    # writes the tables of docs/extend/dependencies.md again
python .ci/dependencies.py hashes UV   # writes .ci/hashes.txt again; UV: the path of uv (pip install uv)
"""

import re
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE, PINS, HASHES = (ROOT / name for name in ("docs/extend/dependencies.md", ".ci/constraints.txt", ".ci/hashes.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Extras of people who change the package, and of those who read its pages.
_FOR_DEVELOPERS = ("dev", "docs")
# Names in use before there were identifiers; "BSD" is as much as some packages say.
_SHORT = {
    "Apache Software License": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "BSD License": "BSD",
    "BSD 3-Clause License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause", "ISC License (ISCL)": "ISC",
    "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}  # fmt: skip
_HEADER = """\
# Checksums of every file of the pinned packages, but for torch: each of its builds has others.
# Made by `python .ci/dependencies.py hashes`; make install HASHES=.ci/hashes.txt
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name: str) -> str:
    """What a package states: an expression, else its classifiers, else the first line of its text."""
    fields = metadata.metadata(name)
    kinds = [item.rpartition(" :: ")[2] for item in fields.get_all("Classifier", []) if item.startswith("License ::")]
    named = [kind for kind in kinds if kind != "OSI Approved"]
    text = fields.get("License") or metadata.distribution(name).read_text("licenses/LICENSE") or "not stated"
    text = "BSD-3-Clause" if "Neither the name of the copyright holder" in text else text
    stated = named or [text.strip().splitlines()[0]]
    return fields.get("License-Expression") or " AND ".join(_SHORT.get(kind, kind) for kind in stated)


def installed(name: str) -> bool:
    return bool(list(metadata.distributions(name=name)))


def direct() -> dict[str, str]:
    """Packages that video_trl imports -> when: always, or with an extra."""
    found = {Requirement(text).name: "always" for text in PROJECT["dependencies"]}
    for extra, texts in PROJECT["optional-dependencies"].items():
        if extra not in _FOR_DEVELOPERS:
            for text in texts:
                found.setdefault(Requirement(text).name, f"`{extra}`")
    return found


def closure() -> set[str]:
    """Normal names of all that these bring with them, as far as it is installed here."""
    found: set[str] = set()
    waiting = [(name, "") for name in direct()]
    while waiting:
        name, extra = waiting.pop()
        if not installed(name) or normal(name) in found:
            continue
        found.add(normal(name))
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, "")]
    return found


def tables() -> str:
    """Both tables of the page."""
    there = {name: when for name, when in direct().items() if installed(name)}
    rows = [f"| {name} | {when} | {licence(name)} |" for name, when in there.items()]
    first = "\n".join(["| package | needed | licence |", "|---|---|---|", *rows])
    missing = ", ".join(f"{name} ({when})" for name, when in direct().items() if name not in there)
    by_licence: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(closure() - set(map(normal, there))):
        by_licence[licence(name)].append(name)
    brought = [f"| {kind} | {', '.join(names)} |" for kind, names in sorted(by_licence.items())]
    second = "\n".join(["| licence | packages |", "|---|---|", *brought])
    return (
        f"{first}\n\nOf extras that the test environment does not install: {missing}.\n\n"
        f"What these packages bring with them:\n\n{second}"
    )


def write_licences() -> None:
    before, start, rest = PAGE.read_text("utf-8").partition("<!-- licences -->\n")
    _, end, after = rest.partition("\n<!-- end of licences -->")
    PAGE.write_text(f"{before}{start}{tables()}{end}{after}", "utf-8")


def write_hashes(uv: str) -> None:
    """The hashes of all files of each pinned release, as the registry states them: for every platform."""
    extras = [word for name in _FOR_DEVELOPERS for word in ("--extra", name)]
    options = "--generate-hashes --no-header --no-annotate --python-version 3.11.5 -q".split()
    platform = ["--python-platform", "x86_64-manylinux_2_28"]
    command = [uv, "pip", "compile", "pyproject.toml", *extras, "-c", str(PINS), *options, *platform]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    pinned = {normal(line.partition("==")[0]) for line in PINS.read_text("utf-8").splitlines() if "==" in line}
    entries = re.split(r"\n(?=\S)", text.strip())  # those of torch's own build are not pinned either
    kept = [entry for entry in entries if normal(entry.partition("==")[0]) in pinned - {"torch"}]
    HASHES.write_text(_HEADER + "\n".join(kept) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["licences"]:
        write_licences()
    elif sys.argv[1:2] == ["hashes"] and len(sys.argv) == 3:
        write_hashes(sys.argv[2])
    else:
        raise SystemExit(__doc__)
