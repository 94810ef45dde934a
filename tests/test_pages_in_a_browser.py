"""Cards and pages with hostile texts in every place, in a real browser: they are shown, and nothing of them runs."""

from pathlib import Path

import pytest
from datasets import Dataset

from tests.support.evaluation.browser import HOSTILE, chromium, page_of
from tests.support.tiny import tiny_mp4
from video_trl import hub
from video_trl.curation.phyaug.pipeline import Category
from video_trl.curation.phyaug.report import write_dataset_card, write_funnel
from video_trl.data.overview import write_contact_sheet
from video_trl.evaluation import Column, Comparison, Curve, Sample, Table, paired_bootstrap, write_report


# What no page of ours holds, beside what a template itself brings.
ACTIVE = "img:not([src^='data:']), iframe, object, embed, form, base, [onerror], [onload], [onmouseover]"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def preview(card: str, path: Path) -> Path:
    """A card as a page, by CommonMark with tables; raw HTML stays, which the Hub would clean once more."""
    markdown_it = pytest.importorskip("markdown_it")
    text = card.split("\n---\n", 1)[1]
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    path.write_text(f"<!doctype html><meta charset=utf-8><link rel=icon href='data:,'>{page}", encoding="utf-8")
    return path


def check(browser, path: Path, places: int) -> None:
    """Everything has loaded when `goto` is back, and so whatever would run has; `page_of` fails if it did."""
    with page_of(browser) as page:
        page.goto(path.as_uri(), wait_until="load")
        assert page.locator(ACTIVE).count() == 0
        links = page.eval_on_selector_all("a", "links => links.map((link) => link.href)")
        assert all(link.startswith("https://huggingface.co/") for link in links), links
        shown = page.evaluate("document.documentElement.textContent")
        assert shown.count("alert(1)") >= places and "<img src=x onerror=alert(1)>" in shown


def test_the_preview_runs_what_a_card_does_not_escape(browser, tmp_path):
    """Or the tests below could not fail."""
    page = preview(f"---\n---\n{HOSTILE}", tmp_path / "page.html")
    with pytest.raises(AssertionError) as failure, page_of(browser) as shown:
        shown.goto(page.as_uri(), wait_until="load")
    assert "dialog: 1" in str(failure.value) and "dialog: 2" in str(failure.value)


def test_model_cards(browser, tmp_path):
    (tmp_path / "a.mp4").write_bytes(tiny_mp4(0))
    facts = hub.DatasetFacts(HOSTILE, HOSTILE, {HOSTILE: 3}, [{"prompt": HOSTILE, "videos": {HOSTILE: "a.mp4"}}])
    measurement = hub.Measurement(HOSTILE, 0.5, 0.4, 0.6, 0.95, HOSTILE, 8)
    card = hub.model_card(
        repo_id=HOSTILE, base_model=HOSTILE, method="dpo", method_name="DPO", prompt=HOSTILE, fps=8, revision=HOSTILE,
        call_kwargs={"negative_prompt": HOSTILE}, loss_parameters={HOSTILE: HOSTILE},
        hyperparameters={HOSTILE: [HOSTILE]}, log=[{HOSTILE: HOSTILE}], evaluation=[measurement],
        videos=[(HOSTILE, "a.mp4")], dataset=facts, resources_used={HOSTILE: HOSTILE}, citation=HOSTILE,
        license=HOSTILE,
    )  # fmt: skip
    check(browser, preview(card, tmp_path / "card.html"), 20)


def test_dataset_cards(browser, tmp_path):
    (tmp_path / "a.mp4").write_bytes(tiny_mp4(0))
    row = {"prompt": HOSTILE, "video": str(tmp_path / "a.mp4"), "generator": HOSTILE, HOSTILE: "column"}
    folder = hub.export_dataset(
        Dataset.from_list([row]), tmp_path / "export", name=HOSTILE, license=HOSTILE, details={HOSTILE: HOSTILE},
        media_folders=[tmp_path],
    )  # fmt: skip
    check(browser, preview((folder / hub.CARD_NAME).read_text(), folder / "card.html"), 7)


def test_what_phyaug_writes(browser, tmp_path):
    facts = ({"groups": 1, HOSTILE: 2}, {HOSTILE: 3}, [Category(HOSTILE, 1, 1, 0.5, 0.5, 1)], {HOSTILE: HOSTILE})
    card, page = tmp_path / "README.md", tmp_path / "funnel.html"
    write_dataset_card(card, *facts, {HOSTILE: HOSTILE}, num_rejected=1, license=HOSTILE, license_notes="")
    check(browser, preview(card.read_text(), tmp_path / "card.html"), 8)
    write_funnel(page, *facts)
    check(browser, page, 7)


def test_reports_and_contact_sheets(browser, tmp_path):
    clip = tmp_path / "a.mp4"
    clip.write_bytes(tiny_mp4(0))
    difference = paired_bootstrap([0.5, 0.6, 0.7], [0.1, 0.2, 0.4])
    scores = {HOSTILE: 0.5, "explanation": HOSTILE}
    report = write_report(
        tmp_path / "report.html", title=HOSTILE, columns=[Column(HOSTILE, HOSTILE), Column("base")],
        samples=[Sample(HOSTILE, {HOSTILE: clip}, {HOSTILE: scores}, category=name) for name in (HOSTILE, "b")],
        comparisons=[Comparison(HOSTILE, HOSTILE, HOSTILE, difference, 3)],
        tables=[Table(HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE)],
        curves=[Curve(HOSTILE, [0, 1], {HOSTILE: [0, 1]}, x_label=HOSTILE, y_label=HOSTILE)],
        notes=[HOSTILE], disagreement=HOSTILE, lead=HOSTILE, explanations={"Scores": HOSTILE},
    )  # fmt: skip
    check(browser, report, 25)
    sheet = tmp_path / "sheet.html"
    write_contact_sheet([{"prompt": HOSTILE, "video": {"path": f"{HOSTILE.replace('/', '')}.mp4"}}], sheet)
    check(browser, sheet, 2)
