"""Tables 1, 2 and 7 of Reg-DPO on the sandbox: arms, marked rows, and tables of the results that are there."""

import random
import sys
from statistics import fmean

import pytest

from tests.examples.studies.test_preferences import SENTENCES, SMALL, load
from tests.support.evaluation.runs import make_run
from video_trl.curation.annotated import DIMENSIONS
from video_trl.experiment import BASE


@pytest.fixture(scope="module")
def study():
    load("preferences")
    return load("gt_pair_tables")


def test_the_arms_are_those_of_table_7(study):
    options = {name: study.ARMS[name].options for name in study.TABLES["hyperparameters"]}
    ranks = [(o["lora_rank"], o["lora_alpha"]) for o in options.values() if "lora_rank" in o]
    assert ranks == [(4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
    rates = [study.ARMS[name].rate for name in options if ", rate " in name]
    assert rates == pytest.approx([rate / 5e-6 for rate in (1e-6, 1.5e-5, 5e-5)])
    assert study.ARMS[study.CENTRE].rate == 1
    assert [500 * factor for factor in study.BETAS.values()] == [100, 1000, 2000]
    assert study.ARMS[study.CENTRE] == sys.modules["preferences"].ARMS[study.CENTRE]  # one folder for both studies
    assert options["Reg-DPO, all weights"]["use_peft"] is False
    assert all(o["sft_weight_mode"] == "dgr" and o["sft_coefficient"] == 1 for o in options.values())
    assert {arm for table in study.TABLES.values() for arm in table} == set(study.ARMS)


def _group(number, *pcs):
    return {
        "prompt": f"A ball falls, {number}.",
        "chosen": f"real-{number}.mp4",
        "rejected": [{"path": f"{number}-{place}.mp4", "bytes": b"of a file"} for place in range(len(pcs))],
        "rejected_scores": [{"sa": pc, "pc": pc} for pc in pcs],
    }


def test_annotators_see_what_the_judge_sees_but_for_an_error(study):
    given = [study.marks({"sa": 0.0, "pc": 0.75}, random.Random(seed)) for seed in range(100)]
    means = {name: fmean(mark[name] for mark in given) for name in DIMENSIONS}
    assert means["motion_quality"] == pytest.approx(4, abs=0.25)
    assert means["overall_quality"] == pytest.approx(2.5, abs=0.25)
    assert 1 <= means["instruction_adherence"] < 1.6  # an error below 1 is none
    assert len({mark["motion_quality"] for mark in given}) > 2


def test_marked_pairs_are_as_many_as_the_real_ones_and_mostly_right(study, tmp_path, monkeypatch):
    groups = [_group(number, 0.2, 0.8, 0.5) for number in range(8)]
    rows = study.PairRows(tmp_path, 12, 3, 0.6)
    monkeypatch.setattr(rows, "trained", lambda *_, **__: groups)
    annotated = rows.of("annotated")
    assert len(annotated) == 8 and all(set(row) == {"prompt", "chosen", "rejected"} for row in annotated)
    marked = [(row["chosen"], row["rejected"]) for row in annotated]
    right = [(groups[number]["rejected"][1], [groups[number]["rejected"][0]]) for number in range(8)]
    assert sum(pair in right for pair in marked) >= 6
    both = rows.of("both")
    assert both[:8] == annotated and len(both) == 16
    assert both[8] == {"prompt": groups[0]["prompt"], "chosen": "real-0.mp4", "rejected": groups[0]["rejected"][:1]}


def test_tables_say_what_is_there(study, tmp_path):
    from trl import TrlParser

    from video_trl import VideoGroupDPOConfig
    from video_trl.experiment import ExperimentArguments
    from video_trl.load import ScriptArguments

    parser = TrlParser((ScriptArguments, ExperimentArguments, VideoGroupDPOConfig))
    argv = [*study.DEFAULTS, *SMALL, "--seeds", "0", "--output_dir", str(tmp_path)]
    runner = study.TableRunner(*parser.parse_args_and_config(args=argv))
    for arm, pc in ((BASE, 0.4), (study.DPO, 0.8), (study.ANNOTATED, 0.45)):
        folder = tmp_path / "runs" / runner.unit(arm, 0)
        make_run(folder, arm, [(0.8, pc)] * 8, prompts=SENTENCES, training_seed=None if arm == BASE else 0)
    text = study.page(runner, ["pairs"])
    lines = [line.split() for line in text.splitlines()]
    assert ["DPO", "vs", "base", "1", "8/0/0", "inf", "0/8/0", "1.00"] in lines
    assert ["DPO,", "annotated", "vs", "base", "1", "0/8/0", "1.00", "0/8/0", "1.00"] in lines
    (pc,) = [float(line[2]) for line in lines if line[:2] == ["DPO", "1"]]
    assert pc == pytest.approx(0.8, abs=0.01) and study.BOTH not in text
    (gain,) = [line for line in lines if line[:4] == ["pc", "DPO", "vs", "base"]]
    assert "+0.400" in gain and "better" not in text  # of one seed nothing is called so
