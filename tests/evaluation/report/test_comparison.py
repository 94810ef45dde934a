"""Runs side by side: numbers by hand, what is refused, and the page in a browser."""

import json
import re

import numpy as np
import pytest

from tests.support.evaluation.browser import chromium, page_of
from tests.support.evaluation.runs import ColourJudge, make_run
from video_trl.evaluation import holm, paired_bootstrap, prompt_sign_test, summary_table
from video_trl.evaluation.report.comparison import (
    compare_runs,
    compare_tables,
    training_curves,
    write_comparison,
)
from video_trl.evaluation.runs.prompts import EvaluationPrompt
from video_trl.evaluation.runs.score import load_scores, score_run
from video_trl.evaluation.runs.tables import tabulate
from video_trl.evaluation.votes.study import Vote, VoteFile, open_study


EVIL = 'A "ball", <b>red</b> & round'
PROMPTS = [
    EvaluationPrompt(EVIL if index == 0 else f"sentence {index}", category=("fall", "roll")[index % 2],
                     groups=(("fall", "roll")[index % 2],))
    for index in range(8)
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and a method with three training seeds that is better in pc by 0.3 and not in sa."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    pc = rng.uniform(0.1, 0.5, size=16)
    scores = [(0.6 + (-1) ** i * 0.1, float(value)) for i, value in enumerate(pc)]
    make_run(folder / "base", "base", scores, prompts=PROMPTS, seeds=(0, 1))
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(0, 0.05, size=16)
        better = [(0.6 + float(e), float(value + 0.3)) for value, e in zip(pc, noise, strict=True)]
        make_run(folder / f"ours{seed}", "ours", better, prompts=PROMPTS, seeds=(0, 1), training_seed=seed)
    return [folder / name for name in ("base", "ours0", "ours1", "ours2")]


def test_comparisons_pool_training_seeds_resample_prompts_and_correct_for_their_number(folders):
    comparisons = compare_runs(folders)
    assert [(c.metric, c.a, c.b, c.num_seeds) for c in comparisons] == [
        ("pc", "ours", "base", 3), ("sa", "ours", "base", 3), ("joint", "ours", "base", 3),
    ]  # fmt: skip
    from video_trl.evaluation.runs.run import load_run

    runs = [load_run(folder) for folder in folders]
    scores = [[(s["sa"], s["pc"]) for s in load_scores(run)] for run in runs]
    prompts = [case.prompt_index for case in runs[0].cases] * 3
    ours, base = np.array(scores[1] + scores[2] + scores[3]), np.array(scores[0] * 3)
    joint = [((values >= 0.5).all(axis=1)).astype(float) for values in (ours, base)]
    columns = [(ours[:, 1], base[:, 1]), (ours[:, 0], base[:, 0]), joint]
    adjusted = holm([prompt_sign_test(a, b, prompts) for a, b in columns])
    for comparison, (a, b), p in zip(comparisons, columns, adjusted, strict=True):
        assert comparison.difference == paired_bootstrap(a, b, clusters=prompts)
        assert comparison.p_adjusted == p
        assert (comparison.difference.num_items, comparison.difference.num_clusters) == (48, 8)
    assert [c.verdict for c in comparisons[:2]] == ["better", "no difference shown"]
    table = summary_table(comparisons)
    assert "p (Holm)" in table and "48 / 8 / 3" in table


def test_pairs_of_tables_stand_by_themselves_metric_by_metric(folders):
    """The same differences without a p-value, in the order asked for."""
    tables = [tabulate(folder) for folder in folders]
    pairs = [("ours", "base"), ("base", "ours")]
    comparisons = compare_tables(tables, pairs)
    assert [(c.metric, c.a, c.b) for c in comparisons] == [(m, *pair) for m in ("pc", "sa", "joint") for pair in pairs]
    assert all(c.p_adjusted is None for c in comparisons)
    assert [c.difference for c in comparisons[::2]] == [c.difference for c in compare_runs(folders)]
    assert (comparisons[0].verdict, comparisons[1].verdict) == ("better", "worse")
    assert "p (Holm)" not in summary_table(comparisons)


def test_one_training_seed_never_earns_the_word_better(folders):
    assert compare_runs(folders[:2])[0].verdict == "higher in 1 seed (a verdict needs 3)"
    assert compare_runs(folders[:2], baseline="ours")[0].verdict == "lower in 1 seed (a verdict needs 3)"
    assert compare_runs(folders[:1]) == []


def test_what_cannot_be_paired_is_refused(folders, tmp_path):
    other = make_run(tmp_path / "few", "few", [(0.5, 0.5)] * 2).folder
    with pytest.raises(ValueError, match=r"other prompts or seeds \(2 and 16 videos\)"):
        compare_runs([folders[0], other])
    with pytest.raises(ValueError, match="Several runs are called 'ours'"):
        compare_runs([folders[0], folders[1], folders[1]])
    with pytest.raises(ValueError, match="not among the methods"):
        compare_runs(folders, baseline="none")
    scores = [(0.5, 0.5)] * 16
    sft = [make_run(tmp_path / f"s{i}", "sft", scores, prompts=PROMPTS, seeds=(0, 1), training_seed=i) for i in (0, 7)]
    with pytest.raises(ValueError, match="training seed by training seed"):
        compare_runs([*folders, *(run.folder for run in sft)])
    with pytest.raises(ValueError, match="at least one run"):
        compare_runs([])


def test_scores_of_different_judges_and_rules_are_not_compared(folders, tmp_path):
    class Other(ColourJudge):
        name = identity = "other"

    run = make_run(tmp_path / "a", "a", [(0.5, 0.5)] * 16, prompts=PROMPTS, seeds=(0, 1), scored=False)
    score_run(run.folder, Other())
    with pytest.raises(ValueError, match="scored by 'other'"):
        compare_runs([folders[0], run.folder])
    rule = make_run(tmp_path / "b", "b", [(0.5, 0.5)] * 16, prompts=PROMPTS, seeds=(0, 1), benchmark="videophy2")
    with pytest.raises(ValueError, match="counted as 'videophy2'"):
        compare_runs([folders[0], rule.folder])
    assert compare_runs([folders[0], rule.folder], benchmark="videophy2")


def test_one_name_is_not_one_judge(folders, tmp_path):
    """Other weights or settings, or frames instead of files; tables with scores are one for each run."""

    class Later(ColourJudge):
        identity = "colour 2"

    def scored(name, /, **by):
        run = make_run(tmp_path / name, name, [(0.5, 0.5)] * 16, prompts=PROMPTS, seeds=(0, 1), scored=False)
        score_run(run.folder, Later())
        path = run.folder / "scores" / "colour" / "judge.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | by))
        return run.folder

    for folder in (scored("other"), scored("frames", identity="colour 1", judged="frames")):
        with pytest.raises(ValueError, match="one name, and other weights, settings or pictures"):
            compare_runs([folders[0], folder])
    tables = [scored(name, name="precomputed", identity=f"precomputed:table={name}") for name in ("a", "b")]
    assert len(compare_runs(tables)) == 3


def test_a_group_of_some_runs_alone_has_empty_cells(folders, tmp_path):
    prompts = [EvaluationPrompt(prompt.text, groups=("roll",)) for prompt in PROMPTS]
    other = make_run(tmp_path / "o", "o", [(0.5, 0.5)] * 16, prompts=prompts, seeds=(0, 1)).folder
    page = write_comparison([folders[0], other], tmp_path / "page.html", max_prompts=1).read_text()
    assert "Joint proportion by group" in page


def test_the_page_opens_with_what_came_out_and_defines_its_scores(folders, tmp_path):
    worse, better = (
        make_run(tmp_path / name, name, [(1.0, pc)] * 16, prompts=PROMPTS, seeds=(0, 1)).folder
        for name, pc in (("worse", 0.25), ("better", 0.75))
    )
    page = write_comparison([worse, better], tmp_path / "page.html", max_prompts=1).read_text()
    sentence = "better passes for physics in 16 of 16 videos, worse in 0 of 16; its mean physics score is 0.7"
    body = page.partition("<body>")[2]
    assert body.index(sentence) < body.index("<video") < body.index("pc (physical commonsense) says how well a video")
    assert "A video passes sa or pc with a score of at least 0.5" in body and ": higher in 1 seed (a verdict" in body
    alone = write_comparison([worse], tmp_path / "alone.html", max_prompts=1).read_text()
    assert "passes for physics in" not in alone


LOG = [
    {
        "step": step,
        "loss": 1.0 / step,
        "epoch": step / 10,
        "rewards/chosen": 0.1 * step,
        "rewards/rejected": -0.1 * step,
    }
    for step in (10, 20, 30)
] + [{"step": 20, "eval_loss": 0.3, "eval_runtime": 2.0}, {"step": 30, "train_runtime": 9.0, "total_flos": 1.0}]


def test_training_curves_share_a_chart_by_prefix_and_leave_timings_out(tmp_path):
    curves = training_curves(LOG, "ours")
    assert [(curve.title, list(curve.series)) for curve in curves] == [
        ("ours: loss", ["loss"]),
        ("ours: rewards", ["rewards/chosen", "rewards/rejected"]),
    ]
    assert list(curves[0].x) == [10, 20, 30]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    assert training_curves(tmp_path / "trainer_state.json", "ours") == curves
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'log_history'"):
        training_curves(tmp_path / "trainer_state.json")


@pytest.fixture(scope="module")
def page_path(folders, tmp_path_factory):
    """The page of a base model and two adapters, with votes and curves."""
    folder = tmp_path_factory.mktemp("page")
    study = open_study(folders[:1] + [_renamed(folders[1], folder / "ours")], "physics")
    votes = VoteFile(folder / "votes.jsonl", study)
    task = next(iter(study.tasks.values()))
    votes.add(Vote(study.identity, "Ada", task.key, task.case.prompt.text, 0, task.a.name, task.b.name, "a", 0,
                   {"physics": "bad"}, 1.0, "now"))  # fmt: skip
    votes.close()
    return write_comparison(
        folders[:3],
        folder / "comparison.html",
        title="Base & adapters",
        max_prompts=5,
        curves=training_curves(LOG, "ours"),
        votes_path=folder / "votes.jsonl",
        notes=["made by a test", "adapter " + "x" * 200],
    )


def _renamed(folder, target):
    """The run under a name of its own, since a study tells runs apart by name."""
    import shutil

    shutil.copytree(folder, target)
    text = (target / "run.json").read_text()
    (target / "run.json").write_text(text.replace('"name": "ours"', '"name": "ours 0"'))
    return target


def test_page_holds_everything_and_needs_nothing_else(page_path):
    html = page_path.read_text()
    assert html.count("<video") == 5 * 3 and "Base &amp; adapters" in html
    assert "&lt;b&gt;red&lt;/b&gt;" in html and "<b>red</b>" not in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    told = "5 of 8 prompts, the first ones of each category in turn, not chosen by their scores"
    for expected in ("ours, seed 1", "p (Holm)", "Joint proportion by group", "Votes", "1 of 16", "ours: rewards",
                     "made by a test", "seed 0 of [0, 1]", told):  # fmt: skip
        assert expected in text, expected


def test_page_filters_by_category_and_by_difference_and_fits_a_phone(page_path):
    with chromium() as browser:
        for width in (1280, 390):
            with page_of(browser, viewport={"width": width, "height": 844}) as page:
                page.goto(page_path.as_uri())
                shown = page.locator("article:visible")
                assert shown.count() == 5
                page.select_option("#category", "roll")
                assert page.locator("#shown").inner_text() == "2 of 5 prompts" and shown.count() == 2
                page.select_option("#category", "")
                page.select_option("#spread", "0.25")
                assert shown.count() == 5  # base differs by 0.3 everywhere
                page.select_option("#spread", "0.5")
                assert page.locator("#shown").inner_text() == "0 of 5 prompts" and shown.count() == 0
                page.select_option("#spread", "0")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                cells = [cell.bounding_box() for cell in page.locator("article").first.locator("video").all()]
                assert len({cell["y"] for cell in cells}) == 1 and min(cell["width"] for cell in cells) >= 130
