"""Rounds: options, allocation, when they end, and three real rounds that are stopped and go on."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file

import video_trl.curation.rounds as rounds_module
from tests.support.adapters import IN_FOLDER, adapter
from tests.support.tiny import tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import assert_equal_weights, config, first_batch, trainer
from video_trl.cli import main
from video_trl.curation import Round, RoundsConfig, run_rounds
from video_trl.curation.rounds import _Rounds
from video_trl.files import read_json


class Table:
    """What `gain` reads of an evaluation."""

    def __init__(self, values):
        self.values = values

    def rows(self):
        return [{"prompt": f"p{number}", "pc": value} for number, value in enumerate(self.values)]


class Scored:
    """What `losers` reads of an evaluation."""

    def __init__(self, rows):
        self.rows = lambda: rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "first"}, "`reference` must be one of 'base', 'previous', got 'first'"),
        ({"metric": "fvd"}, "`metric` must be one of 'pc', 'sa', 'joint'"),
        ({"num_rejected": 0}, "of at least 1"),
        ({"eval_seeds": []}, "an evaluation seed"),
        ({"eval_seeds": [1, 1]}, "different `eval_seeds`"),
        ({"seed": -1}, "a `seed` of at least 0"),
        ({"tau": float("nan")}, "`tau` of at least 0"),
        ({"batch_size": 0}, "`batch_size` of at least 1"),
        ({"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}, "needs `dataset_name` and `eval_prompts`"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RoundsConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gdpoo"}, "`method` must be one of sft, dpo"),
        ({"training": {"seed": 3}}, "`training` leaves seed to the rounds"),
        ({"training": {"init_adapter": "mine"}}, "`training` leaves init_adapter to the rounds"),
        ({"training": {"betta": 3}}, "`training`: .*betta"),
        ({"training": {"use_peft": False}}, "Rounds hand adapters .*use_peft=False"),
        ({"training": {"transformer_file": __file__}}, "transformer_file"),
        ({"training": {"eval_strategy": "epoch"}}, "needs an `eval_dataset`"),
        ({"training": {"pair_weights": True}, "method": "dpo"}, "needs the column 'weight'"),
        ({"method": "sft"}, "`method='sft'` trains on single videos, but rounds make rejected videos"),
        ({"training": {"model_init_kwargs": {"revision": "a"}}}, "trains revision 'a', .*videos with None"),
        ({"generation": '{"steps": 3}'}, "`generation` has no steps; it takes call_kwargs, device"),
        ({"judge": "nobody"}, "No judge 'nobody'"),
        ({"num_eval_prompts": 1}, "needs two held-out prompts, got 1"),
        ({"eval_prompts": "gone.txt"}, "gone.txt cannot be read"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_made(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_rounds(RoundsConfig(output_dir=str(tmp_path / "rounds"), **changes))
    assert not (tmp_path / "rounds").exists()


def test_a_folder_of_other_rounds_is_refused_and_more_rounds_are_not(tmp_path):
    def check(**changes):
        maker = _Rounds(RoundsConfig(output_dir=str(tmp_path), **changes))
        maker.rows = [{"prompt": "p", "chosen": "0.mp4"}]
        maker.check()

    check(max_rounds=2)
    check(max_rounds=5)
    with pytest.raises(ValueError, match="holds rounds of .*Pass another folder"):
        check(budget=3)


def test_the_adapter_that_rounds_begin_with_is_known_by_its_weights(tmp_path):
    def check(**changes):
        maker = _Rounds(RoundsConfig(output_dir=str(tmp_path / "rounds"), **changes))
        maker.rows = [{"prompt": "p", "chosen": "0.mp4"}]
        maker.check()

    with pytest.raises(ValueError, match="No adapter in"):
        check(init_adapter=str(tmp_path))
    assert not (tmp_path / "rounds").exists()
    _, file = adapter("wan-t2v", tmp_path / "first")
    check(init_adapter=str(file))
    check(init_adapter=str(shutil.copytree(file.parent, tmp_path / "copy")))
    with pytest.raises(ValueError, match="holds rounds of"):
        check()
    _, file = adapter("wan-t2v", tmp_path / "other", r=2)
    with pytest.raises(ValueError, match="holds rounds of"):
        check(init_adapter=str(file))


def test_a_folder_that_was_moved_is_gone_on_with(tmp_path):
    def maker_in(folder):
        maker = _Rounds(RoundsConfig(output_dir=str(folder)))
        maker.rows = [{"prompt": "p", "chosen": "0.mp4"}]
        maker.check()
        return maker

    old, new = tmp_path / "old", tmp_path / "new"
    maker_in(old)
    done = Round(1, str(old / "round-1" / "adapter"), "h", str(old / "start"), {}, {}, 0.5, 0.1, 0.0, 0.2)
    (old / "round-1").mkdir()
    (old / "round-1" / "round.json").write_text(json.dumps(asdict(done)))
    old.rename(new)
    found = maker_in(new).round(1, str(new / "start"))
    assert (found.adapter, found.start) == (str(new / "round-1" / "adapter"), str(new / "start"))


def test_clips_of_one_prompt_may_be_of_several_categories(tmp_path, monkeypatch):
    values = {"p0": 0.2, "p1": 0.8}
    monkeypatch.setattr(
        "video_trl.evaluation.evaluate.evaluate_model",
        lambda *args, **options: Scored([{"prompt": text, "sa": pc, "pc": pc} for text, pc in values.items()]),
    )
    maker = _Rounds(RoundsConfig())
    clips = (("p0", "falls"), ("p0", "rolls"), ("p1", "rolls"))
    maker.rows = [{"prompt": text, "chosen": "0.mp4", "category": category} for text, category in clips]
    scores, videos = maker.losers(tmp_path, 1, None)
    assert scores == pytest.approx({"falls": 0.2, "rolls": 0.5}) and len(videos["p0"]) == 1


def test_every_round_is_trained_as_the_first_one_is(tmp_path):
    """The model by its name, with options that need one; an adapter is handed on to the last bit."""
    tiny_wan_pipeline().save_pretrained(tmp_path / "model")
    training = {"use_cpu": True, "max_steps": 1, "lora_rank": 2, "fps": 8, "save_strategy": "no", "learning_rate": 0.1}
    training |= {"model_init_kwargs": {"local_files_only": True}, "cache_dir": str(tmp_path / "cache")}
    training |= {"lora_target_modules": "all-linear"}
    given = {"model": str(tmp_path / "model"), "dataset_name": "d", "eval_prompts": "p"}
    (tmp_path / "round-1" / "adapter").mkdir(parents=True)  # as a kill before `trained.json` leaves it
    (tmp_path / "round-1" / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"of the killed training")
    groups, adapters = tiny_group_dataset(1, 1, num_frames=5), [None]
    for number, rate in enumerate((0.1, 0.0), 1):
        maker = _Rounds(RoundsConfig(training=training | {"learning_rate": rate}, **given))
        adapters.append(str(maker.train(tmp_path / f"round-{number}", groups, adapters[-1])))
    first, second = (load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in adapters[1:])
    assert_equal_weights(first, second)
    assert any(weight.abs().max() > 0.05 for name, weight in first.items() if "lora_B" in name)
    maker = _Rounds(RoundsConfig(training=training, generation={"revision": "abc"}, **given))
    assert maker.arguments(tmp_path, None).model_init_kwargs == {"revision": "abc", "local_files_only": True}


def test_with_a_moving_average_it_is_the_average_that_is_handed_on(tmp_path):
    training = {"use_cpu": True, "max_steps": 2, "lora_rank": 2, "save_strategy": "no", "ema_decay": 0.9, "fps": 8}
    maker = _Rounds(RoundsConfig(training=training))
    maker.config.model = tiny_wan_pipeline()
    adapter = maker.train(tmp_path, tiny_group_dataset(1, 1, num_frames=5), None)
    assert adapter == tmp_path / "adapter" / "ema" and (adapter / "pytorch_lora_weights.safetensors").is_file()
    assert maker.train(tmp_path, [], None) == adapter
    (tmp_path / "round-1").mkdir()
    tmp_path.joinpath("adapter").rename(tmp_path / "round-1" / "adapter")
    done = asdict(Round(1, "elsewhere", "h", None, {}, {}, 0.5, 0.1, 0.0, 0.2))
    (tmp_path / "round-1" / "round.json").write_text(json.dumps(done))
    maker.root = tmp_path
    assert maker.round(1, None).adapter == str(tmp_path / "round-1" / "adapter" / "ema")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Rounds are run by one process"):
        run_rounds(RoundsConfig())


def test_difficult_categories_get_more_and_without_categories_the_hardest_prompts(tmp_path):
    """Half of the budget for as many clips as there are; the rejected videos are those of the prompt."""
    clips = [{"prompt": f"p{n}", "chosen": f"{n}.mp4", "category": "easy" if n < 6 else "hard"} for n in range(12)]
    videos = {f"p{n}": [{"video": f"own{n}.mp4", "sa": 1.0, "pc": 0.5, "seed": 7}] for n in range(12)}
    maker = _Rounds(RoundsConfig(budget=6, tau=1.0))
    maker.rows = clips
    groups, allocation = maker.groups(tmp_path, 1, {"easy": 0.9, "hard": 0.1}, videos)
    assert allocation == {"easy": 2, "hard": 4}
    assert {row["category"] for row in groups} <= {"easy", "hard"} and len(groups) == 6
    for row in groups:
        assert row["rejected"][0]["path"] == f"own{row['prompt'][1:]}.mp4"
        assert row["rejected_scores"] == [{"sa": 1, "pc": 0.5}]
    assert (tmp_path / "groups" / "train.parquet").is_file()
    again, _ = maker.groups(tmp_path, 1, {"easy": 0.9, "hard": 0.1}, videos)
    assert again["prompt"] == groups["prompt"]
    maker = _Rounds(RoundsConfig(budget=3))
    maker.rows = [{"prompt": clip["prompt"], "video": clip["chosen"]} for clip in clips]
    scores = {f"p{n}": 0.2 if n in (1, 4, 8) else 0.95 for n in range(12)}
    groups, _ = maker.groups(tmp_path / "other", 1, scores, videos)
    assert sorted(groups["prompt"]) == ["p1", "p4", "p8"]


def test_the_gain_is_paired_by_prompt():
    gain = _Rounds(RoundsConfig()).gain(Table([0.5, 0.7, 0.9]), Table([0.4, 0.6, 0.8]))
    assert gain.difference == pytest.approx(0.1) and gain.low > 0


def test_rounds_end_when_the_interval_covers_zero(monkeypatch, tmp_path):
    """And the best adapter is the one before; the next round begins with the last good one."""
    starts = []

    def fake(self, number, start):
        starts.append(start)
        low = 0.05 if number < 3 else -0.01
        return Round(number, f"a{number}", "h", start, {}, {"all": 4}, 0.5, low + 0.05, low, low + 0.1)

    monkeypatch.setattr(_Rounds, "check", lambda self: None)
    monkeypatch.setattr(_Rounds, "round", fake)
    result = run_rounds(RoundsConfig(output_dir=str(tmp_path), max_rounds=9))
    assert starts == [None, "a1", "a2"] and result.best == "a2" and len(result.rounds) == 3
    assert "the best adapter is a2" in str(result) and "+0.040 [-0.010, +0.090]" in str(result)
    monkeypatch.setattr(_Rounds, "round", lambda self, number, start: replace(fake(self, 3, start), number=number))
    assert "no round is better than what it began" in str(run_rounds(RoundsConfig(output_dir=str(tmp_path))))
    assert starts[-1] is None
    _, file = adapter("wan-t2v", tmp_path / "first")
    run_rounds(RoundsConfig(output_dir=str(tmp_path / "more"), init_adapter=str(file.parent)))
    assert starts[-1] == str(file)


@pytest.mark.parametrize("is_base", [True, False])
def test_a_continued_adapter_is_compared_with_the_base_or_with_itself(is_base, tmp_path):
    first = trainer(config(tmp_path / "first", max_steps=1))
    first.train()
    base = trainer(config(tmp_path / "fresh", max_steps=1))
    pipeline = tiny_wan_pipeline()
    first.save_model()
    pipeline.load_lora_weights(str(tmp_path / "first"), **IN_FOLDER)
    made = trainer(config(tmp_path / "second", max_steps=1, reference_is_base=is_base), model=pipeline)
    errors = {}
    for name, each in (("base", base), ("second", made)):
        seen = {}
        each.record = seen.update
        each.compute_loss(each.model, first_batch(each, 0, 1))
        errors[name] = seen["win_gap"]
    assert bool(errors["second"].any()) == is_base and not errors["base"].any()
    made.train()  # the comparison of the first step knows that they differ


@pytest.mark.slow
def test_rounds_on_the_sandbox_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    """Real videos, judge, training and evaluation; stopped between training and evaluation of the second round."""
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "lora_rank": 2, "learning_rate": 1e-4, "fps": 8}
    config_ = RoundsConfig(
        output_dir=str(tmp_path), num_clips=3, num_rejected=1, budget=2, training=options | {"save_strategy": "no"},
        num_eval_prompts=3, eval_seeds=[0], max_rounds=2,
    )  # fmt: skip
    monkeypatch.setattr(Round, "is_better", property(lambda self: True))
    real, trained = _Rounds.evaluate, []

    def stopped(self, run_dir, adapter):
        if run_dir.name == "round-2":
            raise KeyboardInterrupt
        return real(self, run_dir, adapter)

    monkeypatch.setattr(_Rounds, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(config_)
    assert (tmp_path / "round-1" / "round.json").is_file() and not (tmp_path / "round-2" / "round.json").exists()
    assert read_json(tmp_path / "round-2" / "adapter" / "trained.json") == {"updates": 1}
    monkeypatch.setattr(_Rounds, "evaluate", real)
    monkeypatch.setattr(
        rounds_module._Rounds,
        "arguments",
        lambda self, folder, start, real=_Rounds.arguments: (trained.append(folder), real(self, folder, start))[1],
    )
    result = run_rounds(config_)
    assert [each.number for each in result.rounds] == [1, 2]
    assert not [path for path in trained if path.name == "adapter"]
    second = read_json(tmp_path / "round-2" / "round.json")
    assert second["start"] == result.rounds[0].adapter and sum(second["allocation"].values()) == 2
    assert second["adapter_hash"] != result.rounds[0].adapter_hash
    with pytest.raises(ValueError, match="holds rounds of"):
        run_rounds(replace(config_, tau=1.0))
    words = ["rounds", "--output_dir", str(tmp_path), "--num_clips", "3", "--num_rejected", "1", "--budget", "2"]
    words += ["--training", json.dumps(config_.training), "--num_eval_prompts", "3", "--eval_seeds", "0"]
    assert main([*words, "--max_rounds", "2"]) == 0
    assert "the best adapter is" in capsys.readouterr().out
