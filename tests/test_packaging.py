"""What is published: tested versions are declared, wheel and sdist hold what they should, the wheel works alone."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.paths import ROOT
from tests.support.toml import tomllib
from video_trl import __version__


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _pins(name):
    lines = (ROOT / ".ci" / name).read_text("utf-8").splitlines()
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {_normal(name): Version(version) for name, _, version in pins}


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _floors(requirements):
    parsed = map(Requirement, requirements)
    return {
        _normal(item.name): Version(bound.version)
        for item in parsed
        for bound in item.specifier
        if bound.operator == ">="
    }


def test_the_oldest_versions_that_are_declared_are_those_of_the_environment_for_them():
    """Those of the extras that `dev` installs too: pip would take the newest of what is left out."""
    extras = PROJECT["optional-dependencies"]
    installed = {_normal(Requirement(text).name) for text in extras["dev"]}
    optional = [text for name, texts in extras.items() if name not in ("dev", "docs") for text in texts]
    tested = [text for text in optional if _normal(Requirement(text).name) in installed]
    assert _pins("constraints-min.txt") == _floors([*PROJECT["dependencies"], *tested])
    assert {"torchao", "gguf", "trackio", "starlette"} <= _pins("constraints-min.txt").keys()


def test_the_oldest_versions_are_installed_by_the_target_that_is_named_so():
    text = (ROOT / "Makefile").read_text("utf-8")
    recipe = re.search(r"^test-min:.*\n((?:\t.*\n)+)", text, re.MULTILINE)[1]
    installs = [line for line in recipe.splitlines() if " -m pip install " in line]
    assert installs and all(" -c .ci/constraints-min.txt " in line for line in installs)
    assert "PYTHON_MIN ?= python" + PROJECT["requires-python"].removeprefix(">=") in text and "$(PYTHON_MIN)" in recipe


def test_the_test_environment_lies_within_what_is_declared():
    pins = _pins("constraints.txt")
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"], *extras["docs"]]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            assert pins[_normal(requirement.name)] in requirement.specifier, text


def _hashed():
    """Name and version -> number of checksums, of `.ci/hashes.txt`."""
    entries = re.split(r"\n(?=\S)", (ROOT / ".ci" / "hashes.txt").read_text("utf-8").strip())
    parts = [entry.partition("==") for entry in entries if not entry.startswith("#")]
    return {_normal(name): (Version(rest.split()[0]), rest.count("--hash=sha256:")) for name, _, rest in parts}


def test_every_package_of_the_test_environment_but_torch_has_its_checksums():
    """If not: python .ci/dependencies.py hashes UV"""
    pins, hashed = _pins("constraints.txt"), _hashed()
    assert {name: version for name, (version, _) in hashed.items()} == {name: pins[name] for name in hashed}
    assert min(number for _, number in hashed.values()) >= 1 and "torch" not in hashed
    extras = PROJECT["optional-dependencies"]
    asked = map(Requirement, [*PROJECT["dependencies"], *extras["dev"], *extras["docs"]])
    there = {"python_version": "3.11"}
    needed = {_normal(item.name) for item in asked if item.marker is None or item.marker.evaluate(there)}
    assert needed - {"torch"} <= set(hashed)


def test_every_dependency_has_its_licence_on_its_page():
    """If not: python .ci/dependencies.py licences"""
    path = ROOT / ".ci" / "dependencies.py"
    script = importlib.util.module_from_spec(importlib.util.spec_from_file_location("dependencies", path))
    script.__spec__.loader.exec_module(script)
    page = script.PAGE.read_text("utf-8")
    for name in script.direct():
        assert re.search(rf"\| {re.escape(name)} \| |installs?: .*\b{re.escape(name)} \(", page), name
    for name in ("torch", "diffusers", "starlette"):
        assert f"| {script.licence(name)} |" in page
    assert "not stated" not in page


def test_only_tested_versions_of_python_are_declared():
    """`.ci/run` and the constraints are for 3.11, the oldest versions for 3.10; the workflow runs the others."""
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    assert sorted([*jobs["python"]["strategy"]["matrix"]["python"], "3.11"]) == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert jobs["oldest"]["steps"][1]["with"]["python-version"] == versions[0]
    assert "Python 3.11" in (ROOT / ".ci" / "constraints.txt").read_text("utf-8").splitlines()[1]


def test_the_short_selection_of_every_python_is_there():
    text = (ROOT / "Makefile").read_text("utf-8")
    selection = re.search(r"^SHORT := ((?:.*\\\n)*.*)$", text, re.MULTILINE)[1].replace("\\\n", " ").split()
    assert selection and all((ROOT / path).is_file() for path in selection)


def test_nothing_of_a_newer_python_than_the_oldest_declared_is_used():
    """As far as syntax goes; names of the standard library are what the short selection is run for."""
    oldest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    for path in [*(ROOT / "video_trl").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        if "templates" not in path.parts:
            ast.parse(path.read_text("utf-8"), feature_version=oldest)


def test_scripts_ask_for_the_oldest_python_that_is_declared():
    texts = {path.name: path.read_text("utf-8") for path in (ROOT / "examples").rglob("*.py")}
    asked = {name: re.findall(r'^# requires-python = "(.+)"$', text, re.M) for name, text in texts.items()}
    assert len(list(filter(None, asked.values()))) >= 10
    assert {name: found for name, found in asked.items() if found not in ([], [PROJECT["requires-python"]])} == {}


def test_citation_and_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__ and citation["license"] == PROJECT["license"]
    assert f"## {__version__.partition('.dev')[0]}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_templates_are_forms(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.name == "config.yml":
        assert form["blank_issues_enabled"] is False
        return
    assert form["name"] and form["description"]
    identifiers = [item["id"] for item in form["body"] if item["type"] != "markdown"]
    assert identifiers and len(identifiers) == len(set(identifiers))
    assert all(item["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes") for item in form["body"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist, and a wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_its_assets(built):
    wheel, sdist = built
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "video_trl"], cwd=ROOT, text=True, capture_output=True
    )
    files = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    assert "video_trl/py.typed" in files and any(name.endswith(".safetensors") for name in files)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert files <= names, sorted(files - names)
    assert not [name for name in names if name.startswith(("tests", "examples", "docs"))]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert files | {"pyproject.toml", "README.md", "LICENSE"} <= inside


@pytest.mark.slow
def test_the_wheel_alone_is_the_command_and_trains(built, tmp_path):
    """In an environment of its own; only the dependencies are those of this one."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(built[0]),
    ]
    subprocess.run(install, check=True, capture_output=True)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    variables = {**os.environ, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}

    def run(*words):
        return subprocess.run(words, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True).stdout

    assert run(python, "-m", "video_trl", "--version").strip() == __version__
    assert Path(run(python, "-c", "import video_trl; print(video_trl.__file__)").strip()).is_relative_to(environment)
    argv = ["train", "sft", "--num_clips", "2", "--max_steps", "1", "--use_cpu", "--output_dir", "out"]
    run(environment / "bin" / "video-trl", *argv)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert "No faults found." in run(environment / "bin" / "video-trl", "doctor")
