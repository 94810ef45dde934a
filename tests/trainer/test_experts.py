"""Pipelines with a transformer for high and one for low noise: a run trains one of them, within its timesteps."""

import math
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save_file

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import PROMPTS, tiny_group_dataset, tiny_pipeline, tiny_wan_a14b_pipeline
from tests.support.trainer.runs import assert_equal_weights
from tests.trainer.test_families import make
from video_trl.hub import LORA_FILE_NAME, load_lora_state, save_lora
from video_trl.hub.lora import expert_of, write_lora
from video_trl.trainer import LogVideosCallback


PARTS = ("transformer", "transformer_2")
EXPERTS = {"high_noise": ("transformer", 875, 1000), "low_noise": ("transformer_2", 0, 875)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("a14b")
    tiny_wan_a14b_pipeline().save_pretrained(directory)
    return directory


def video_of(pipeline) -> torch.Tensor:
    call = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(PROMPTS[0], generator=generator, max_sequence_length=16, output_type="latent", **call).frames
    return frames


@pytest.mark.parametrize("expert", EXPERTS)
def test_one_expert_is_loaded_trained_and_put_where_it_belongs(expert, saved, tmp_path):
    component, low, high = EXPERTS[expert]
    made = make("wan-a14b-t2v", "DPO", tmp_path, max_steps=3, extra={"model": str(saved)}, expert=expert)
    parts = made.pipeline.components
    (other,) = {"transformer", "transformer_2"} - {component}
    assert parts[other] is None and parts[component] is made.model
    made.train()
    timesteps = made.step.timesteps(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert timesteps.min() == low and timesteps.max() == pytest.approx(high)
    made.save_model()

    whole = DiffusionPipeline.from_pretrained(saved)
    whole.set_progress_bar_config(disable=True)
    before = video_of(whole)
    load = {"load_into_transformer_2": True} if component == "transformer_2" else {}
    whole.load_lora_weights(tmp_path, adapter_name="default", **load, **IN_FOLDER)
    assert_equal_weights(dict(whole.components[component].named_parameters()), dict(made.model.named_parameters()))
    assert load_lora_state(tmp_path)[1].lora_alpha == 8 and expert_of(tmp_path) == expert
    assert not torch.equal(video_of(whole), before)

    card = (tmp_path / "README.md").read_text()
    assert f"for the `{expert}` transformer of" in card
    assert ("load_into_transformer_2=True" in card) == (component == "transformer_2")


def test_the_reference_in_a_pipeline_is_the_transformer_that_is_trained(tmp_path):
    """Its two transformers have one architecture, so that the other one would pass for it."""
    model, other = tiny_pipeline("wan-a14b-t2v"), tiny_pipeline("wan-a14b-t2v")
    extra = {"model": model, "ref_model": other}
    made = make("wan-a14b-t2v", "DPO", tmp_path, max_steps=1, extra=extra, expert="low_noise")
    assert made.reference.transformer is other.transformer_2
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(2))
    other.transformer_2 = None
    with pytest.raises(ValueError, match="Expected `ref_model` with a `transformer_2`, got a WanPipeline without it"):
        make("wan-a14b-t2v", "DPO", tmp_path, extra=extra, expert="low_noise")


def test_all_weights_of_the_second_expert_are_trained_too(saved, tmp_path):
    made = make("wan-a14b-t2v", "SFT", tmp_path, use_peft=False, extra={"model": str(saved)}, expert="low_noise")
    made.train()
    made.save_model()
    reloaded = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert_equal_weights(dict(reloaded.named_parameters()), dict(made.model.named_parameters()))
    assert "pipeline.transformer_2 = WanTransformer3DModel.from_pretrained" in (tmp_path / "README.md").read_text()


def test_which_one_must_be_said(saved, tmp_path):
    high = r"'high_noise' \(`transformer`, timesteps 875 to 1000"
    low = r"'low_noise' \(`transformer_2`, timesteps 0 to 875"
    for model in (str(saved), tiny_wan_a14b_pipeline()):
        with pytest.raises(ValueError, match=rf"{high}\) and {low}\).*Set `expert`, got None"):
            make("wan-t2v", "DPO", tmp_path, extra={"model": model})
        with pytest.raises(ValueError, match="Set `expert`, got 'both'"):
            make("wan-t2v", "DPO", tmp_path, extra={"model": model}, expert="both")
    with pytest.raises(ValueError, match="chooses one of several transformers, and WanPipeline has one"):
        make("wan-t2v", "DPO", tmp_path, expert="low_noise")
    with pytest.raises(ValueError, match="`model` is a bare transformer. Set `timestep_range` instead"):
        model = tiny_wan_a14b_pipeline().transformer
        make("wan-t2v", "DPO", tmp_path, extra={"model": model}, expert="low_noise")


def test_the_other_expert_need_not_even_be_there(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "low")
    shutil.rmtree(tmp_path / "low" / "transformer")
    made = make("wan-a14b-t2v", "DPO", tmp_path / "run", extra={"model": str(tmp_path / "low")}, expert="low_noise")
    assert made.expert.component == "transformer_2"
    with pytest.raises(ValueError, match=r"lacks the subfolder\(s\) \['transformer'\]"):
        make("wan-a14b-t2v", "DPO", tmp_path / "run", extra={"model": str(tmp_path / "low")}, expert="high_noise")


def test_a_run_does_not_start_from_an_adapter_of_the_other_expert(saved, tmp_path):
    pipeline = tiny_wan_a14b_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["attn1.to_q"]))
    weights, config = load_lora_state(save_lora(pipeline.transformer, tmp_path / "plain").parent)
    high = str(write_lora(tmp_path / "high", weights, config, None, "high_noise").parent)
    with pytest.raises(ValueError, match="is for the transformer 'high_noise', not for 'low_noise'"):
        make("wan-a14b-t2v", "DPO", tmp_path, extra={"model": str(saved)}, expert="low_noise", init_adapter=high)
    for expert, adapter in (("high_noise", high), ("low_noise", str(tmp_path / "plain"))):  # which says of none
        made = make("wan-a14b-t2v", "DPO", tmp_path, extra={"model": str(saved)}, expert=expert, init_adapter=adapter)
        assert made.model.peft_config["ref"].lora_alpha == 8
    for option in ("init_adapter", "transformer_file"):  # as ComfyUI's users and quantisers call them
        for name in ("wan2.2_low_noise_14B.safetensors", "Wan2.2-T2V-A14B-LowNoise-Q8_0.safetensors"):
            shutil.copy(tmp_path / "plain" / LORA_FILE_NAME, tmp_path / name)
            with pytest.raises(ValueError, match="is called after the transformer 'low_noise', and the run"):
                changes = {option: str(tmp_path / name)}
                make("wan-a14b-t2v", "DPO", tmp_path, extra={"model": str(saved)}, expert="high_noise", **changes)
    file = str(tmp_path / "two.safetensors")
    save_file({f"{part}.{name}": weight.clone() for name, weight in weights.items() for part in PARTS}, file)
    with pytest.raises(ValueError, match="`init_adapter=.*cannot be loaded.*'transformer_2"):
        make("wan-a14b-t2v", "DPO", tmp_path, extra={"model": str(saved)}, expert="low_noise", init_adapter=file)
    tiny_pipeline("wan-t2v").save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="is for the transformer 'high_noise' of a pipeline with several"):
        make("wan-t2v", "DPO", tmp_path, extra={"model": str(tmp_path / "one")}, init_adapter=high)


