"""The testbed: what is fixed and what a method may choose, its page, and a small game played for real, twice."""

import copy
import json
import shutil
import sys

import pytest

from video_trl import testbed
from video_trl.cli import main
from video_trl.files import write_atomically
from video_trl.methods import Method, own_methods
from video_trl.testbed import Entry


SMALL = testbed.Game(found_clips=24, num_rejected=3, updates=2, rows=2, lora_rank=2, sentences=3)
SENTENCES = [f"sentence {number}" for number in range(12)]
SFT, EQUAL_TIME = testbed.sft_entry(), testbed.sft_entry(2.5)


def entry(name="gdpo", **options):
    return Entry(name, next(method for method in own_methods() if method.name == name), options)


def units(gain, name="m"):
    """Of every regime and seed: `pc` is 0.4 and the gain, a little more from sentence to sentence."""
    return [
        {"regime": regime, "seed": seed, "updates": 150, "rows": 4, "cpu_seconds": 30.0, "weights": f"{name}{seed}"}
        | {"pc": [0.4 + gain + 0.001 * number * seed for number in range(12)], "sa": [0.9] * 12}
        | {"win_gap": [-0.01, -0.02, -0.03], "lose_gap": [0.1, 0.2, 0.3]}
        for regime in testbed.REGIMES
        for seed in testbed.SEEDS
    ]


def made(name="new", gain=0.3):
    """Results of an entry that gains so much, where fine-tuning gains 0.1, and in equal time 0.2."""
    return {
        "game": testbed.results.asdict(testbed.GAME),
        "entry": {"name": name, "path": f"mine:{name}", "options": {"beta": 5.0}, "updates": 1.0},
        "cost": {"time": 2.5, "memory": 3 * 2**20},
        "equal_time": EQUAL_TIME.name,
        "seeds": [0, 1, 2],
        "regimes": list(testbed.REGIMES),
        "sentences": SENTENCES,
        "video_trl": "0.1.0",
        "torch": "2",
        "machine": "x86_64",
        "real_pc": 1.0,
        "base": [{"pc": 0.4, "sa": 0.9} for _ in SENTENCES],
        "units": {name: units(gain, name), "SFT": units(0.1), EQUAL_TIME.name: units(0.2)},
    }


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.mark.parametrize("name", [method.name for method in own_methods()])
def test_every_own_method_can_enter_with_the_recipe(name, tmp_path):
    bed, entered = testbed.Testbed(tmp_path, SMALL), SFT if name == "sft" else entry(name)
    bed.enter(entered)
    args = bed.config(entered, 1, str(tmp_path / "x"))
    assert (args.max_steps, args.per_device_train_batch_size, args.lora_rank, args.seed) == (2, 2, 2, 1)
    assert (args.learning_rate, args.timestep_range, args.lora_target_modules) == (1e-3, [850, 1000], "all-linear")
    assert vars(args).get("sft_weight", 500.0) == 500.0 and vars(args).get("sft_coefficient", 500.0) == 500.0


def test_own_options_win_over_the_recipe_and_nothing_else(tmp_path):
    bed = testbed.Testbed(tmp_path, SMALL)
    args = bed.config(entry(sft_weight=0.0, learning_rate=1e-4), 0, str(tmp_path / "x"))
    assert (args.sft_weight, args.learning_rate) == (0.0, 1e-4)
    assert bed.config(EQUAL_TIME, 0, str(tmp_path / "x")).max_steps == 5
    for option in ("max_steps", "lora_rank", "per_device_train_batch_size", "seed", "output_dir"):
        with pytest.raises(ValueError, match=f"{option}: fixed by the game"):
            bed.enter(entry(**{option: 3}))
    with pytest.raises(ValueError, match="VideoGroupDPOConfig has no option betta"):
        bed.enter(entry(betta=3))


def test_a_folder_has_one_game_and_one_entry_of_a_name(tmp_path):
    bed = testbed.Testbed(tmp_path, SMALL)
    bed.enter(entry(beta=5.0))
    bed.enter(entry(beta=5.0))
    with pytest.raises(ValueError, match="holds the entry .*'beta': 5.0.*Pass --name"):
        bed.enter(entry(beta=6.0))
    with pytest.raises(ValueError, match="'sft' is the name of fine-tuning.*Pass --name"):
        bed.enter(entry("sft", learning_rate=1e-4))
    bed.enter(SFT)
    with pytest.raises(ValueError, match="was made by the rules"):
        testbed.Testbed(tmp_path)
    with pytest.raises(ValueError, match="one or more regimes among clean, few, wild, found, own"):
        testbed.Testbed(tmp_path / "other", SMALL, regimes=["clear"])


