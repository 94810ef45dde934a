"""What a dataset holds and what looks wrong, on real files."""

import json

import numpy as np
import pytest

from video_trl.cli import main
from video_trl.data.overview import look_through, write_contact_sheet
from video_trl.data.video_io import write_video
from video_trl.evaluation.data_doctor import diagnose


@pytest.fixture
def pairs(tmp_path):
    """Rows: a good pair, one with equal videos, one with a prompt and a chosen video seen before, a broken file."""
    for name, (value, size, frames) in {"a": (40, 32, 5), "b": (120, 48, 9), "c": (200, 32, 5)}.items():
        write_video(tmp_path / f"{name}.mp4", np.full((frames, 32, size, 3), value, np.uint8), fps=8)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    cells = [("one", "a", "b"), ("two words here", "c", "c"), ("one", "copy", "b"), ("<b>four</b>", "b", "broken")]
    rows = [{"prompt": text, "winner": f"{good}.mp4", "loser": f"{bad}.mp4"} for text, good, bad in cells]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(path):
    from video_trl.data.tables import load_rows

    return load_rows(str(path), "train", ["chosen=winner", "rejected=loser"])


def test_everything_that_looks_wrong_is_named(pairs):
    overview = look_through(_rows(pairs), count_tokens=lambda text: len(text.split()), max_tokens=2)
    assert overview.rows == 4 and overview.videos == 7 and overview.rejected == {1: 3, 0: 1}
    assert overview.sizes == {"32x32": 4, "48x32": 3} and overview.rates == {8.0: 7}
    assert sorted(overview.frames) == [5, 5, 5, 5, 9, 9, 9] and max(overview.seconds) == 1.12
    broken = overview.problems.pop("a video cannot be read")
    assert len(broken) == 1 and broken[0].startswith("row 3, rejected[0]: ")
    assert overview.problems == {
        "a rejected video equals the chosen one": ["row 1"],
        "the same chosen video again": ["row 2 as row 0"],
        "the same rejected video again": ["row 2 as row 0"],
        "the same prompt again": ["row 2 as row 0"],
        "the prompt is cut after 2 tokens": ["row 1: 3"],
    }


def test_a_good_dataset_has_no_problem(pairs):
    overview = look_through(_rows(pairs).select([0]))
    assert not overview.problems and overview.videos == 2


def test_the_command_says_which_trainers_it_feeds(pairs, capsys):
    sheet = pairs.parent / "sheet.html"
    words = [
        "data",
        "check",
        str(pairs),
        "--column",
        "chosen=winner",
        "--column",
        "rejected=loser",
        "--html",
        str(sheet),
    ]
    assert main(words) == 1  # a file is broken
    text = capsys.readouterr().out
    assert "train dpo: yes" in text and "train gdpo: no. " in text and "train sft: yes" in text
    assert "4 rows, 7 videos that can be read" in text and "a video cannot be read (1): row 3, rejected[0]" in text
    page = sheet.read_text()
    assert page.count("<section>") == 4 and "&lt;b&gt;four&lt;/b&gt;" in page and "<b>four</b>" not in page
    assert page.count("data:image/webp") == 3 * 7


def test_what_nobody_takes_ends_with_an_error_code(pairs, capsys):
    assert main(["data", "check", str(pairs)]) == 1
    assert "missing: ['chosen', 'rejected']" in capsys.readouterr().out
    assert main(["data", "chekc", str(pairs)]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err


def test_a_contact_sheet_of_the_first_rows(pairs, tmp_path):
    write_contact_sheet(_rows(pairs), tmp_path / "sheet.html", rows=1)
    assert (tmp_path / "sheet.html").read_text().count("<figure>") == 2
    write_contact_sheet(_rows(pairs), tmp_path / "sheet.html", rows=1)
    (tmp_path / "mine.html").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine\.html is no page of video_trl and stays"):
        write_contact_sheet(_rows(pairs), tmp_path / "mine.html")


def test_encoded_rows_are_not_told_that_their_prompts_are_missing():
    """And the doctor, which looks at videos, says what it needs."""
    row = {"chosen_latents": [[0.0]], "rejected_latents": [[[0.0]]], "prompt_embeds": [[0.0]]}
    assert look_through([row, row]).problems == {}
    with pytest.raises(ValueError, match="the rows hold latents"):
        diagnose([row, row])