def test_a_run_starts_from_an_adapter_that_the_pipeline_has_no_loader_for(tmp_path):
    pipeline = tiny_pipeline("hunyuan1.5-t2v")
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q"]))
    file = save_lora(pipeline.transformer, tmp_path / "adapter")
    for adapter in (file, file.parent):
        extra = {"model": str(tmp_path / "model")}
        made = make("hunyuan1.5-t2v", "DPO", tmp_path / "run", extra=extra, init_adapter=str(adapter))
        assert made.model.peft_config["ref"].lora_alpha == 8  # not the rank, as of a file that is loaded by its path


def test_a_range_lies_within_that_of_the_expert(tmp_path):
    """PhyWorld's window of the high-noise expert, and one that has nothing of it."""
    made = make("wan-a14b-i2v", "DPO", tmp_path, timestep_range=[850.0, 999.0], timestep_sampling="logit_normal")
    assert made.timestep_range == [900.0, 999.0]
    u = made.step.draw([0, 1, 2, 3], (4, 2, 4, 4)).u
    assert ((900 <= made.step.timesteps(u)) & (made.step.timesteps(u) <= 999)).all()
    with pytest.raises(ValueError, match="leaves nothing of the expert 'high_noise'"):
        make("wan-a14b-i2v", "DPO", tmp_path, timestep_range=[0.0, 500.0])


def test_noise_streams_are_those_of_a_run_without_experts(tmp_path):
    plain, expert = make("wan-t2v", "DPO", tmp_path), make("wan-a14b-t2v", "DPO", tmp_path)
    draws = [made.step.draw([3, 5], (4, 2, 4, 4)) for made in (plain, expert)]
    assert torch.equal(draws[0].u, draws[1].u) and torch.equal(draws[0].noise, draws[1].noise)


def test_both_runs_share_their_encoded_data(tmp_path):
    data = tiny_group_dataset(n=2, m=1)
    folders = set()
    for expert in EXPERTS:
        made = make(
            "wan-a14b-t2v",
            "DPO",
            tmp_path / expert,
            cache_dir=str(tmp_path / "cache"),
            extra={"train_dataset": data},
            expert=expert,
        )
        folders.add(made.train_dataset.rows.directory)
    assert len(folders) == 1


def test_samples_need_both_experts(saved, tmp_path):
    callback = LogVideosCallback(PROMPTS[:1], call_kwargs={"num_inference_steps": 2})
    with pytest.raises(ValueError, match=r"loaded without 'low_noise'.*Load the whole pipeline"):
        extra = {"model": str(saved), "callbacks": [callback], "train_dataset": tiny_group_dataset(1, 1)}
        make("wan-a14b-t2v", "DPO", tmp_path, extra=extra, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()  # it is known before videos are encoded
    with pytest.raises(ValueError, match=r"`evaluator` generates.*loaded without 'low_noise'"):
        make("wan-a14b-t2v", "DPO", tmp_path, extra={"model": str(saved), "evaluator": lambda pipeline, step: {}})
    made = make("wan-a14b-t2v", "DPO", tmp_path, max_steps=1, extra={"callbacks": [callback]})
    made.train()
    assert (tmp_path / "samples" / "step_1").is_dir() or (tmp_path / "samples" / "step_0").is_dir()


def test_a_run_of_one_expert_is_not_resumed_by_the_other(tmp_path):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make("wan-a14b-t2v", "DPO", tmp_path, **saving).train()
    other = make("wan-a14b-t2v", "DPO", tmp_path, expert="low_noise", **{**saving, "max_steps": 2})
    with pytest.raises(ValueError, match="other base weights"):
        other.train(resume_from_checkpoint=True)
