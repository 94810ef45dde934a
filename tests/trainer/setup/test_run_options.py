"""What can be known before anything is encoded is told before; options without effect are told too."""

import logging
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import TrainingArguments

from tests.support.tiny import tiny_encoded_group, tiny_encoded_video, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.heads import head_config
from tests.support.trainer.repa_runs import repa_trainer
from tests.support.trainer.runs import config, trainer
from video_trl import VideoGroupDPOConfig, VideoSFTTrainer
from video_trl.trainer.setup.optimizers import unread_options
from video_trl.trainer.setup.run_options import check_run_options


# Nothing here can be opened: whoever gets to encoding fails otherwise.
RAW = [{"prompt": "a", "chosen": "nowhere.mp4", "rejected": ["nowhere.mp4"]}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "`learning_rate` must be finite and not negative, got -1.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be finite and not negative, got nan"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be finite and not negative"),
        ({"weight_decay": float("inf")}, "`weight_decay` must be finite"),
        ({"adam_beta2": 1.5}, r"`optim='adamw_torch(_fused)?'` cannot be made.*Invalid beta"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "`optim='sgd'` cannot be made.*Invalid momentum"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9, nestorov=true"},
            "`optim='sgd'` cannot be made.*it has no option 'nestorov'",
        ),
        ({"lr_scheduler_kwargs": {"x": 1}}, r"`lr_scheduler_type='cosine_with_min_lr'` cannot be made.*\{'x': 1\}"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {}}, "cannot be made"),
        ({"report_to": "comet_ml"}, "`report_to='comet_ml'` needs a package that is not installed"),
        ({"report_to": "nonsense"}, "there is no tracker 'nonsense'; known:.*'wandb'"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy='steps'` needs an `eval_dataset`"),
        ({"eval_on_start": True}, "`eval_on_start=True` needs an `eval_dataset`"),
        ({"seed": -1}, r"`seed` must be at least 0 and less than 2\*\*32, got -1"),
        ({"data_seed": 2**32}, "`data_seed` must be at least 0"),
        ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must not be negative"),
        ({"save_strategy": "steps", "save_steps": 0}, "`save_steps` must be positive"),
        ({"logging_steps": -1}, "`logging_steps` must be positive"),
        ({"save_strategy": "steps", "save_total_limit": 0}, "`save_total_limit` must be positive"),
        ({"output_dir": "/proc/nowhere/run"}, "`output_dir`: /proc/nowhere/run cannot be written"),
        ({"output_dir": __file__}, "`output_dir`: .* cannot be written"),
        ({"max_steps": 0}, "`max_steps` must be positive, or -1 where"),
        ({"max_steps": -5}, "`max_steps` must be positive, or -1 where"),
        ({"dataloader_persistent_workers": True}, "The loader cannot be made with dataloader_num_workers=0"),
        pytest.param(
            {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "threads"},
            "The loader cannot be made with .*dataloader_multiprocessing_context='threads'",
            marks=pytest.mark.skipif(
                "dataloader_multiprocessing_context" not in TrainingArguments.__dataclass_fields__,
                reason="an option of newer transformers",
            ),
        ),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": -1}, "The loader cannot be made with"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_be_known_is_told_before_anything_is_encoded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(config(tmp_path, physics_rewarding=False, **changes), train_dataset=RAW)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lomo", "`optim='lomo'` is not supported.*Use one of 'adamw_torch'"),
        ("galore_adamw", "is not supported"),
        ("apollo_adamw", "is not supported"),
        ("stable_adamw", "is not supported"),
        ("schedule_free_adamw", "is not supported"),  # evaluates averaged weights, and would save others
    ],
)
def test_optimizers_that_are_not_proven_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, optim=name)


def test_no_evaluation_datasets_are_none(tmp_path):
    args = config(tmp_path, physics_rewarding=False, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="`eval_strategy='steps'` needs an `eval_dataset`"):
        trainer(args, train_dataset=RAW, eval_dataset={})


def test_optimizers_of_packages_that_are_not_there_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, library in (("lion_32bit", "bitsandbytes"), ("adamw_torch_4bit", "torchao")):
        with pytest.raises(ValueError, match=f"`optim='{name}'` needs the package {library}, which is not installed"):
            config(tmp_path, optim=name)


@pytest.mark.parametrize("kind", ["linear", "constant", "cosine_with_restarts", "reduce_lr_on_plateau", "polynomial"])
def test_the_schedules_that_exist_pass(tmp_path, kind):
    evaluation = {"eval_strategy": "steps"} if kind == "reduce_lr_on_plateau" else {}
    args = VideoGroupDPOConfig(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type=kind, **evaluation)
    check_run_options(args, evaluates=True)


# ---- Options without effect ----


def told(caplog, make):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make()
    found = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert len(found) <= 1
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"timestep_shift": 5.0}, "`timestep_shift=5.0`: `timestep_sampling` is not 'shifted'"),
        ({"timestep_logit_mean": 1.0}, "`timestep_logit_mean=1.0`: `timestep_sampling` is not 'logit_normal'"),
        ({"timestep_sampling": "shifted", "timestep_shift": 2.0, "timestep_logit_std": 2.0}, "`timestep_logit_std"),
        ({"num_frames": 9, "height": 32, "width": 32}, "`height=32`: the rows are encoded already"),
        ({"fps": 8.0}, "`fps=8.0`: the rows are encoded already"),
        ({"physics_rewarding": False, "lam": 0.1}, "`lam=0.1`: `physics_rewarding` is off"),
        ({"checkpointing_policy": "offload"}, "`activation_checkpointing` is off"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "`warmup_steps=5`"),
        ({"optim_args": "nonsense=1"}, "`optim_args='nonsense=1'`: `optim='adamw_torch"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "`adam_beta1=0.5`: `optim='sgd'` has no betas"),
        ({"optim": "sgd", "adam_epsilon": 1e-3}, "`adam_epsilon=0.001`: `optim='sgd'` has none"),
        ({"optim": "adafactor", "adam_epsilon": 1e-3}, "`adam_epsilon=0.001`: `optim='adafactor'` has none"),
        ({"save_total_limit": 2}, "`save_total_limit=2`: `save_strategy` is 'no'"),
        ({"logging_strategy": "epoch", "logging_steps": 3}, "`logging_steps=3`: `logging_strategy` is not 'steps'"),
        ({"eval_steps": 3}, "`eval_strategy` is 'no'"),
        ({"load_best_model_at_end": True}, "`load_best_model_at_end=True`: `eval_strategy` is 'no'"),
        ({"use_peft": False}, "`lora_rank=4`: `use_peft` is off"),
        ({"max_steps": 2, "num_train_epochs": 5}, "`num_train_epochs=5`: `max_steps` says when the run ends"),
        ({"optim_target_modules": ["attn"]}, "`optim_target_modules=['attn']`: nothing in a video trainer reads it"),
        ({"prediction_loss_only": True}, "`prediction_loss_only=True`: nothing in a video trainer reads it"),
        ({"average_tokens_across_devices": False}, "`average_tokens_across_devices=False`: nothing"),
        ({"ddp_bucket_cap_mb": 10}, "`ddp_bucket_cap_mb=10`: there is one process"),
        ({"run_name": "a"}, "`run_name='a'`: `report_to` names no tracker"),
        ({"project": "a"}, "`project='a'`: `report_to` does not name 'trackio'"),
        ({"hub_strategy": "end"}, "`push_to_hub` is off"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 1}},
            "`lr_scheduler_type='constant'` takes none",
        ),
        ({"heldout_evaluations": 4}, "`heldout_evaluations=4`: there is no `eval_dataset`"),
        ({"reference_is_base": True}, "`reference_is_base=True`: no adapter is continued"),
        ({"loss_type": "sum", "scale_by_group": False}, "`scale_by_group=False`: `loss_type` is not 'sampled'"),
        ({"lose_gap_weight": 0.0, "lose_gap_clip": 1.0}, "`lose_gap_clip=1.0`: `lose_gap_weight` is 0"),
        ({"timestep_weighting": "bell", "gap": "log_ratio"}, "`timestep_weighting='bell'`: both errors of a ratio"),
        (
            {"label_names": ["x"], "batch_eval_metrics": True},
            "`label_names=['x']`: nothing in a video trainer reads it",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_without_effect_is_told(tmp_path, caplog, changes, expected):
    assert expected in told(caplog, lambda: trainer(config(tmp_path, **changes)))


def test_options_beside_rows_to_evaluate_on_are_told_where_others_decide(tmp_path, caplog):
    held_out = tiny_encoded_group(2, seed=3)
    both = {"eval_strategy": "epoch", "eval_steps": 3, "heldout_evaluations": 4, "metric_for_best_model": "loss"}
    found = told(caplog, lambda: trainer(config(tmp_path, **both), eval_dataset=held_out))
    assert "`eval_steps=3`: `eval_strategy` is not 'steps'" in found and "`eval_strategy` is given" in found
    assert "`metric_for_best_model='loss'`: nothing looks for the best weights" in found
    made = config(tmp_path, heldout_evaluations=4)
    assert "heldout" not in told(caplog, lambda: trainer(made, eval_dataset=held_out))


def test_options_of_an_alignment_beside_the_preference_are_told(tmp_path):
    options = {"alignment_loss": "repa", "margin": 0.2, "teacher_batch_size": 2, "precompute_teacher": False}
    idle = config(tmp_path, repa_coeff=0.5, repa_options=options).options_without_effect()["repa_options"]
    assert "`margin`: `alignment_loss='repa'` compares tokens" in idle and "`teacher_batch_size`" in idle
    assert (
        "repa_options" not in config(tmp_path, repa_coeff=0.5, repa_options={"margin": 0.2}).options_without_effect()
    )
    assert (
        config(tmp_path, repa_options={"margin": 0.2}).options_without_effect()["repa_options"] == "`repa_coeff` is 0"
    )


def test_what_deepspeeds_configuration_decides_is_told(tmp_path):
    args = config(tmp_path, optim="sgd", lr_scheduler_type="linear")
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "Adam"}, "scheduler": {}})
    idle = args.options_without_effect()
    assert idle["optim"] == "DeepSpeed's configuration has an `optimizer`"
    assert idle["lr_scheduler_type"] == "DeepSpeed's configuration has a `scheduler`"


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("sgd", "momentum=0.9,nesterov=false,dampening=0,weight_decay=0.1"),
        ("rmsprop", "alpha=0.9, centered=True"),
        ("adagrad", "lr_decay=0"),
    ],
)
def test_options_of_an_optimizer_that_it_reads_are_taken_whatever_their_value(tmp_path, optim, options):
    assert unread_options(config(tmp_path, optim=optim, optim_args=options)) == []


