"""`rejected_score_below`: only rejected videos with bad physics are compared with, whatever the method."""

import math

import pytest
import torch

import video_trl
from tests.support.tiny import tiny_encoded_group, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import (
    RecordGradients,
    assert_equal_weights,
    config,
    disturb_adapter,
    trained_weights,
    trainer,
)
from tests.trainer.test_families import make
from video_trl.trainer.setup.scored_rows import check_rejected_scores


METHODS = ("DPO", "RegDPO", "GroupDPO")
SCORES = [[0.1, 0.9, 0.2], [0.9, 0.8, 0.7], [0.9, 0.3, 0.9], [0.39, 0.4, 0.41]]  # pc of each rejected video
STAY = {0: [0, 2], 2: [1], 3: [0]}  # with a bound of 0.4


def rows() -> list[dict]:
    made = tiny_encoded_group(4)
    for row, pc in zip(made, SCORES, strict=True):
        row["rejected_scores"] = torch.tensor([[0.5, value] for value in pc])
    return made


def trainer_of(name, directory, **changes):
    extra = {"train_dataset": rows(), "model": tiny_wan_pipeline()} | changes.pop("extra", {})
    return make("wan-t2v", name, directory, rejected_score_below=0.4, extra=extra, **changes)


@pytest.mark.parametrize("name", METHODS)
def test_rows_keep_the_videos_below_the_bound_first(name, tmp_path):
    made, original = trainer_of(name, tmp_path), rows()
    assert len(made.train_dataset) == 3
    for index, (number, stay) in enumerate(STAY.items()):
        row = made.train_dataset[index]
        assert row["num_rejected"] == len(stay) and row["index"] == index
        kept = row["rejected_latents"][: len(stay)]
        assert torch.equal(kept, original[number]["rejected_latents"][stay])
        assert row["rejected_scores"][: len(stay), 1].tolist() == original[number]["rejected_scores"][stay, 1].tolist()
        assert torch.equal(row["chosen_latents"], original[number]["chosen_latents"])


@pytest.mark.parametrize("loss_type", ["sampled", "sum", "plackett_luce"])
def test_the_videos_left_out_take_no_part(loss_type, tmp_path):
    """The loss of a row with two of three equals that of a row that has only these two; so do gradient and metrics."""
    options = {"loss_type": loss_type, "sft_weight": "dgr", "max_steps": 1, "physics_rewarding": None}
    left = trainer_of("GroupDPO", tmp_path, **options, extra={"train_dataset": rows()[:1]})
    alone = rows()[0]
    alone["rejected_latents"] = alone["rejected_latents"][[0, 2]]
    alone["rejected_scores"] = alone["rejected_scores"][[0, 2]]
    right = make("wan-t2v", "GroupDPO", tmp_path, extra={"train_dataset": [alone]}, **options)
    gradients = []
    for made in (left, right):
        disturb_adapter(made)
        recorder = RecordGradients()
        made.add_callback(recorder)
        made.train()
        gradients.append(recorder.steps[0])
    logs = [made.state.log_history[0] for made in (left, right)]
    assert logs[0].keys() == logs[1].keys()
    for name, value in logs[0].items():
        assert value == pytest.approx(logs[1][name], rel=1e-4, abs=1e-7), name
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_no_other_video_is_ever_drawn(name, tmp_path):
    """The videos above the bound are not numbers: one of them in a loss would stop the run."""
    poisoned = rows()
    made = trainer_of(name, tmp_path, extra={"train_dataset": poisoned}, max_steps=12, logging_steps=1)
    for number, row in enumerate(poisoned):  # after the check of all rows
        out = [j for j in range(3) if j not in STAY.get(number, [])]
        row["rejected_latents"][out] = math.nan
    made.train()
    assert made.state.global_step == 12


@pytest.mark.parametrize("name", METHODS)
def test_a_bound_above_all_scores_changes_nothing(name, tmp_path):
    weights = []
    for below in (None, 1.0):
        made = make("wan-t2v", name, tmp_path, rejected_score_below=below, extra={"train_dataset": rows()})
        made.train()
        weights.append(trained_weights(made))
    assert_equal_weights(*weights)


def test_cached_errors_of_the_reference_know_the_choice(tmp_path):
    made = trainer_of("DPO", tmp_path, precompute_ref_errors=2, cache_dir=str(tmp_path / "cache"), max_steps=3)
    made.train()
    whole = make("wan-t2v", "DPO", tmp_path, precompute_ref_errors=2, cache_dir=str(tmp_path / "cache"), max_steps=3)
    whole.train()
    assert len(list((tmp_path / "cache" / "reference_errors").glob("*.safetensors"))) == 2


def test_data_without_a_suitable_video_is_refused_before_it_is_encoded(tmp_path):
    raw = tiny_group_dataset(2)
    with pytest.raises(ValueError, match="`rejected_score_below=0.4` needs the column 'rejected_scores'"):
        check_rejected_scores(raw.remove_columns("rejected_scores"), 0.4)
    with pytest.raises(ValueError, match="leaves no rejected video: every 'pc' is at least that"):
        check_rejected_scores(rows()[1:2], 0.4)
    for name in METHODS:
        args = getattr(video_trl, f"Video{name}Config")(
            output_dir=str(tmp_path), use_cpu=True, rejected_score_below=0.0001, cache_dir=str(tmp_path / "unused")
        )
        with pytest.raises(ValueError, match="leaves no rejected video"):
            getattr(video_trl, f"Video{name}Trainer")(tiny_wan_pipeline(), args, raw)
    assert not (tmp_path / "unused").exists()


def test_raw_rows_are_chosen_among_too(tmp_path):
    raw = tiny_group_dataset(3)
    scores = [[score["pc"] for score in cell] for cell in raw["rejected_scores"]]
    bound = sorted(value for cell in scores for value in cell)[4] + 1e-6
    made = config(tmp_path, rejected_score_below=bound, cache_dir=str(tmp_path / "cache"), max_steps=1)
    trained = trainer(made, train_dataset=raw)
    trained.train()
    kept = [sum(value < bound for value in cell) for cell in scores]
    assert [trained.train_dataset[index]["num_rejected"] for index in range(len(trained.train_dataset))] == [
        count for count in kept if count
    ]
