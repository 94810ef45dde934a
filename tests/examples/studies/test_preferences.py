"""The studies of preferences: arms, rows, a small piece of them for real, and that pages say what the numbers say."""

import dataclasses
import json
import math
import shutil

import pytest

from tests.support.evaluation.runs import make_run
from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script
from video_trl.evaluation.evaluate import sandbox_prompts
from video_trl.experiment import BASE, FOUND, JUDGED, PLAIN, REG_DPO
from video_trl.files import write_atomically


SENTENCES = sandbox_prompts(8, seed=1)
SMALL = ["--found_clips", "12", "--eval_prompts", "5", "--eval_seeds", "1", "--max_steps", "2"]
SMALL += ["--per_device_train_batch_size", "2"]
MARKS = "<!-- results of examples/studies/preferences_report.py -->\nold text\n<!-- end of results -->"


def load(name):
    """A script as the module that its neighbour imports by its bare name."""
    return load_script(EXAMPLES / "studies" / f"{name}.py", name)


@pytest.fixture(scope="module")
def study():
    return load("preferences")


@pytest.fixture(scope="module")
def report(study):
    return load("preferences_report")


def test_the_arms_of_reg_dpo_are_those_of_the_paper(study):
    """r = 25, 50, 125, 300, 500 where DGR starts at 125; DGR times 1/5, 1/2, 1, 2; DPO; the base model."""
    weights = [study.ARMS[arm].options for arm in study.STUDIES["reg_dpo"].arms]
    by_mode = {
        mode: [o["sft_coefficient"] for o in weights if o["sft_weight_mode"] == mode] for mode in ("fixed", "dgr")
    }
    assert by_mode == {"fixed": [0, 25, 50, 125, 300, 500], "dgr": [0.2, 0.5, 1, 2]}


def test_compared_arms_are_in_the_table_of_their_study_and_every_arm_is_in_one(study):
    for part in study.STUDIES.values():
        of_study = [*part.arms, *part.further]
        assert {arm for pair in part.comparisons for arm in pair} <= {BASE, *of_study}
        assert len(set(part.comparisons)) == len(part.comparisons) and len(set(of_study)) == len(of_study)
    assert {arm for part in study.STUDIES.values() for arm in (*part.arms, *part.further)} == set(study.ARMS)


def test_every_kind_of_loser_meets_every_objective_and_equal_time(study):
    """Arms that other studies have are theirs; each is compared with fine-tuning in its time on its own winners."""
    part, per_winner = study.STUDIES["losers"], len(study.OBJECTIVES)
    assert {winners: len(arms) for winners, arms in study.BY_WINNERS.items()} == {
        "": 5 * per_winner, "wild": 5 * per_winner, "few": 3 * per_winner,
    }  # fmt: skip
    assert {study.PHYGDPO, PLAIN, study.DPO, "PhyGDPO, twins", "PhyGDPO, wild against twins"} <= set(study.GRID)
    assert set(study.GRID) < {*part.arms, *part.further}
    baseline = dict(part.comparisons[:-1])
    assert set(baseline) >= {*part.arms} - {*study.EQUAL_UPDATES.values()}  # what is run is compared
    for arm in study.BY_WINNERS["wild"]:
        assert study.ARMS[arm].data.startswith("wild") and baseline[arm] == study.WILD_LONGER
    assert baseline["hinge, few partial"] == study.FEW_LONGER and study.ARMS[study.FEW_LONGER].steps == study.LONG
    assert study.ARMS["log-ratio, wild repaint"].options["gap"] == "log_ratio"
    assert study.ARMS["hinge, own"].data == "judged"


