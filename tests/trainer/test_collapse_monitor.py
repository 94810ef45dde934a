"""`CollapseMonitor` on constructed logs, and in real runs of tiny models that collapse."""

import copy
import functools
import logging
import math
import random
import tempfile
from dataclasses import dataclass, field

import pytest
from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group, tiny_encoded_video, tiny_wan_pipeline
from tests.support.trainer.runs import assert_equal_weights, trained_weights
from video_trl import (
    VideoDPOConfig,
    VideoDPOTrainer,
    VideoGroupDPOConfig,
    VideoGroupDPOTrainer,
    VideoRegDPOConfig,
    VideoRegDPOTrainer,
    VideoSFTConfig,
    VideoSFTTrainer,
)
from video_trl.data import encode_dataset
from video_trl.models import family_for
from video_trl.sandbox import load_sandbox, simulate
from video_trl.trainer import CollapseMonitor, find_collapse


BETA = 500.0


def history(win, lose, *, noise=0.0, seed=0, n=60, falls=True):
    """A log of n entries, ten steps apart: gaps rise to `win` and `lose` linearly; ratio and loss fall, or stay."""
    generator = random.Random(seed)
    entries = []
    for index in range(1, n + 1):
        win_gap = win * index / n + noise * generator.gauss(0, 1)
        lose_gap = lose * index / n + noise * generator.gauss(0, 1)
        decay = math.exp(-index / 5) if falls else 1.0
        entries.append(
            {
                "step": 10 * index,
                "loss": 0.02 + 0.67 * decay,
                "dgr": 2 + 123 * decay,
                "win_gap": win_gap,
                "lose_gap": lose_gap,
                "rewards/margins": 250 * (lose_gap - win_gap),
            }
        )
        if index % 7 == 0:
            entries.append({"step": 10 * index, "eval_loss": 0.1})
    return entries


def first_found(entries, **options):
    """Step at which the signature is first seen when the log grows entry by entry."""
    for end in range(1, len(entries) + 1):
        if (found := find_collapse(entries[:end], BETA, **options)) is not None:
            return found.step
    return None


def test_a_collapse_is_found_and_reported_with_its_numbers():
    entries = history(win=0.1, lose=0.15)
    assert 100 <= first_found(entries) < 200
    found = find_collapse(entries, BETA)
    assert found.step == 600 and found.initial_dgr == 125
    assert found.dgr == pytest.approx(2, abs=0.2) and found.loss == pytest.approx(0.02, abs=1e-4)
    assert found.win_gap == pytest.approx(0.1 * 55.5 / 60) and found.lose_gap == pytest.approx(0.15 * 55.5 / 60)
    for number in ("125", "win_gap to 0.0925", "lose_gap to 0.1387"):
        assert number in str(found)


@pytest.mark.parametrize(
    "entries",
    [
        history(win=-0.02, lose=0.05),  # as the method intends: better at the chosen, worse at the rejected
        history(win=-0.05, lose=-0.02),  # better at both
        history(win=0.0, lose=0.05),
        history(win=0.1, lose=0.15, falls=False),  # both gaps rise, but nothing is learned: another fault
        history(win=0.002, lose=0.03),  # a rise of half a unit of reward
        [],
        history(win=0.1, lose=0.15)[:9],
    ],
    ids=["healthy", "both better", "flat", "no fall", "small", "empty", "short"],
)
def test_what_is_no_collapse_is_left_alone(entries):
    assert first_found(entries) is None


def test_noise_neither_hides_a_collapse_nor_makes_one():
    """40 logs each; an entry's noise is twice the threshold of the mean, or a third of the gap of a collapse."""
    for seed in range(40):
        assert first_found(history(win=-0.005, lose=0.05, noise=0.016, seed=seed)) is None
        assert first_found(history(win=0.15, lose=0.2, noise=0.05, seed=seed)) is not None


def test_a_log_without_ratio_and_one_with_a_regularised_loss_are_read():
    group = [{name: value for name, value in entry.items() if name != "dgr"} for entry in history(0.1, 0.15)]
    ratios = [250 / (1 + math.exp(entry["rewards/margins"])) for entry in group if "win_gap" in entry]
    assert find_collapse(group, BETA).dgr == pytest.approx(sum(ratios[-10:]) / 10, rel=1e-6)
    regularised = [{**entry, "loss/dpo": entry["loss"], "loss": 20.0} if "loss" in entry else entry for entry in group]
    assert find_collapse(regularised, BETA).loss == find_collapse(group, BETA).loss