def test_units_of_a_method_whose_module_was_edited_are_not_taken_for_its_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "method_that_is_edited.py"
    module.write_text("from video_trl import VideoSFTTrainer as Mine")
    bed, mine = testbed.Testbed(tmp_path / "bed", SMALL), Entry("mine", Method("mine", f"{module.stem}:Mine"))
    bed.enter(mine)
    bed.enter(mine)
    module.write_text("from video_trl import VideoSFTTrainer as Mine  # another")
    with pytest.raises(ValueError, match="holds the entry .*hash of the method's module.*delete the folder"):
        bed.enter(mine)
    assert "code" not in entry().describe()
    for name in ("data", "方法"):
        with pytest.raises(ValueError, match="makes no folder of its own beside data, encoded, runs"):
            bed.enter(Entry(name, mine.method))


def test_others_that_cannot_be_ranked_are_told_before_anything_is_trained(tmp_path, capsys):
    """And one of two entries of a name is not silently left out."""
    other = tmp_path / "other.json"
    for content, words in ((made("weak"), "have another game"), ({"a": 1}, "Expected the results.json of an entry")):
        other.write_text(json.dumps(content))
        assert main(["testbed", "gdpo", "--trial", "--output_dir", str(tmp_path / "bed"), "--others", str(other)]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "bed" / "data").exists()
    same_name = made("weak") | {"entry": made("weak")["entry"] | {"options": {}}}
    with pytest.raises(ValueError, match="Two entries are called 'weak'"):
        testbed.page(made(), [made("weak"), same_name])
    assert "weak" in testbed.page(made(), [made("weak"), made("weak")])


def test_a_rerun_is_not_compared_with_itself(tmp_path, capsys):
    made_before = tmp_path / "new" / "results.json"
    made_before.parent.mkdir()
    made_before.write_text(json.dumps(made()))
    assert main(["testbed", "--rerun", str(made_before), "--output_dir", str(tmp_path)]) == 2
    assert "pass another --output_dir" in capsys.readouterr().err
    assert main(["testbed", "--rerun", str(made_before), "--seeds", "0", "--trial"]) == 2
    assert "leave --seeds, --trial out" in capsys.readouterr().err


def test_a_wrong_method_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="expected a class that extends `VideoTrainer`"):
        testbed.play(testbed.Testbed(tmp_path, SMALL), Entry("own", Method("own", "json:JSONDecoder")))
    assert not (tmp_path / "data").exists()


def test_the_page_ranks_and_compares():
    text = testbed.page(made(), [made("weak", -0.1), made("middle", 0.25)])
    ranked = [line(text, str(rank))[1] for rank in range(1, 6)]
    assert ranked == ["new", "middle", EQUAL_TIME.name, "SFT", "weak"]
    assert line(text, "1")[2:5] == ["0.706", "51 %", "+0.305 [+0.304, +0.307]"]
    assert line(text, "1")[5:] == ["-0.0200 [-0.0300, -0.0100]", "+0.2000 [+0.1000, +0.3000]", "30"]
    assert line(text, "clean")[1:] == ["0.706", "+0.200 [+0.200, +0.200]: better", "+0.100 [+0.100, +0.100]: better"]
    assert "mine:new with beta=5.0. 5 regimes x 3 training seeds, 12 held-out sentences" in text
    assert "corrected by Holm's method" in text and "12 sign tests" in text and "A trial" not in text
    worse = testbed.page(made("weak", -0.1))
    assert line(worse, "all regimes")[2] == "-0.200 [-0.200, -0.200]: worse"


def test_a_part_of_the_game_is_called_one():
    """And one regime is not compared twice, which would double its p."""
    found = made() | {"regimes": ["few"]}
    of_regime = {name: [unit for unit in each if unit["regime"] == "few"] for name, each in found["units"].items()}
    text = testbed.page(found | {"units": of_regime})
    assert "**A part of the game,** which has the regimes clean, few, wild, found, own" in text
    assert "Verdicts need 2 sign tests" in text and "all regimes" not in text
    assert "A part" not in testbed.page(made()) and "A part" in testbed.page(made() | {"seeds": [0]})


def test_fine_tuning_by_itself_is_compared_with_nothing():
    alone = made(SFT.name, 0.1) | {"equal_time": SFT.name, "units": {SFT.name: units(0.1)}}
    text = testbed.page(alone)
    assert line(text, "clean") == ["clean", "0.506"] and "Verdicts" not in text


def test_other_rules_are_not_compared():
    other = made("weak") | {"game": testbed.results.asdict(SMALL)}
    with pytest.raises(ValueError, match="Results of 'weak' have another game: not compared"):
        testbed.page(made(), [other])
    assert "**A trial:**" in testbed.page(other)


def test_a_second_run_tells_every_other_bit():
    first, second = made(), made()
    assert testbed.differences(first, second) == []
    second["units"]["new"][4]["weights"] = "others"
    second["units"]["SFT"][0]["pc"] = [0.5 + 2**-53] * 12
    second["torch"] = "3"
    assert testbed.differences(first, second) == [
        "torch: 2 and 3",
        "new, few, seed 1: weights",
        "SFT, clean, seed 0: pc",
    ]