@pytest.mark.slow
def test_losers_are_made_of_the_winner_and_judged(study, tmp_path):
    _, runner = study.parse([*SMALL, "--found_clips", "24", "--output_dir", str(tmp_path)])
    winners, partial, masked = runner.rows.trained(), runner.rows.of("partial"), runner.rows.of("wild repaint")
    assert partial["prompt"] == masked["prompt"] == winners["prompt"] and "loss_weights" in masked.column_names
    assert all(len(row["rejected"]) == len(row["rejected_scores"]) == 3 for row in (*partial, *masked))
    assert runner.rows.of("few partial")[0]["prompt"] == winners[0]["prompt"]
    assert any(score["pc"] < 0.4 for row in partial for score in row["rejected_scores"])
    stamp = (tmp_path / "partial" / "pairs.parquet").stat().st_mtime_ns
    runner.rows.of("partial")
    assert (tmp_path / "partial" / "pairs.parquet").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_arms_of_the_sandbox_experiment_are_its_arms(study, tmp_path):
    """Same folder, same configuration: what `make bench-sandbox` left is what the study would train."""
    from video_trl import experiment

    _, runner = study.parse([*SMALL, "--output_dir", str(tmp_path), "--max_steps", "400"])
    groups, found = runner.rows.of("judged"), runner.rows.of("found")
    for arm in (*experiment.ARMS, PLAIN, experiment.LONGER):
        args = dataclasses.replace(
            runner.args, output_dir=str(tmp_path / runner.unit(arm, 1)), overwrite_output_dir=True
        )
        theirs = experiment._trainer(arm, 1, args, found if arm == FOUND else groups)
        ours = runner.trainer(arm, 1)
        assert type(theirs) is type(ours) and theirs.args.to_dict() == ours.args.to_dict()
        assert len(theirs.train_dataset) == len(ours.train_dataset)


def made(runner, arm, seed, gain, *, win_gap=0.0, fall=0.0):
    """An arm with one training seed: `pc` is 0.4 and the gain, half of the clips are lawful and `sa` is 0.8."""
    folder = runner.folder / "runs" / runner.unit(arm, seed)
    training_seed = None if arm == BASE else seed
    scores = [(0.8, 0.4 + gain)] * len(SENTENCES)
    make_run(folder, arm, scores, prompts=SENTENCES, training_seed=training_seed)
    (folder / "modes.json").write_text(json.dumps(["lawful", "neither"] * 4))
    log = [
        {"step": step, "loss": 1.0, "loss/dpo": 0.69 * math.exp(-fall * step), "dgr": 125 - fall * step}
        | {"win_gap": win_gap * step, "lose_gap": (win_gap + 0.001) * step, "chosen_weight": 200.0 - fall * step}
        for step in range(20, 401, 20)
    ]
    result = {"cpu_seconds": 60.0, "win_gaps": [win_gap, win_gap + 0.01], "log_history": log}
    write_atomically(runner.folder / runner.unit(arm, seed) / "arm.json", json.dumps(result))


def cells(text, table, start):
    """The row that begins with a text, of the table under a heading."""
    lines = text.split(f"### {table}")[1].split("###")[0].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def written(study, report, tmp_path):
    """Makes results, writes the page of a study over an older one and returns its text."""

    def write(name, results):
        argv = ["--output_dir", str(tmp_path / "out"), "--studies", name]
        _, runner = study.parse(argv)
        runner.claim_folder()
        for arm, seed, values in results:
            made(runner, arm, seed, **values)
        page = tmp_path / study.STUDIES[name].page
        page.write_text(f"# Title\n\n{MARKS}\n\n## Reading\n")
        report.main([*argv, "--pages", str(tmp_path)])
        text = page.read_text()
        assert text.startswith("# Title") and text.endswith("## Reading\n") and "old text" not in text
        assert text.count("### Scores") == 1 and (tmp_path / page.with_suffix(".png")).stat().st_size > 5000
        return text

    return write