def test_a_loss_that_rises_again_does_not_hide_a_collapse():
    """Seen at large learning rates: the gaps are so wide that the few pairs in the wrong order dominate the mean."""
    entries = [{**entry, "loss": 2.0} if entry["step"] > 50 else entry for entry in history(win=0.1, lose=0.15)]
    assert find_collapse(entries, BETA).loss == entries[4]["loss"] < 0.35
    assert find_collapse([{**entry, "loss": 2.0} for entry in entries if "win_gap" in entry], BETA) is None


@pytest.mark.parametrize("smoothing", [0.05, 0.2, 0.4])
def test_smoothed_labels_hide_no_collapse_and_make_none(smoothing):
    """The loss ends at the entropy of the labels, with a ratio of 0; it starts with a smaller ratio."""

    def entries(target):
        made = []
        for entry in (each for each in history(win=0.1, lose=0.15) if "loss" in each):
            right = 1 / (1 + math.exp(-target * (1 - math.exp(-entry["step"] / 50))))  # sigmoid of the margin
            loss = -(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right)
            made.append({**entry, "loss": loss, "dgr": 250 * (1 - right - smoothing)})
        return made

    learned = math.log((1 - smoothing) / smoothing)
    found = find_collapse(entries(learned), BETA, label_smoothing=smoothing)
    assert found is not None and found.initial_dgr == pytest.approx(250 * (0.5 - smoothing))
    assert find_collapse(entries(0.2 * learned), BETA, label_smoothing=smoothing) is None


def test_a_second_event_needs_a_further_rise():
    entries = history(win=0.1, lose=0.15)
    assert find_collapse(entries, BETA, since=300) is not None
    flat = [{**entry, "win_gap": 0.05, "lose_gap": 0.06} if "win_gap" in entry else entry for entry in entries]
    assert find_collapse(flat, BETA) is not None and find_collapse(flat, BETA, since=300) is None
    assert find_collapse(entries, BETA, since=550) is None  # only five entries since


def evaluated(entries, win, lose, every=100, prefix="eval_"):
    """The log with held-out gaps, `win` and `lose` of the step, every so many steps."""
    log = []
    for entry in entries:
        log.append(entry)
        if "win_gap" in entry and entry["step"] % every == 0:
            gaps = {f"{prefix}win_gap": win(entry["step"]), f"{prefix}lose_gap": lose(entry["step"])}
            log.append({"step": entry["step"], f"{prefix}loss": 0.1, **gaps})
    return log


def test_held_out_rows_show_a_collapse_that_training_rows_hide():
    """The model remembers its training rows: their win gap falls, while both gaps of other rows rise."""
    entries = history(win=-0.02, lose=0.05)
    for prefix in ("eval_", "eval_other_"):
        log = evaluated(entries, lambda step: step * 1e-4, lambda step: step * 2e-4, prefix=prefix)
        found = find_collapse(log, BETA)
        assert found.rows == "held-out rows" and found.win_gap == pytest.approx(0.055)  # of steps 500 and 600
        assert "on held-out rows" in str(found) and found.lose_gap == pytest.approx(0.11)
        assert first_found(log) == 200
        assert find_collapse(log, BETA, since=500) is None  # one evaluation since
    healthy = evaluated(entries, lambda step: -step * 1e-4, lambda step: step * 2e-4)
    once = evaluated(entries, lambda step: 0.1 if step == 600 else -0.01, lambda step: 0.1)
    assert first_found(entries) is None and first_found(healthy) is None and first_found(once) is None
    nothing_learned = history(win=-0.02, lose=0.05, falls=False)
    assert first_found(evaluated(nothing_learned, lambda step: 0.1, lambda step: 0.1)) is None


# ---- In training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox():
    return load_sandbox()


@pytest.fixture(scope="module")
def pairs(sandbox):
    """Two encoded pairs of the sandbox: a clip against another one, which is wrong for the sentence."""
    clips = [simulate(seed) for seed in (5, 6, 7, 8)]
    rows = [
        {"prompt": chosen.prompt, "chosen": chosen.video, "rejected": rejected.video}
        for chosen, rejected in (clips[:2], clips[2:])
    ]
    family = family_for(sandbox.pipeline.transformer)
    with tempfile.TemporaryDirectory() as folder:
        encoded = encode_dataset(
            rows, sandbox.pipeline, family, "preference", cache_dir=folder, max_sequence_length=24, device="cpu"
        )
        return [dict(encoded[index]) for index in range(len(encoded))]


TRAINERS = {
    "dpo": (VideoDPOTrainer, VideoDPOConfig, {}),
    "reg-dpo": (VideoRegDPOTrainer, VideoRegDPOConfig, {"sft_coefficient": 1e-4}),
    "group-dpo": (VideoGroupDPOTrainer, VideoGroupDPOConfig, {"physics_rewarding": False}),
}


