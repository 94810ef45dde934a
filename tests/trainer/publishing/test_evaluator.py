"""`evaluator=`: alone, beside one dataset or several, as the judge of the best checkpoint, and when it fails."""

import pytest
from transformers import EarlyStoppingCallback

from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.repa_runs import aligned_rows, repa_trainer
from tests.support.trainer.runs import config, losses, trainer
from video_trl import (
    VideoDPOConfig,
    VideoDPOTrainer,
    VideoRegDPOConfig,
    VideoRegDPOTrainer,
    VideoSFTConfig,
    VideoSFTTrainer,
)


SCORES = {1: 0.2, 2: 0.7, 3: 0.6, 4: 0.5, 5: 0.9}
STEPS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_pc", "greater_is_better": True}


class Judge:
    """Scores by step; remembers when it was asked."""

    def __init__(self):
        self.steps = []

    def __call__(self, pipeline, *, output_dir, step):
        self.steps.append(step)
        return {"pc": SCORES.get(step, 0.0)}


def pair_trainer(kind, config_class):
    def make(directory, **arguments):
        settings = {"use_cpu": True, "lora_rank": 4, "lora_alpha": 4, "disable_tqdm": True, "logging_steps": 1}
        args = config_class(str(directory), **settings, **arguments.pop("settings"))
        return kind(tiny_wan_pipeline(), args, tiny_encoded_group(4, 1), **arguments)

    return make


TRAINERS = {
    "sft": pair_trainer(VideoSFTTrainer, VideoSFTConfig),
    "dpo": pair_trainer(VideoDPOTrainer, VideoDPOConfig),
    "regdpo": pair_trainer(VideoRegDPOTrainer, VideoRegDPOConfig),
    "gdpo": lambda directory, settings, **arguments: trainer(config(directory, **settings), **arguments),
    "repa": lambda directory, settings, **arguments: repa_trainer(directory, **settings, **arguments),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_score_stops_every_trainer_and_chooses_its_weights(name, tmp_path):
    judge = Judge()
    made = TRAINERS[name](
        tmp_path,
        settings={"max_steps": 9, **STEPS, **BEST},
        evaluator=judge,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    made.train()  # 0.7 in step 2, then twice no better
    assert judge.steps == [1, 2, 3, 4] and made.state.global_step == 4
    assert made.state.best_model_checkpoint.endswith("checkpoint-2") and made.state.best_metric == 0.7


def test_without_rows_an_evaluation_is_the_evaluators(tmp_path):
    judge = Judge()
    made = trainer(config(tmp_path, max_steps=2, **STEPS), evaluator=judge)
    made.train()
    found = [entry for entry in made.state.log_history if "eval_pc" in entry]
    assert [(entry["step"], entry["eval_pc"]) for entry in found] == [(1, 0.2), (2, 0.7)]
    assert "eval_loss" not in found[0]
    assert made.evaluate() == {"eval_pc": 0.7} and judge.steps == [1, 2, 2]
    assert "eval_loss" in made.evaluate(tiny_encoded_group(1))
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(config(tmp_path, eval_strategy="steps"))


def test_beside_several_datasets_it_runs_once(tmp_path):
    judge = Judge()
    rows = {"near": tiny_encoded_group(1), "far": tiny_encoded_group(1, seed=3)}
    made = trainer(config(tmp_path, max_steps=2, **STEPS, **BEST), eval_dataset=rows, evaluator=judge)
    made.train()
    assert judge.steps == [1, 2] and made.state.best_metric == 0.7
    assert {"eval_near_loss", "eval_far_loss", "eval_pc"} <= set(made.evaluate())


def test_training_is_the_same_with_and_without(tmp_path):
    plain = trainer(config(tmp_path / "plain", max_steps=3))
    plain.train()
    measured = trainer(config(tmp_path / "measured", max_steps=3, **STEPS), evaluator=Judge())
    measured.train()
    assert losses(measured) == losses(plain)


@pytest.mark.parametrize(
    ("result", "message"),
    [(0.5, "a dict of metrics.*got float"), ({"pc": "good"}, "Expected numbers.*pc: str"), ({"pc": None}, "pc: None")],
)
def test_what_is_no_number_is_refused(result, message, tmp_path):
    made = trainer(config(tmp_path), evaluator=lambda pipeline, *, output_dir, step: result)
    with pytest.raises(ValueError, match=message):
        made.evaluate()


@pytest.mark.parametrize("name", ["loss", "win_gap", "runtime"])
def test_a_name_that_the_trainer_has_itself_is_refused(name, tmp_path):
    rows = tiny_encoded_group(1)
    made = trainer(config(tmp_path), eval_dataset=rows, evaluator=lambda pipeline, *, output_dir, step: {name: 0.5})
    with pytest.raises(ValueError, match=f"`evaluator` returned '{name}', which the trainer measures itself"):
        made.evaluate()


def test_an_error_of_the_evaluator_is_the_users_to_see(tmp_path):
    def broken(pipeline, *, output_dir, step):
        raise ConnectionError("the judge's server does not answer")

    made = trainer(config(tmp_path), eval_dataset=tiny_encoded_group(1), evaluator=broken)
    with pytest.raises(ConnectionError, match="does not answer"):
        made.evaluate()


def test_alignment_metrics_stand_beside_the_score(tmp_path):
    made = repa_trainer(tmp_path, max_steps=1, eval_dataset=aligned_rows(1), evaluator=Judge())
    assert {"eval_loss", "eval_trd/raw", "eval_pc"} <= set(made.evaluate())