def test_a_page_says_what_is_there_and_what_is_missing(study, written):
    results = [(BASE, 0, {"gain": 0.0}), (FOUND, 0, {"gain": 0.2})]
    results += [(JUDGED, seed, {"gain": 0.4}) for seed in range(3)]
    text = written("controls", results)
    number = len(study.STUDIES["controls"].arms)
    assert f"Whole: 4 of {3 * number} runs" in text and "4 CPU minutes" in text
    # A video's colours are its scores, to about 1/255.
    pc, closed, sa, ways, *others = cells(text, "Scores", BASE)[4:]
    assert float(pc) == pytest.approx(0.4, abs=0.01) and float(sa) == pytest.approx(0.8, abs=0.01)
    assert (closed, ways, others) == ("", "50, 0, 50", ["", ""])
    seeds, videos, seconds, pc, closed = cells(text, "Scores", JUDGED)[1:6]
    assert (seeds, videos, seconds) == ("3", "800", "60") and float(pc) == pytest.approx(0.8, abs=0.01)
    assert 60 <= int(closed.rstrip(" %")) <= 70
    seeds, difference, p, words = cells(text, "Comparisons", f"{JUDGED} over {BASE}")[1:5]
    # A sign test of 8 sentences out of 8, times the three comparisons that can be made.
    assert (seeds, words) == ("3", "better") and float(p) == pytest.approx(3 * 2 / 2**8, abs=1e-3)
    assert float(difference.split()[0]) == pytest.approx(0.4, abs=0.01)
    row = cells(text, "Comparisons", f"{JUDGED} over {FOUND}")
    assert (row[1], row[4]) == ("1", "higher in 1 seed (a verdict needs 3)")
    scores, comparisons = [line for line in text.splitlines() if line.startswith("**Not run yet:**")]
    assert f" {REG_DPO};" in scores and JUDGED not in scores.split("; ")
    assert f" {REG_DPO} over DPO;" in comparisons and f"{JUDGED} over {FOUND};" not in comparisons


@pytest.mark.slow
def test_claims_follow_from_the_numbers(study, written):
    arms = study.STUDIES["reg_dpo"].arms
    results = [(BASE, 0, {"gain": 0.0})]
    for arm, seed in study.itertools.product(arms, range(3)):
        bad = arm == "DPO"
        gap = 0.1 if bad else -0.02 if arm == "r = 125" else 0.001
        values = {"gain": -0.2 if bad else 0.2, "win_gap": gap, "fall": 0.3 if bad else 0.01}
        results.append((arm, seed, values))
    text = written("reg_dpo", results)
    outcomes = {
        "DPO: gradient ratio and loss fall sharply": "holds",
        "... while both gaps rise": "holds",
        "DPO degrades the videos": "in part: pc (1 of 3)",
        "the win gap is negative from about r = DGR on": "in part: r = 125 (1 of 5)",
        "r = DGR beats DPO": "in part: pc (1 of 3)",
        "beyond r = DGR nothing changes": "holds",
    }
    assert {claim: cells(text, "The paper's claims", claim)[2] for claim in outcomes} == outcomes
    assert "(9 of 9)" in cells(text, "The paper's claims", "the SFT term curbs the win gap")[2]
    # The mean ratio of ten entries is below half of its start for the first time over steps 120 to 300.
    assert cells(text, "At the end of training", "DPO")[-1] == "300, 300, 300"
    assert cells(text, "At the end of training", "r = 25")[-1] == "never, never, never"
    assert "reg_dpo_curves.png" in text


def test_costs_of_the_reference_stand_in_the_ablation(study, written, tmp_path):
    memory = {"weights": 2**20, "training": 2**21, "trained": 1234}
    write_atomically(tmp_path / "out" / "memory" / "sft-judged-seed0.json", json.dumps(memory))
    text = written("phygdpo", [(BASE, 0, {"gain": 0.0}), (JUDGED, 0, {"gain": 0.1}), (PLAIN, 0, {"gain": 0.1})])
    assert cells(text, "Table 2d: the reference", JUDGED)[1:5] == ["1,234", "1.0 MiB", "3.0 MiB", "0.0 MiB"]
    assert text.count(f"**Not run yet:** {study.COPIED}; {PLAIN}.") == 1  # their memory was not measured


