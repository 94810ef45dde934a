"""The transformer of a run from one file, in the layout of the original code or quantised as GGUF."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support.tiny import tiny_encoded_group, tiny_transformer, tiny_wan_pipeline
from tests.support.trainer.runs import trained_weights
from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.trainer.setup.quantization import plain
from video_trl.trainer.setup.single_file import load_transformer_file


gguf = pytest.importorskip("gguf")

# Parts of names in diffusers, and in Wan's original code.
NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "norm2": "norm3",
}


QUERY = "model.diffusion_model.blocks.0.self_attn.q.weight"


def original_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")


@pytest.fixture(scope="module")
def transformer():
    """Sides of 64, which blocks of 32 numbers divide."""
    return tiny_transformer(seed=7, attention_head_dim=32, ffn_dim=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose transformer has other weights, and files of one."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = tiny_wan_pipeline()
    pipeline.transformer = tiny_transformer(seed=1, attention_head_dim=32, ffn_dim=64)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(transformer, folder):
    """As ComfyUI has it."""
    weights = {f"model.diffusion_model.{original_name(n)}": w for n, w in transformer.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "wan.safetensors")
    return folder / "wan.safetensors"


@pytest.fixture(scope="module")
def quantised(transformer, folder):
    """8 bits of the linear layers in the blocks."""
    writer = gguf.GGUFWriter(folder / "wan.gguf", "wan")
    for name, weight in transformer.state_dict().items():
        array = weight.numpy()
        if name.startswith("blocks.") and array.ndim == 2 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(original_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(original_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "wan.gguf"


def make(folder, file, directory, **changes):
    quiet = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    args = VideoDPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=2,
        lora_rank=2,
        learning_rate=1e-2,
        transformer_file=file and str(file),
        **quiet,
        **changes,
    )
    return VideoDPOTrainer(str(folder), args, tiny_encoded_group(2, m=1))


def test_weights_in_the_original_layout_take_the_place_of_the_pipelines(transformer, folder, original, tmp_path):
    made = make(folder, original, tmp_path, use_peft=False)
    ours = dict(made.model.named_parameters())
    assert all(torch.equal(ours[name], weight) for name, weight in transformer.named_parameters())
    made.train()
    dtypes = []
    for file in (original, None):
        named = dict(make(folder, file, tmp_path / "half", bf16=True).model.named_parameters())
        dtypes.append({name: weight.dtype for name, weight in named.items()})
    assert dtypes[0] == dtypes[1] and len(set(dtypes[0].values())) == 2


def test_a_gguf_file_is_a_frozen_base_of_few_bits(transformer, folder, quantised, tmp_path):
    made = make(folder, quantised, tmp_path, activation_checkpointing=False)
    frozen = {n.replace(".base_layer", ""): w for n, w in made.model.named_parameters() if not w.requires_grad}
    exact = dict(transformer.named_parameters())
    in_bits = {name for name, weight in frozen.items() if weight.dtype == torch.uint8}
    assert len(in_bits) == sum(isinstance(layer, torch.nn.Linear) for layer in transformer.blocks.modules())
    for name, weight in frozen.items():
        values = plain(weight)
        assert values.shape == exact[name].shape
        torch.testing.assert_close(values.float(), exact[name], rtol=0, atol=2e-3 if name in in_bits else 0)
    before = trained_weights(made)
    kept: list[torch.Size] = []  # nothing holds a whole weight from the forward to the backward pass
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        made.train()
    wide = exact["blocks.0.ffn.net.0.proj.weight"].shape
    assert wide not in kept and wide[::-1] not in kept
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]
    assert all(not torch.equal(before[name], weight) for name, weight in trained_weights(made).items())
    made.save_model()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"pytorch_lora_weights.safetensors"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda w: w | {QUERY: w[QUERY].to(torch.float8_e4m3fn), f"{QUERY}.scale_weight": torch.ones(1)},
            "8 bits with scales .*would be taken unscaled",
        ),
        (
            lambda w: {name: w[name] for name in w if name != QUERY},
            "is not the `transformer` of .*weights are missing",
        ),
        (lambda w: w | {"extra.weight": torch.ones(2)}, "1 weights, such as 'extra.weight', have no place there"),
        (lambda w: tiny_transformer(num_layers=3).state_dict(), "is not the `transformer` of"),
    ],
    ids=["scaled", "less", "more", "another"],
)
def test_a_file_that_is_not_of_the_model_is_refused(changed, message, folder, original, tmp_path):
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(changed(safetensors.torch.load_file(original)), file)
    with pytest.raises(ValueError, match=message):
        make(folder, file, tmp_path / "run")


def test_what_cannot_be_read_is_refused_before_it_is_loaded(folder, original, quantised, tmp_path):
    def refused(file, message, **changes):
        with pytest.raises(ValueError, match=message):
            make(folder, file, tmp_path / "run", **changes)

    refused("nowhere.safetensors", "there is no file 'nowhere.safetensors'. Download it first")
    refused(tmp_path / "weights.pth", r"must end in .safetensors or .gguf")
    refused(quantised, "are quantised, and `use_peft=False` would train them", use_peft=False)
    refused(original, "Leave one unset", quantization="int8")
    half = tmp_path / "half.safetensors"
    half.write_bytes(original.read_bytes()[:1000])
    refused(half, "not a whole safetensors file")
    kind = "CogVideoXTransformer3DModel"
    with pytest.raises(ValueError, match=f"converts no single file of a {kind}.*diffusers layout"):
        load_transformer_file(str(original), kind, "any", "transformer", torch.float32, {})