def test_wrong_usage_is_told(capsys):
    assert main(["testbed", "gdpo", "--rerun", "results.json"]) == 2
    assert main(["testbed", "--trial"]) == 2
    assert main(["testbed", "gdpoo"]) == 2
    errors = capsys.readouterr().err
    assert "--rerun takes the method from the file" in errors and "name a method, as in" in errors and "gdpo" in errors


def test_a_trainer_of_this_folder_is_found_from_its_results_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "method_of_this_folder.py").write_text("class Mine: ...")
    results = made() | {"entry": {"name": "mine", "path": "method_of_this_folder:Mine", "options": {}, "updates": 1.0}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert main(["testbed", "--rerun", "results.json", "--output_dir", "again"]) == 1
    assert main(["rounds", "--method", "method_of_this_folder:Mine", "--output_dir", "rounds"]) == 1
    assert capsys.readouterr().err.count("expected a class that extends `VideoTrainer`") == 2


@pytest.mark.slow
def test_a_game_is_played_stopped_and_played_again_with_the_same_bits(tmp_path, capsys):
    """Data, three trainings, evaluations and gaps for real; what is whole is not made again; and from the JSON."""
    regimes = ["few"]
    bed, safe = testbed.Testbed(tmp_path / "one", SMALL, [0], regimes), entry(safeguard="output")
    lines = []
    found = testbed.play(bed, safe, ratio=1.5, tell=lines.append)
    made = ["[1/1] SFT, few, seed 0", "[1/1] SFT, 1.5 x updates, few, seed 0", "[1/1] gdpo, few, seed 0"]
    assert [line.split(":")[0] for line in lines] == made
    assert found["units"]["SFT, 1.5 x updates"][0]["updates"] == 3
    for each in found["units"].values():
        assert all(len(unit["pc"]) == 3 and len(unit["win_gap"]) == 1 for unit in each)
    gaps = [found["units"][name][0]["win_gap"] for name in found["units"]]
    assert gaps[0] != gaps[1] and all(abs(gap[0]) < 1 for gap in gaps)
    stamp = (tmp_path / "one" / "sft" / "few-seed0" / "unit.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "one" / "gdpo" / "few-seed0")  # as if it had been stopped there
    assert testbed.differences(found, testbed.play(bed, safe)) == []
    assert (tmp_path / "one" / "sft" / "few-seed0" / "unit.json").stat().st_mtime_ns == stamp
    file = tmp_path / "one" / "gdpo" / "results.json"
    assert main(["testbed", "--rerun", str(file), "--output_dir", str(tmp_path / "two")]) == 0
    assert "3 units made again; equal to the last bit" in capsys.readouterr().out
    changed = copy.deepcopy(found)
    changed["units"]["gdpo"][0]["weights"] = "0"
    write_atomically(file, json.dumps(changed))
    assert main(["testbed", "--rerun", str(file), "--output_dir", str(tmp_path / "two")]) == 1
    assert "differs: gdpo, few, seed 0: weights" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "time"), [(2.8, 3.0), (2.7, 2.5), (0.6, 1.0)])
def test_the_time_of_an_update_is_that_of_median_ones_to_the_half(seconds, time, tmp_path, monkeypatch):
    """An update of fine-tuning takes a second; one of five takes long, because of what else the machine does."""
    bed, asked = testbed.Testbed(tmp_path, SMALL, [0], ["clean"]), []

    def of_updates(entry):
        asked.append(entry.name)
        usual = 1.0 if entry.name == "SFT" else seconds
        return [9.0, *[usual] * 4]

    monkeypatch.setattr(bed, "_seconds_of_updates", of_updates)
    monkeypatch.setattr(bed, "trainer", lambda *args, **changes: None)
    monkeypatch.setattr("video_trl.testbed.game.peak_of_tensors", lambda trainer: 7)
    assert bed.cost(entry()) == bed.cost(entry()) == {"time": time, "memory": 7}
    assert asked == ["gdpo", "SFT"] * 2  # in turn, and once


@pytest.mark.slow
def test_the_cost_of_an_update_is_measured_beside_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setattr("video_trl.testbed.game._TIMED_STEPS", 2)
    monkeypatch.setattr("video_trl.testbed.game._UNTIMED_STEPS", 1)
    bed = testbed.Testbed(tmp_path, SMALL, [0], ["clean"])
    cost = bed.cost(entry())
    assert cost["time"] >= 1 and cost["time"] % 0.5 == 0
    assert cost["memory"] > bed.cost(SFT)["memory"] > 0
    seconds = bed._seconds_of_updates(entry())
    assert len(seconds) == 2 and min(seconds) > 0
