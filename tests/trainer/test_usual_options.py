"""Options that users know from elsewhere: kinds of LoRA, a start, optimizers by class, averages, weights of errors."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group, tiny_encoded_video, tiny_wan_pipeline
from tests.support.trainer.runs import config, trained_weights, trainer
from video_trl import VideoSFTConfig, VideoSFTTrainer
from video_trl.cli.methods import DataArguments
from video_trl.cli.parser import UsageError, check
from video_trl.diffusion import FlowMatching, VPrediction, loss_weights
from video_trl.hub import load_lora_state
from video_trl.hub.lora import write_lora
from video_trl.trainer.publishing.progress import where_everything_is
from video_trl.trainer.setup.optimizers import optimizer_and_options
from video_trl.trainer.step.passes import AdapterReference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline on disk, and an adapter that a run on it has made."""
    folder = tmp_path_factory.mktemp("start")
    tiny_wan_pipeline().save_pretrained(folder / "model")
    made = trainer(config(folder / "run", max_steps=1, use_dora=True, use_rslora=True), model=str(folder / "model"))
    made.train()
    made.save_model()
    return folder, trained_weights(made)


def test_kinds_of_the_default_adapter_reach_its_file(saved):
    folder, weights = saved
    state, made = load_lora_state(folder / "run")
    assert made.use_dora and made.use_rslora and made.r == 4
    assert any("magnitude" in name for name in state) and len(state) == len(weights)


@pytest.mark.parametrize("file", [False, True])
def test_a_run_starts_from_an_adapter_and_compares_with_a_copy_of_it(saved, tmp_path, file):
    folder, weights = saved
    start = folder / "run" / "pytorch_lora_weights.safetensors" if file else folder / "run"
    made = trainer(config(tmp_path, max_steps=1, init_adapter=str(start)), model=str(folder / "model"))
    now = {name.replace("default_0", "default"): weight for name, weight in trained_weights(made).items()}
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in now)
    assert isinstance(made.reference, AdapterReference) and "ref" in made.model.peft_config
    made.train()
    first = next(entry for entry in made.state.log_history if "loss" in entry)
    assert first["win_gap"] == first["lose_gap"] == 0  # policy and reference are one function


def test_a_start_that_is_none_is_refused(saved, tmp_path):
    folder, _ = saved
    model, (state, made) = str(folder / "model"), load_lora_state(folder / "run")
    with pytest.raises(ValueError, match="`init_adapter='nowhere'` cannot be loaded: .*nowhere"):
        trainer(config(tmp_path, init_adapter="nowhere"), model=model)
    save_file({f"transformer.{name}": weight for name, weight in state.items()}, tmp_path / "silent.safetensors")
    with pytest.raises(ValueError, match=r"`init_adapter=.*cannot be loaded: .*got .*magnitude.*--adapter_alpha"):
        trainer(config(tmp_path, init_adapter=str(tmp_path / "silent.safetensors")), model=model)
    deeper = state | {name.replace("blocks.1.", "blocks.7."): weight.clone() for name, weight in state.items()}
    write_lora(tmp_path / "deeper", deeper, made)
    with pytest.raises(ValueError, match="Only 8 of the 12 layers of .*deeper.* fit"):
        trainer(config(tmp_path, init_adapter=str(tmp_path / "deeper")), model=model)
    with pytest.raises(ValueError, match="`init_adapter='x'` is loaded when the model is named by a string"):
        trainer(config(tmp_path, init_adapter="x"))


def test_a_start_is_not_rounded_to_the_precision_of_its_base(saved, tmp_path):
    folder, weights = saved
    args = config(tmp_path, init_adapter=str(folder / "run"), model_init_kwargs={"dtype": "bfloat16"})
    made = trainer(args, model=str(folder / "model"))
    now = trained_weights(made)
    assert {weight.dtype for name, weight in made.model.named_parameters() if ".attn1.to_q.base" in name} == {
        torch.bfloat16
    }
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in now)