@pytest.fixture
def run(sandbox, pairs, tmp_path):
    """Trains the sandbox model with a learning rate that drives it apart: it has more to lose than to learn."""
    return functools.partial(collapsing_run, sandbox.pipeline.transformer, pairs, tmp_path)


def collapsing_run(
    transformer,
    pairs,
    directory,
    monitor,
    *,
    kind="dpo",
    resume=None,
    train=True,
    callbacks=(),
    eval_dataset=None,
    **changes,
):
    trainer_class, config_class, own = TRAINERS[kind]
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 12,
        "per_device_train_batch_size": 1,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "lora_rank": 4,
        "lora_alpha": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_sequence_length": 24,
        **own,
        **changes,
    }
    model = copy.deepcopy(transformer)
    callbacks = [monitor, *callbacks]
    trainer = trainer_class(model, config_class(**settings), pairs, eval_dataset, callbacks=callbacks)
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_a_run_that_collapses_is_told_so_once(run, kind, caplog):
    monitor = CollapseMonitor(window=3)
    with caplog.at_level(logging.WARNING, "video_trl"):
        made = run(monitor, kind=kind)
    warnings = [record.getMessage() for record in caplog.records if "Collapse at step" in record.getMessage()]
    assert len(warnings) == 1 and len(monitor.events) == 1 and made.state.global_step == 12
    entry = made.state.log_history[monitor.events[0] - 1]
    assert entry["win_gap"] > 0 and entry["lose_gap"] > 0
    assert f"step {monitor.events[0]}:" in warnings[0] and "from 125 to" in warnings[0]
    cures = {
        "reg-dpo": "raise `sft_coefficient`",
        "group-dpo": "raise `sft_weight`",
        "dpo": "use `VideoRegDPOTrainer`",
    }
    assert cures[kind] in warnings[0]


def test_stop_ends_training_at_the_event(run):
    monitor = CollapseMonitor("stop", window=3)
    made = run(monitor)
    assert monitor.events == [made.state.global_step] and made.state.global_step < 12


def test_raise_multiplies_the_coefficient_and_resumes_exactly(run, tmp_path):
    """After each event r / DGR doubles; a run resumed after an event has the same events, log and weights."""
    options = {"kind": "reg-dpo", "save_strategy": "steps", "save_steps": 4}
    monitor = CollapseMonitor("raise", window=3, min_rise=0.5)
    whole = run(monitor, **options)
    assert len(monitor.events) >= 2 and monitor.events[0] <= 8 < monitor.events[-1]
    for entry in whole.state.log_history[:12]:
        raised = sum(event < entry["step"] for event in monitor.events)
        assert entry["sft_weight"] == pytest.approx(1e-4 * 2**raised * entry["dgr"], rel=1e-4)
    assert whole.args.sft_coefficient == 1e-4  # the configuration has its own value back

    again = CollapseMonitor("raise", window=3, min_rise=0.5)
    resumed = run(again, resume=str(tmp_path / "checkpoint-8"), **options)
    assert again.events == monitor.events
    assert resumed.state.log_history[8:12] == whole.state.log_history[8:12]
    assert_equal_weights(trained_weights(resumed), trained_weights(whole))


def test_raise_multiplies_the_weight_of_a_group_loss(run):
    """r is a number times the ratio of the loss; the text in the configuration is multiplied."""
    monitor = CollapseMonitor("raise", window=3, min_rise=0.5)
    made = run(monitor, kind="group-dpo", sft_weight="1e-4*dgr")
    assert monitor.events and made.args.sft_weight == "1e-4*dgr"
    for entry in made.state.log_history[:12]:
        raised = sum(event < entry["step"] for event in monitor.events)
        ratio = entry["chosen_weight"] - entry["sft_weight"]
        assert entry["sft_weight"] == pytest.approx(1e-4 * 2**raised * ratio, rel=1e-3)


def test_the_monitor_acts_on_an_evaluation(run, pairs, caplog):
    """Nothing is to be seen on training rows; the evaluations that a run makes by itself are looked at too."""
    monitor = CollapseMonitor()
    made = run(monitor, eval_dataset=pairs, train=False)
    log = [{"step": step, "loss": 0.01, "dgr": 1.0, "win_gap": -1.0, "lose_gap": 1.0} for step in range(100)]
    made.state.log_history[:] = [*log, *({"step": 99, "eval_win_gap": 1.0, "eval_lose_gap": 1.0} for _ in range(2))]
    monitor.on_log(made.args, made.state, made.control)
    assert monitor.events == [0] and "on held-out rows" in caplog.text


