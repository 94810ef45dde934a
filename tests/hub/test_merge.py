"""An adapter in the weights of its base: the same videos, without an adapter."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from tests.hub.test_lora_and_card import generate, with_adapter
from tests.support.tiny import tiny_cogvideox_pipeline, tiny_wan_pipeline
from video_trl.cli import main
from video_trl.hub import load_lora_state, merge_adapter, save_lora
from video_trl.hub.lora import write_lora


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
    adapted.load_lora_weights(base / "adapter")
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
