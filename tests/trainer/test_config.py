"""Values are checked when a configuration is made, and the defaults are the ones that are documented."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from tests.support.trainer.runs import config
from video_trl import VideoGroupDPOConfig, VideoSFTConfig
from video_trl.losses import physics_weights
from video_trl.trainer.group_dpo_config import as_sft_weight


CONFIGS = (VideoGroupDPOConfig, VideoSFTConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "`beta` must be positive and finite, got 0.0"),
        ({"beta": -1.0}, "`beta` must be positive and finite, got -1.0"),
        ({"beta": math.nan}, "`beta` must be positive and finite, got nan"),
        ({"beta": math.inf}, "`beta` must be positive and finite, got inf"),
        ({"fps": math.inf}, "`fps` must be positive and finite, got inf"),
        ({"timestep_logit_mean": math.nan}, "`timestep_logit_mean` must be finite, got nan"),
        ({"height": 32}, "`height` and `width` must be set together, got height=32 and width=None"),
        ({"loss_type": "dpo"}, "`loss_type` must be one of 'sampled', 'sum', 'plackett_luce', got 'dpo'"),
        ({"alpha_min": 0.0}, r"`alpha_min` must be in \(0, 1\], got 0.0"),
        ({"alpha_min": 1.5}, r"`alpha_min` must be in \(0, 1\], got 1.5"),
        ({"alpha_min": 0.3, "alpha_mode": "tanh"}, "alpha must stay in"),
        ({"lam": -5.0}, "gamma must be positive"),
        ({"alpha_mode": "relu"}, "`alpha_mode` must be one of 'sigmoid', 'tanh', got 'relu'"),
        ({"gamma_mode": "both"}, "`gamma_mode` must be one of 'paper', 'official', got 'both'"),
        ({"loss_type": "plackett_luce", "physics_rewarding": True}, "does not have. Use `loss_type='sampled'`"),
        ({"timestep_sampling": "cosine"}, "`timestep_sampling` must be one of"),
        ({"timestep_draw": "sobol"}, "`timestep_draw` must be one of 'independent', 'stratified', 'antithetic', got"),
        ({"timestep_draw": "stratified", "precompute_ref_errors": 2}, "Leave one of them out"),
        ({"timestep_shift": 0.0}, "`timestep_shift` must be positive and finite, got 0.0"),
        ({"timestep_range": (995, 750)}, r"must be two timesteps, low < high, .* got \(995, 750\)"),
        ({"timestep_range": [500.0]}, "`timestep_range` must be two timesteps"),
        ({"timestep_range": (math.nan, 900)}, "`timestep_range` must be two timesteps"),
        ({"sft_weight": -0.1}, "`sft_weight` must be a number that is not negative, 'dgr', .* got -0.1"),
        ({"sft_weight": "0.1 dgr"}, "got '0.1 dgr'"),
        ({"sft_weight": "-1*dgr"}, "got '-1\\*dgr'"),
        ({"sft_weight": "sometimes"}, "got 'sometimes'"),
        ({"sft_weight": math.inf}, "got inf"),
        ({"rejected_score_below": 0.0}, r"`rejected_score_below` must be in \(0, 1\], where scores lie, got 0.0"),
        ({"rejected_score_below": 40.0}, "got 40.0"),
        ({"heldout_evaluations": 1}, "`heldout_evaluations` must be 0 or at least 2, got 1"),
        ({"timestep_logit_std": -1.0}, "`timestep_logit_std` must be positive"),
        ({"on_bad_video": "replace"}, "`on_bad_video` must be one of 'raise', 'skip', got 'replace'"),
        ({"lora_rank": 0}, "`lora_rank` must be positive and finite, got 0"),
        ({"num_frames": -1}, "`num_frames` must be positive and finite, got -1"),
        ({"encode_batch_size": 0}, "`encode_batch_size` must be positive"),
        ({"remove_unused_columns": True}, "`remove_unused_columns=True` is not supported: the collators"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha=5.0` is not supported"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` is not supported"),
        ({"bf16_full_eval": True, "bf16": True}, "`bf16_full_eval=True` is not supported"),
        ({"torch_compile": True}, "`torch_compile=True` is not supported"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` is not supported"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "is not supported: blocks are checkpointed"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "is not supported: blocks are checkpointed"),
    ],
)
def test_bad_values_are_refused_with_the_way_out(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.skipif("dataloader_in_order" not in TrainingArguments.__annotations__, reason="an older transformers")
def test_batches_out_of_their_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`dataloader_in_order=False` is not supported: the micro-batches"):
        config(tmp_path, dataloader_in_order=False)


def test_the_older_name_of_activation_checkpointing_means_the_same(tmp_path):
    """What versions of transformers read differs between them."""
    on = config(tmp_path, gradient_checkpointing=True)
    assert on.activation_checkpointing is True and on.gradient_checkpointing is True
    off = dataclasses.replace(on, activation_checkpointing=False)
    assert off.activation_checkpointing is False and off.gradient_checkpointing is False


def test_the_defaults_are_the_papers(tmp_path):
    args = VideoGroupDPOConfig(output_dir=str(tmp_path))
    assert (args.lora_rank, args.lora_alpha, args.beta, args.loss_type) == (48, 48, 500.0, "sampled")
    assert (args.alpha_min, args.lam, args.kappa_gamma, args.b_gamma) == (0.5, 0.6, 2.0, 0.4)
    assert (args.kappa_alpha, args.b_alpha, args.alpha_mode, args.gamma_mode) == (5.0, 0.5, "sigmoid", "paper")
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (1e-5, 0.01, 0.9, 0.999)
    assert args.physics_rewarding is True
    # 1e-5 down to 1e-6 along a cosine
    weight = torch.nn.Parameter(torch.zeros(1))
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW([weight], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, 0, 100, dict(args.lr_scheduler_kwargs))
    for _ in range(100):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-6)


def test_the_defaults_of_the_config_are_those_of_physics_weights(tmp_path):
    sa, pc = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    expected = physics_weights(sa, pc)
    actual = physics_weights(sa, pc, **config(tmp_path).physics_weight_arguments())
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_the_exact_group_loss_switches_the_weights_off(tmp_path):
    assert config(tmp_path, loss_type="plackett_luce").physics_rewarding is False
    assert config(tmp_path, physics_rewarding=False).physics_rewarding is False


def test_tanh_is_accepted_with_a_warning_where_it_only_loosens_the_bound(tmp_path, caplog):
    config(tmp_path, alpha_mode="tanh")
    assert "gamma >= 1/alpha fails" in caplog.text


@pytest.mark.parametrize("config_class", CONFIGS)
def test_without_an_accelerator_everything_runs_in_float32(tmp_path, config_class):
    args = config_class(output_dir=str(tmp_path))
    assert args.bf16 is False and args.activation_checkpointing is False and args.dataloader_pin_memory is False
    assert args.data_seed == args.seed
    assert config_class(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16 is True


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_explains_itself(config_class):
    inherited = {field.name for field in dataclasses.fields(config_class.__mro__[2])}
    for field in dataclasses.fields(config_class):
        if field.name not in inherited or field.name in config_class.__annotations__:
            assert len(field.metadata.get("help", "")) > 15, field.name


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_command_line_sets_every_kind_of_field(tmp_path, parser):
    line = ["--output_dir", str(tmp_path), "--beta", "100", "--loss_type", "sum", "--shared_noise", "False"]
    line += ["--timestep_shift", "5", "--model_init_kwargs", json.dumps({"revision": "abc"}), "--bf16", "--use_cpu"]
    line += ["--physics_rewarding", "--lora_target_modules", "attn1.to_q", "ffn.net.2", "--timestep_range", "750"]
    line += ["995", "--sft_weight", "0.4*dgr", "--rejected_score_below", "0.4", "--heldout_evaluations", "4"]
    args = parser(VideoGroupDPOConfig).parse_args_into_dataclasses(line)[0]
    assert args.lora_target_modules == ["attn1.to_q", "ffn.net.2"] and args.timestep_range == [750.0, 995.0]
    assert (args.sft_weight, args.rejected_score_below, args.heldout_evaluations) == ("0.4*dgr", 0.4, 4)
    assert (args.beta, args.loss_type, args.shared_noise, args.timestep_shift) == (100.0, "sum", False, 5.0)
    assert args.model_init_kwargs == {"revision": "abc"}
    assert args.bf16 is True and args.physics_rewarding is True


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(VideoGroupDPOConfig).parse_args(["--help"])
    assert "--alpha_min" in capsys.readouterr().out


def test_a_yaml_file_sets_the_values_and_a_typo_is_refused(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(f"output_dir: {tmp_path}\nbeta: 250\nlam: 0.8\n")
    bad.write_text(f"output_dir: {tmp_path}\nbetta: 250\n")
    (args,) = TrlParser(VideoGroupDPOConfig).parse_args_and_config(["--config", str(good)])
    assert (args.beta, args.lam) == (250.0, 0.8)
    with pytest.raises(ValueError, match="betta"):
        TrlParser(VideoGroupDPOConfig).parse_args_and_config(["--config", str(bad)])


def test_a_file_sets_the_options_that_are_lists_or_words(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "lora_target_modules: all-linear\ntimestep_range: [750, 995]\nsft_weight: 0.5\nrejected_score_below: 0.4\n"
    )
    line = ["--config", str(file), "--output_dir", str(tmp_path)]
    (args,) = TrlParser(VideoGroupDPOConfig).parse_args_and_config(line)
    assert (args.lora_target_modules, args.timestep_range) == ("all-linear", [750.0, 995.0])
    assert (args.sft_weight, args.rejected_score_below) == (0.5, 0.4)
    (unset,) = TrlParser(VideoGroupDPOConfig).parse_args_and_config(["--output_dir", str(tmp_path)])
    assert unset.lora_target_modules is unset.timestep_range is unset.rejected_score_below is None
    assert (unset.sft_weight, unset.heldout_evaluations) == (0.0, 10)
    (args,) = TrlParser(VideoGroupDPOConfig).parse_args_and_config([*line, "--lora_target_modules", "attention+ffn"])
    assert args.lora_target_modules == ["attention+ffn"]
    assert dataclasses.replace(args, sft_weight="dgr").sft_weight == "dgr"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0.0), ("0.5", 0.5), (50, 50.0), ("dgr", ("dgr", 1.0)), ("0.4*dgr", ("dgr", 0.4)), ("0*dgr", 0.0)],
)
def test_a_weight_of_the_chosen_error_is_a_number_or_a_multiple_of_the_ratio(value, expected):
    assert as_sft_weight(value) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"MAX_RESTARTS": "0"}, False),
        ({"USE_AGENT_STORE": "False"}, False),
        ({"RESTART_COUNT": "1"}, False),
    ],
)
def test_restarts_in_place_that_torch_does_not_survive_are_told(tmp_path, monkeypatch, caplog, changes, told):
    launch = {"MAX_RESTARTS": "2", "USE_AGENT_STORE": "True", "RESTART_COUNT": "0"} | changes
    monkeypatch.setenv("RANK", "0")
    for name, value in launch.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    config(tmp_path)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == told
