"""An adapter in the weights of its base: the same videos, without an adapter."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file

from tests.hub.test_lora_and_card import generate, with_adapter
from tests.support.adapters import IN_FOLDER
from tests.support.tiny import tiny_cogvideox_pipeline, tiny_pipeline, tiny_wan_pipeline
from tests.support.trainer.runs import assert_equal_weights
from video_trl.cli import main
from video_trl.hub import LORA_FILE_NAME, load_lora_state, merge_adapter, save_lora
from video_trl.hub.lora import write_lora
from video_trl.hub.merge import merge_into


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_wan_pipeline().save_pretrained(folder / "model")
    save_lora(with_adapter().transformer, folder / "adapter")
    return folder


def test_a_merged_model_is_the_model_with_its_adapter(base, tmp_path, capsys):
    target = tmp_path / "merged"
    assert main(["merge", str(base / "adapter"), str(target), "--model_name_or_path", str(base / "model")]) == 0
    assert str(target) in capsys.readouterr().out
    merged, adapted = DiffusionPipeline.from_pretrained(target), DiffusionPipeline.from_pretrained(base / "model")
    plain = generate(adapted)
    adapted.load_lora_weights(base / "adapter", **IN_FOLDER)
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())
    torch.testing.assert_close(generate(merged), generate(adapted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(generate(merged), plain, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="exists already"):
        merge_adapter(str(base / "model"), base / "adapter", target)


def test_a_scale_of_zero_leaves_the_base(base, tmp_path):
    file = base / "adapter" / "pytorch_lora_weights.safetensors"
    folder = merge_adapter(str(base / "model"), file, tmp_path / "same", scale=0.0)
    ours, theirs = (DiffusionPipeline.from_pretrained(path) for path in (folder, base / "model"))
    assert all(map(torch.equal, ours.transformer.parameters(), theirs.transformer.parameters()))


def test_what_does_not_fit_leaves_nothing(base, tmp_path):
    tiny_cogvideox_pipeline().save_pretrained(tmp_path / "cog")
    with pytest.raises(ValueError, match="No weight of .* fits .*cog"):
        merge_adapter(str(tmp_path / "cog"), base / "adapter", tmp_path / "x")
    with pytest.raises(ValueError, match="No adapter in"):
        merge_adapter(str(base / "model"), tmp_path, tmp_path / "x")
    state, config = load_lora_state(base / "adapter")
    deeper = state | {name.replace("blocks.1.", "blocks.7."): weight.clone() for name, weight in state.items()}
    write_lora(tmp_path / "deeper", deeper, config)
    with pytest.raises(ValueError, match="Only 8 of the 12 layers of .*deeper.* fit"):
        merge_adapter(str(base / "model"), tmp_path / "deeper", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert main(["merge", "one"]) == 2


def test_an_adapter_is_merged_into_the_expert_that_it_is_for(base, tmp_path):
    weights, config = load_lora_state(base / "adapter")
    low = write_lora(tmp_path / "low", weights, config, None, "low_noise")
    pipeline, untouched = tiny_pipeline("wan-a14b-t2v"), tiny_pipeline("wan-a14b-t2v")
    merge_into(pipeline, low, "tiny")
    assert_equal_weights(pipeline.transformer.state_dict(), untouched.transformer.state_dict())
    expected = tiny_pipeline("wan-a14b-t2v")
    expected.load_lora_weights(low.parent, load_into_transformer_2=True, **IN_FOLDER)
    expected.fuse_lora(components=["transformer_2"])
    expected.transformer_2.unload_lora()
    assert_equal_weights(pipeline.transformer_2.state_dict(), expected.transformer_2.state_dict())
    with pytest.raises(ValueError, match="'tiny' has the transformers .*does not say which one it is for"):
        merge_into(pipeline, base / "adapter" / LORA_FILE_NAME, "tiny")
    with pytest.raises(ValueError, match="is for the transformer 'low_noise' of a pipeline with several; 'tiny'"):
        merge_into(tiny_wan_pipeline(), low, "tiny")


def test_a_pipeline_without_a_loader_of_adapters_is_merged_too(tmp_path):
    pipeline = tiny_pipeline("hunyuan1.5-t2v")
    before = pipeline.transformer.transformer_blocks[0].attn.to_q.weight.clone()
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["transformer_blocks.0.attn.to_q"]))
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    change = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / rank
    file = save_lora(pipeline.transformer, tmp_path)
    merged = tiny_pipeline("hunyuan1.5-t2v")
    merge_into(merged, file, "tiny")
    torch.testing.assert_close(merged.transformer.transformer_blocks[0].attn.to_q.weight, before + change)


def test_a_published_adapter_is_merged_as_strongly_as_it_was_trained(base, tmp_path):
    state, config = load_lora_state(base / "adapter")
    silent = {f"base_model.model.{name}": weight for name, weight in state.items()}
    save_file(silent, tmp_path / "silent.safetensors")
    with pytest.raises(ValueError, match="does not say the alpha"):
        merge_adapter(str(base / "model"), tmp_path / "silent.safetensors", tmp_path / "x")
    words = ["--model_name_or_path", str(base / "model"), "--adapter_alpha", str(config.lora_alpha)]
    assert main(["merge", str(tmp_path / "silent.safetensors"), str(tmp_path / "x"), *words]) == 0
    whole = merge_adapter(str(base / "model"), base / "adapter", tmp_path / "whole")
    ours, theirs = (DiffusionPipeline.from_pretrained(path) for path in (tmp_path / "x", whole))
    assert all(map(torch.equal, ours.transformer.parameters(), theirs.transformer.parameters()))