def test_an_optimizer_by_its_class_trains_and_resumes_exactly(tmp_path):
    options = {"optim_class": "torch.optim.NAdam", "optim_args": "betas=(0.8, 0.9), momentum_decay=1e-3"}
    whole = trainer(config(tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=6, **options))
    whole.train()
    assert type(whole.optimizer.optimizer) is torch.optim.NAdam
    assert whole.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    again = trainer(config(tmp_path / "a", save_strategy="no", max_steps=6, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    expected, got = trained_weights(whole), trained_weights(again)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    other = trainer(config(tmp_path / "a", save_strategy="no", max_steps=6, optim_class="torch.optim.Adagrad"))
    with pytest.raises(ValueError, match="another `optim_class`"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


@pytest.mark.skipif("Muon" not in vars(torch.optim), reason="not in torch before 2.9")
def test_muon_takes_the_matrices_of_an_adapter(tmp_path):
    made = trainer(config(tmp_path, max_steps=1, optim_class="torch.optim:Muon"))
    made.train()
    assert type(made.optimizer.optimizer) is torch.optim.Muon


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("Prodigy", None, "must be a class with its module"),
        ("prodigyopt_of_nobody.Prodigy", None, "pip install prodigyopt_of_nobody"),
        ("torch.optim.Nothing", None, r"torch\.optim has no 'Nothing' in the version 2\..*update it"),
        ("torch.nn.Linear", None, "must be a class of optimizers"),
        ("torch.optim.NAdam", "d_coef", "must be 'name=value,name=value'"),
        ("torch.optim.NAdam", "betas=open('x')", "must be 'name=value,name=value'"),
    ],
)
def test_what_is_no_optimizer_is_refused(tmp_path, path, arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizer_and_options(config(tmp_path, optim_class=path, optim_args=arguments))


def test_options_that_an_optimizer_does_not_take_are_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="The optimizer `optim_class='torch.optim.NAdam'` cannot be made"):
        trainer(config(tmp_path, optim_class="torch.optim.NAdam", optim_args="d_coef=1"))


# ---- averages


class Weights(TrainerCallback):
    """The trained weights after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append([w.detach().clone() for w in kwargs["model"].parameters() if w.requires_grad])


def test_the_average_is_that_of_its_formula_saved_evaluated_and_resumed_exactly(tmp_path):
    seen = Weights()
    settings = {"ema_decay": 0.3, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "heldout_evaluations": 0}
    whole = trainer(config(tmp_path / "a", **settings), callbacks=[seen], eval_dataset=tiny_encoded_group(2, seed=5))
    start = [w.detach().clone() for w in whole.model.parameters() if w.requires_grad]
    whole.train()
    whole.save_model()
    expected = start
    for step, weights in enumerate(seen.after, 1):
        decay = min(0.3, step / (9 + step)) if step > 1 else 0.0
        expected = [decay * mean + (1 - decay) * weight for mean, weight in zip(expected, weights, strict=True)]
    own = [w.detach().clone() for w in whole.model.parameters() if w.requires_grad]
    with whole.average.shown():
        shown = [w.detach().clone() for w in whole.model.parameters() if w.requires_grad]
    torch.testing.assert_close(shown, expected)
    assert all(map(torch.equal, own, [w for w in whole.model.parameters() if w.requires_grad]))
    plain, averaged = load_lora_state(tmp_path / "a")[0], load_lora_state(tmp_path / "a" / "ema")[0]
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)

    again = trainer(config(tmp_path / "a", **settings), eval_dataset=tiny_encoded_group(2, seed=5))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert "ema (averaged weights)" in where_everything_is(tmp_path / "a", again.state)
    with again.average.shown():
        assert all(map(torch.equal, shown, [w for w in again.model.parameters() if w.requires_grad]))
    # Evaluations see the average: the same loss as with these weights and no average.
    of_average = whole.evaluate()["eval_loss"]
    for weight, value in zip((w for w in again.model.parameters() if w.requires_grad), shown, strict=True):
        weight.data.copy_(value)
    again.average = type(again.average)(again.model, again.adapter_name, 0.0)
    assert again.evaluate()["eval_loss"] == of_average


def test_a_run_without_an_average_is_not_resumed_with_one(tmp_path):
    made = trainer(config(tmp_path, max_steps=1, save_strategy="steps", save_steps=1))
    made.train()
    assert not (tmp_path / "checkpoint-1" / "ema").exists()
    with pytest.raises(ValueError, match="that run kept none"):
        trainer(config(tmp_path, max_steps=2, ema_decay=0.9)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"`ema_decay` must be in \[0, 1\)"):
        config(tmp_path, ema_decay=1.0)


# ---- weights of errors by noise level


def test_weights_by_noise_level_are_the_published_ones():
    flow, schedule = FlowMatching(), VPrediction()
    levels = (torch.arange(1000) + 0.5) / 1000
    weights = loss_weights(flow, levels * 1000, "cosmap")
    assert weights.mean().item() == pytest.approx(1, abs=1e-5) and weights.argmax().item() in (499, 500)
    timesteps = torch.tensor([0, 100, 500, 999])
    ones = torch.ones(4, 1, 1, 1, 1)
    signal = schedule.add_noise(ones, 0 * ones, timesteps).flatten().double()
    ratio = signal**2 / (1 - signal**2)
    expected = (ratio.clamp(max=5) / (ratio + 1)).float()
    torch.testing.assert_close(loss_weights(schedule, timesteps, "min_snr"), expected, rtol=1e-3, atol=1e-6)
    for process, other in ((flow, "min_snr"), (schedule, "cosmap")):
        assert torch.equal(loss_weights(process, timesteps, "none"), torch.ones(4))
        with pytest.raises(ValueError, match="is not for this model"):
            loss_weights(process, timesteps, other)


def sft(folder, **changes):
    args = VideoSFTConfig(
        str(folder), use_cpu=True, max_steps=1, logging_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=2, **changes,
    )  # fmt: skip
    return VideoSFTTrainer(tiny_wan_pipeline(), args, tiny_encoded_video(2))


def test_a_weighted_loss_is_the_weighted_mean_of_the_errors(tmp_path):
    plain, weighted = sft(tmp_path / "a"), sft(tmp_path / "b", loss_weighting="cosmap")
    batch = plain.data_collator([plain.train_dataset[index] for index in range(2)])
    _, outputs = plain.compute_loss(plain.model, batch, return_outputs=True)
    timesteps = plain.step.timesteps(plain.step.draw(batch["index"], batch["latents"].shape[1:]).u)
    loss = weighted.compute_loss(weighted.model, batch)
    assert torch.equal(loss, (outputs["losses"] * loss_weights(FlowMatching(), timesteps, "cosmap")).mean())
    with pytest.raises(ValueError, match="`loss_weighting='min_snr'` is not for this model.*'cosmap'"):
        sft(tmp_path / "c", loss_weighting="min_snr")


# ---- names of other trainers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--lr", "here it is 'learning_rate'"),
        ("--model", "here it is 'model_name_or_path'"),
        ("--dataset", "here it is 'dataset_name'"),
        ("--batch_size", "here it is 'per_device_train_batch_size'"),
        ("--target-modules", "here it is 'lora_target_modules'"),
        ("--network_dim", "here it is 'lora_rank'"),
        ("--max_train_steps", "here it is 'max_steps'"),
        ("--snr_gamma", "here it is 'loss_weighting'"),
        ("--use_ema", "here it is 'ema_decay'"),
        ("--network_dropout", "here it is 'lora_dropout'"),
        ("--blocks_to_swap", "here it is 'offload_weights'"),
        ("--caption_column", "here it is 'column'"),
        ("--streaming", "no option --streaming: videos are encoded once"),
        ("--num_gpus", "--num_processes N starts a process on each"),
        ("--learning_rat", "did you mean 'learning_rate'"),
    ],
)
def test_names_of_other_trainers_are_answered_with_ours(given, message):
    with pytest.raises(UsageError, match=message):
        check((DataArguments, VideoSFTConfig), [given, "1"])


@pytest.mark.parametrize("words", [["--optim", "Prodigy"], ["--optim=prodigy"]], ids=str)
def test_optimizers_that_transformers_lacks_are_answered_with_their_class(words):
    with pytest.raises(UsageError, match=r"this one is --optim_class prodigyopt\.Prodigy"):
        check((DataArguments, VideoSFTConfig), words)
    for fine in ([], ["--optim"], ["--optim", "adafactor"]):
        assert check((DataArguments, VideoSFTConfig), fine) == fine


def test_every_answer_is_an_option():
    from video_trl import VideoDPOConfig
    from video_trl.cli.parser import _ELSEWHERE

    known = {*DataArguments.__dataclass_fields__, *VideoSFTConfig.__dataclass_fields__}
    known |= {*VideoDPOConfig.__dataclass_fields__}
    assert set(_ELSEWHERE.values()) <= known and not set(_ELSEWHERE) & known