def test_an_option_with_effect_is_not(tmp_path, caplog):
    effective = [
        {},
        {"timestep_sampling": "shifted", "timestep_shift": 2.0},
        {"timestep_sampling": "logit_normal", "timestep_logit_mean": 1.0, "timestep_logit_std": 0.5},
        {"activation_checkpointing": True, "checkpointing_policy": "attention"},
        {"lam": 0.1, "alpha_min": 0.6},
        {"warmup_steps": 2, "save_strategy": "steps", "save_steps": 2},
    ]
    for changes in effective:
        assert told(caplog, lambda given=changes: trainer(config(tmp_path, **given))) == ""


def test_options_beside_an_adapter_or_optimizer_of_the_user_are_told(tmp_path, caplog):
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.add_adapter(trainer(config(tmp_path)).model.peft_config["default"])
    optimizer = torch.optim.SGD([w for n, w in pipeline.transformer.named_parameters() if "lora_" in n], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = config(tmp_path, warmup_steps=2, reference_is_base=True, optim="sgd", optim_args="momentum=0.5")
    message = told(caplog, lambda: trainer(args, model=pipeline, optimizers=(optimizer, schedule)))
    assert "`lora_rank=4`: the adapter is that of" in message
    assert "`learning_rate=0.01`: the optimizer is that of `optimizers`" in message and "`optim_args=" in message
    assert "`warmup_steps=2`: the schedule is that of `optimizers`" in message and "reference_is_base" not in message


def test_teacher_options_beside_tokens_and_repa_options_are_told(tmp_path, caplog):
    message = told(caplog, lambda: repa_trainer(tmp_path, projector="none", projector_width=16))
    assert "`projector_width=16`: `projector` is not 'mlp'" in message


# ---- What the user shows is what is trained on ----


def test_a_transform_is_refused_and_a_choice_of_columns_is_kept(tmp_path):
    raw = tiny_group_dataset(2, 1)
    with pytest.raises(ValueError, match="has a transform.*Apply it for good: `dataset.map"):
        trainer(config(tmp_path), train_dataset=raw.with_transform(lambda rows: rows))
    encoded = datasets.Dataset.from_list(
        [
            {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
            for row in tiny_encoded_video(2)
        ]
    )
    encoded.set_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="has a transform"):
        VideoSFTTrainer(tiny_wan_pipeline(), head_config(tmp_path), encoded)
    shown = raw.with_format("numpy", columns=["prompt", "chosen", "rejected"])
    with pytest.raises(ValueError, match="needs the column 'rejected_scores'"):
        trainer(config(tmp_path), train_dataset=shown)
    with_scores = raw.with_format("numpy", columns=["prompt"], output_all_columns=True)
    cache = str(tmp_path / "cache")
    trainer(config(tmp_path, physics_rewarding=False, cache_dir=cache), train_dataset=shown)
    assert "rejected_scores" in trainer(config(tmp_path, cache_dir=cache), train_dataset=with_scores).train_dataset[0]


@pytest.mark.parametrize("wrap", [dict, datasets.DatasetDict])
def test_several_splits_are_no_training_data(tmp_path, wrap):
    splits = wrap({"train": tiny_group_dataset(1, 1), "test": tiny_group_dataset(1, 1)})
    with pytest.raises(ValueError, match=r"Expected one dataset, got a .*[dD]ict with the splits \['train', 'test'\]"):
        trainer(config(tmp_path), train_dataset=splits)


def test_predict_gives_the_metrics_of_an_evaluation(tmp_path):
    rows = tiny_encoded_group(3, seed=4)
    made = trainer(config(tmp_path), eval_dataset=rows)
    predicted, evaluated = made.predict(rows), made.evaluate()
    assert predicted.predictions is None and predicted.metrics["test_loss"] == evaluated["eval_loss"]
    assert predicted.metrics["test_rewards/margins"] == evaluated["eval_rewards/margins"]
    with pytest.raises(ValueError, match="needs the columns"):
        made.predict([{"prompt": "a"}])


# ---- Precision by name ----


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_by_name_is_that_dtype(tmp_path, name):
    tiny_wan_pipeline().save_pretrained(tmp_path / "base")
    model, rows = str(tmp_path / "base"), tiny_encoded_video(2)

    def load(value):
        return VideoSFTTrainer(model, head_config(tmp_path, model_init_kwargs={name: value}), rows).pipeline

    for value in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        pipeline = load(value)
        assert pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    pipeline = load({"text_encoder": "bfloat16", "default": "float32"})
    assert (pipeline.text_encoder.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    for value in ("bf16", "int8", 16, "auto", {"vae": "half precision"}):
        with pytest.raises(ValueError, match=f"`{name}` in `model_init_kwargs` must be a floating dtype"):
            load(value)