def test_what_the_errors_did_stands_under_the_losers(study, written):
    arm = "safeguard, wild twins"
    gains = {BASE: 0.0, study.WILD_LONGER: 0.2, arm: 0.3}
    text = written("losers", [(name, 0, {"gain": gain}) for name, gain in gains.items()])
    part = study.STUDIES["losers"]
    assert f"Whole: 1 of {3 * len(part.arms)} runs" in text  # the short list is the study
    scores, comparisons = [line for line in text.splitlines() if line.startswith("**Not run yet:**")]
    assert scores.count(";") == len(part.arms) - 2 and "repaint" not in scores + comparisons
    assert f"Further {len(part.further) - 1} arms are there for `--arms`, and were not run." in text
    assert cells(text, "What the errors did", arm)[1:4] == ["0", "+0.0050 [+0.0000, +0.0100]", "0"]
    found = cells(text, "Comparisons", f"{arm} over {study.WILD_LONGER}")[2]
    assert float(found.split()[0]) == pytest.approx(0.1, abs=0.01)  # scores are colours of compressed videos


def test_what_cannot_be_written_or_is_unknown_is_refused(study, report, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--studies", "reg_dpo"]
    page = tmp_path / "reg_dpo_stability.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="expected each of the lines"):
        report.main([*argv, "--pages", str(tmp_path)])
    assert page.read_text() == "# Title\n"
    page.write_text(MARKS)
    with pytest.raises(ValueError, match="evaluation of the base model"):
        report.main([*argv, "--pages", str(tmp_path)])
    with pytest.raises(ValueError, match="got {'ddpo'}"):
        study.main([*argv, "--arms", "ddpo"])
    study.parse(argv)[1].claim_folder()
    with pytest.raises(ValueError, match="was made with .*'beta': 500.*expected .*'beta': 7.0"):
        study.main([*argv, "--beta", "7"])


@pytest.mark.slow
def test_arms_are_trained_judged_and_not_made_again(study, report, tmp_path):
    """The real thing, small: rows found, drawn, chosen and made anew, both kinds of weights, a cut, a page."""
    argv = [*SMALL, "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--seeds", "0"]
    arms = [BASE, study.COPIED, FOUND, "PhyGDPO, wild against twins", "PhyGDPO, own best", "PhyGDPO, r = 0, m = 1"]
    study.main([*argv, "--arms", *arms])
    assert (tmp_path / "phygdpo-own-best-seed0" / "pytorch_lora_weights.safetensors").is_file()
    _, runner = study.parse(argv)
    copied = runner.unit(study.COPIED, 0)
    assert (tmp_path / copied / "transformer" / "config.json").is_file()
    scores = {arm: [row["pc"] for row in runner.table(arm, 0).rows()] for arm in (BASE, study.COPIED)}
    assert scores[BASE] != scores[study.COPIED]  # what was trained was evaluated
    runner.measure_memory(study.COPIED)
    memory = json.loads((tmp_path / "memory" / f"{copied}.json").read_text())
    assert memory["weights"] == 2 * 4 * memory["trained"]  # float32, all of them, twice
    assert memory["training"] > 3 * 4 * memory["trained"]  # a gradient and two moments of AdamW, and more

    shutil.rmtree(tmp_path / "runs" / copied)  # cut between training and evaluation
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    study.main([*argv, "--arms", *arms])
    assert runner.table(study.COPIED, 0) is not None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == trained
    (tmp_path / "sandbox_controls.md").write_text(MARKS)
    report.main([*argv, "--pages", str(tmp_path), "--studies", "controls"])
    assert "twins | 1 | 8 |" in (tmp_path / "sandbox_controls.md").read_text()