def test_a_run_can_be_resumed_with_a_monitor_that_it_did_not_have(run, tmp_path):
    options = {"kind": "reg-dpo", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run(TrainerCallback(), **options)
    monitor = CollapseMonitor("raise", window=3)
    resumed = run(monitor, resume=str(tmp_path / "checkpoint-2"), **{**options, "max_steps": 4})
    assert resumed.state.global_step == 4
    assert resumed.state.stateful_callbacks["CollapseMonitor"]["attributes"] == {"events": monitor.events}


def test_an_interrupted_training_leaves_the_coefficient_no_trace_in_the_next(run):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise KeyboardInterrupt

    monitor = CollapseMonitor("raise", window=3, min_rise=0.5)
    made = run(monitor, kind="reg-dpo", callbacks=[Interrupt()], train=False)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.args.sft_coefficient == 1e-4 * 2 ** len(monitor.events) and monitor.events
    made.remove_callback(Interrupt)
    made.args.max_steps = 1
    made.train()
    assert made.args.sft_coefficient == 1e-4 and monitor.events == []


@dataclass
class AnchoredConfig(VideoRegDPOConfig):
    """Of a method from outside: the monitor knows its coefficient by what the class says."""

    regulariser_field = "anchor"

    anchor: float = field(default=0.5, metadata={"help": "Coefficient of its regulariser."})


class AnchoredTrainer(VideoRegDPOTrainer):
    config_class = AnchoredConfig


class SilentTrainer(VideoDPOTrainer):
    """Does not log what its configuration promises."""

    def record(self, metrics):
        super().record({name: values for name, values in metrics.items() if name != "lose_gap"})


def test_a_method_from_outside_names_its_own_coefficient(run, monkeypatch, caplog):
    monkeypatch.setitem(TRAINERS, "anchored", (AnchoredTrainer, AnchoredConfig, {"sft_coefficient": 1e-4}))
    monitor = CollapseMonitor("raise", window=3)
    with caplog.at_level(logging.WARNING, "video_trl"):
        made = run(monitor, kind="anchored")
    assert monitor.events and "`anchor` is now 1." in caplog.text
    assert (made.args.anchor, made.args.sft_coefficient) == (0.5, 1e-4)


def test_gaps_that_were_promised_and_are_not_logged_stop_the_run(run, monkeypatch):
    monkeypatch.setitem(TRAINERS, "silent", (SilentTrainer, VideoDPOConfig, {}))
    with pytest.raises(ValueError, match="VideoDPOConfig says `logs_gaps`, but its trainer did not log lose_gap"):
        run(CollapseMonitor(), kind="silent")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"action": "pause"}, "one of 'warn', 'stop', 'raise'"),
        ({"window": 0}, "`window` >= 1"),
        ({"fall": 1.0}, r"`fall` in \(0, 1\)"),
        ({"min_rise": -1.0}, "`min_rise` >= 0"),
        ({"min_rise": math.nan}, "`min_rise` >= 0"),
        ({"factor": 1.0}, "`factor` > 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        CollapseMonitor(**arguments)


def test_trainers_that_it_cannot_serve_are_refused(tmp_path):
    rows, pipeline = tiny_encoded_group(2), tiny_wan_pipeline()
    with pytest.raises(ValueError, match="sft_coefficient.*got None in VideoDPOConfig"):
        VideoDPOTrainer(
            pipeline, VideoDPOConfig(str(tmp_path), use_cpu=True), rows, callbacks=[CollapseMonitor("raise")]
        )
    args = VideoRegDPOConfig(str(tmp_path), use_cpu=True, sft_coefficient=0.0)
    with pytest.raises(ValueError, match="expected one above 0, got 0.0"):
        VideoRegDPOTrainer(tiny_wan_pipeline(), args, rows, callbacks=[CollapseMonitor("raise")])
    with pytest.raises(ValueError, match="another trainer, VideoSFTConfig"):
        VideoSFTTrainer(
            tiny_wan_pipeline(),
            VideoSFTConfig(str(tmp_path), use_cpu=True),
            tiny_encoded_video(2),
            callbacks=[CollapseMonitor()],
        )
    two = VideoRegDPOTrainer(
        tiny_wan_pipeline(),
        VideoRegDPOConfig(str(tmp_path), use_cpu=True, max_steps=1),
        rows,
        callbacks=[CollapseMonitor(), CollapseMonitor("stop")],
    )
    with pytest.raises(ValueError, match="takes one `CollapseMonitor`, got 2"):
        two.train()
