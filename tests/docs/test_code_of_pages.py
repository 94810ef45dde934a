"""
The code in the documents runs. Sizes are made smaller here, nothing else; what needs a GPU, a download or a person
says so in a comment before it: `<!-- not run: why -->`.
"""

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

from tests.support.paths import DOCS, ROOT
from video_trl.cli import VERBS, main
from video_trl.cli.train import split_launcher


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
# Pages whose code has a test of its own, which does more than run it.
ELSEWHERE = {
    "docs/data/dataset_formats.md": "tests/data/test_dataset_formats_page.py",
    "docs/data/gt_pair.md": "tests/curation/gt_pair/test_pipeline.py",
    "docs/index.md": "tests/docs/test_pages.py",
    "docs/extend/paper_index.md": "tests/docs/test_paper_index.py",
    "docs/trainers/repa_trainer.md": "tests/trainer/test_repa_documentation.py",
}
SLOW = {
    "README.md",
    "docs/trainers/dpo_trainer.md",
    "docs/results/evaluation.md",
    "docs/trainers/group_dpo_trainer.md",
    "docs/trainers/memory.md",
    "docs/start/quickstart.md",
    "docs/trainers/reg_dpo_trainer.md",
}
SMALLER = (
    (r"(max_steps|eval_steps|save_steps|every_steps)=\d+", r"\1=1"),
    (r"num_groups=\d+", "num_groups=2"),
    (r"num_prompts=\d+", "num_prompts=1"),
    (r"sandbox_prompts\(\d+", "sandbox_prompts(2"),
    (r"range\(20_000_000, 20_000_\d+\)", "range(20_000_000, 20_000_004)"),
    (r"\*\*sandbox\.call_kwargs", '**sandbox.call_kwargs | {"num_inference_steps": 2}'),
    (
        r"call_kwargs=(sandbox|load_sandbox\(\))\.call_kwargs",
        r'call_kwargs=\1.call_kwargs | {"num_inference_steps": 2}',
    ),
)


def _id(path):
    return str(path.relative_to(ROOT))


BLOCKS = [
    (_id(page), match["why"], match["code"]) for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8"))
]
RUN = list(dict.fromkeys(page for page, why, _ in BLOCKS if why is None and page not in ELSEWHERE))


def _names_before(page):
    """What the text of a page says is there already."""
    if page in ("docs/trainers/group_dpo_trainer.md", "docs/trainers/teachers.md"):
        import torch

        from video_trl.sandbox import load_sandbox

        torch.manual_seed(0)
        return {"pipeline": load_sandbox().pipeline, "video": torch.rand(1, 13, 3, 64, 64)}
    return {}


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in RUN])
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))  # the cache of encoded data
    names = _names_before(page)
    for other, why, code in BLOCKS:
        if other == page and why is None:
            for pattern, smaller in SMALLER:
                code = re.sub(pattern, smaller, code)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, page, "exec"), names)
    if page == "docs/extend/adding_a_method.md":  # what the page says of its method
        assert names["first_loss"] == 1.0
    if page == "docs/start/quickstart.md":
        assert (tmp_path / "report.html").is_file() and names["trainer"].state.best_metric is not None


@pytest.mark.parametrize(("page", "why", "code"), BLOCKS, ids=[f"{page}-{n}" for n, (page, *_) in enumerate(BLOCKS)])
def test_code_compiles_and_imports_what_exists(page, why, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("video_trl"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_pages_with_a_test_of_their_own_are_named_in_it():
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / test).read_text("utf-8"), page


def _commands():
    """Words of every `video-trl ...` in a shell block; remarks follow two spaces or stand behind a `#`."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("video-trl "):
                    yield _id(page), line.partition("#")[0].split()[1:]


COMMANDS = list(_commands())


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}-{' '.join(w)}" for p, w in COMMANDS])
def test_commands_have_options_that_exist(page, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert words[0] in VERBS
    words = split_launcher(words)[1] if words[0] == "train" else words
    assert main([*words, "--help"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_files_of_commands_exist(page):
    """Scripts and configurations that a command starts, and targets of make."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for name in re.findall(r"(?<![\w/])examples/[\w./-]+\.(?:py|yaml)", block):
            assert (ROOT / name).is_file(), name
        for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), target


def test_the_trainer_pages_have_all_their_sections():
    wanted = ("Quick start", "Expected data", "The method", "Options", "Logged metrics", "Customise", "API")
    pages = sorted(DOCS.glob("trainers/*_trainer.md"))
    assert len(pages) == 5
    for page in pages:
        found = re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE)
        assert [title for title in wanted if title not in found] == [], page.name
