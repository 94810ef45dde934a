import ast
import copy
import json
import multiprocessing
import re
import resource
from pathlib import Path

import diffusers
import peft
import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open

from tests.support.adapters import IN_FOLDER
from tests.support.tiny import MAX_SEQUENCE_LENGTH, tiny_transformer, tiny_wan_pipeline
from video_trl import hub
from video_trl.data import probe_video
from video_trl.hub import model_card
from video_trl.hub.card import WITHOUT_LORA_LOADER
from video_trl.hub.lora import adapter_metadata
from video_trl.models import supported_pipelines


TARGETS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}


def generate(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red ball falls", generator=generator, output_type="pt", **CALL).frames


def with_adapter(**config):
    """A pipeline whose adapter has moved away from zero in every weight."""
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": TARGETS} | config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return pipeline


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 32},  # without metadata diffusers would take alpha = r
        {"r": 2, "lora_alpha": 1},
        {"rank_pattern": {"blocks.0.attn1.to_q": 8}, "alpha_pattern": {"blocks.1.attn1.to_k": 16}},
        {"use_rslora": True, "lora_alpha": 8},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*attn[12]\.to_[qv]"},
    ],
    ids=str,
)
def test_saved_adapter_reloads_in_a_fresh_pipeline_to_bit_equal_video(tmp_path, config):
    trained = with_adapter(**config)
    hub.check_lora_config(trained.transformer.peft_config["default"])
    path = hub.save_lora(trained.transformer, tmp_path / "adapter")
    assert path.name == hub.LORA_FILE_NAME and [entry.name for entry in path.parent.iterdir()] == [path.name]
    fresh = tiny_wan_pipeline()
    base = generate(fresh)
    fresh.load_lora_weights(str(path.parent), **IN_FOLDER)
    expected = generate(trained)
    assert torch.equal(generate(fresh), expected)
    assert not torch.equal(expected, base)  # the adapter does something, or the test would prove nothing


def test_alpha_and_rank_are_in_the_file_and_little_else(tmp_path):
    """Options at their defaults are left out: an older or newer PEFT may not know them."""
    pipeline = with_adapter(lora_alpha=32, rank_pattern={"blocks.0.attn1.to_q": 8})
    path = hub.save_lora(pipeline.transformer, tmp_path, base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    weights, config = hub.load_lora_state(path)
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 32, set(TARGETS))
    assert config.rank_pattern == {"blocks.0.attn1.to_q": 8}
    assert config.base_model_name_or_path == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert len(weights) == 2 * 4 * 2  # blocks, projections, matrices
    with safe_open(path, framework="pt") as file:
        assert all(key.startswith("transformer.blocks.") for key in file.keys())
        assert len(file.metadata()["lora_adapter_metadata"].splitlines()) < 20
    # The last is what diffusers before 0.40 does not take for granted.
    plain = adapter_metadata(LoraConfig(r=4, lora_alpha=4, target_modules=["attn1.to_q"]))
    assert plain == {
        **METADATA,
        "transformer.rank_pattern": {},
    }


def test_loaded_state_puts_the_same_adapter_back(tmp_path):
    trained = with_adapter(lora_alpha=32)
    hub.save_lora(trained.transformer, tmp_path)
    weights, config = hub.load_lora_state(tmp_path)
    other = tiny_wan_pipeline()
    other.transformer.add_adapter(config)
    set_peft_model_state_dict(other.transformer, weights)
    assert torch.equal(generate(other), generate(trained))


def test_only_the_named_adapter_is_saved(tmp_path):
    pipeline = with_adapter()
    expected = get_peft_model_state_dict(pipeline.transformer, adapter_name="default")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS), adapter_name="ref")
    weights, config = hub.load_lora_state(hub.save_lora(pipeline.transformer, tmp_path))
    assert config.r == 4 and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    with pytest.raises(ValueError, match=r"No adapter 'best' to save; the model has \['default', 'ref'\]"):
        hub.save_lora(pipeline.transformer, tmp_path, adapter_name="best")
    with pytest.raises(ValueError, match=r"the model has \[\]. Call `add_adapter` first"):
        hub.save_lora(tiny_transformer(), tmp_path)


def save_with_little_space(transformer, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    try:
        hub.save_lora(transformer, folder / "adapter")
    except OSError as error:
        (folder / "error.txt").write_text(str(error))


def test_full_disk_leaves_the_previous_file(tmp_path):
    path = hub.save_lora(with_adapter().transformer, tmp_path / "adapter")
    before = path.read_bytes()
    assert len(before) > 4000
    arguments = (with_adapter(lora_alpha=32).transformer, tmp_path)
    process = multiprocessing.get_context("fork").Process(target=save_with_little_space, args=arguments)
    process.start()
    process.join()
    assert "File too large" in (tmp_path / "error.txt").read_text()
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_file_of_another_tool_or_cut_off_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No LoRA weights at .*pytorch_lora_weights.safetensors"):
        hub.load_lora_state(tmp_path)
    path = tmp_path / hub.LORA_FILE_NAME
    safetensors.torch.save_file({"blocks.0.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="lacks the metadata 'lora_adapter_metadata', so its alpha is unknown"):
        hub.load_lora_state(tmp_path)
    hub.save_lora(with_adapter().transformer, tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        hub.load_lora_state(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(init_lora_weights="pissa"), "'pissa'. may change the base weights"),
        (LoraConfig(init_lora_weights="pissa_niter_4"), "may change the base weights"),
        (LoraConfig(init_lora_weights="olora"), "may change the base weights"),
        (LoraConfig(modules_to_save=["proj_out"]), r"`modules_to_save` must be empty, got \['proj_out'\]"),
        (LoraConfig(bias="all"), "`bias` must be 'none', got 'all'"),
        (LoraConfig(bias="lora_only"), "`bias` must be 'none', got 'lora_only'"),
        (LoraConfig(layer_replication=[(0, 2), (1, 2)]), "`layer_replication` must be empty"),
        (LoraConfig(trainable_token_indices=[1]), "`trainable_token_indices` must be empty"),
        (peft.LoKrConfig(), "must be a `peft.LoraConfig`, got LoKrConfig"),
        (peft.LoHaConfig(), "must be a `peft.LoraConfig`, got LoHaConfig"),
        (peft.IA3Config(), "must be a `peft.LoraConfig`, got IA3Config"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, peft.PeftConfig) else value[:30],
)
def test_adapters_that_would_not_come_back_are_refused(config, message):
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match=message):
        hub.check_lora_config(config)
    assert config == before


def card(**options) -> str:
    defaults = {
        "repo_id": "somebody/wan-physics",
        "base_model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "method": "group-dpo",
        "method_name": "[PhyGDPO](https://huggingface.co/papers/2512.24551)",
        "prompt": "a red ball falls",
        "fps": 16,
    }
    return hub.model_card(**(defaults | options))


def test_model_card_front_matter_is_what_the_hub_reads():
    data = ModelCard(card(license="apache-2.0")).data
    assert data.base_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and data.license == "apache-2.0"
    assert data.tags == ["video-trl", "group-dpo", "text-to-video", "diffusers", "lora"]
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-video")


def test_model_card_shows_what_it_is_given_and_no_empty_section():
    bare = card()
    for heading in ("## Evaluation", "## Training", "## Citation"):
        assert heading not in bare
    assert "None" not in bare and "{{" not in bare and "\n\n\n" not in bare
    full = card(
        hyperparameters={"beta": 500.0, "loss_type": "sampled", "pattern": "a|b\nc"},
        evaluation=[
            {"model": "base", "pc": 0.51234, "interval": "[0.46, 0.56]"},
            {"model": "ours", "pc": 0.7, "interval": ""},
        ],
        dataset="128 groups of simulated and generated videos",
        citation="@misc{phygdpo, title={PhyGDPO}}",
    )
    assert "| model | pc | interval |\n| --- | --- | --- |\n| base | 0.5123 | [0.46, 0.56] |" in full
    assert "| beta | 500 |" in full and "| pattern | a\\|b c |" in full
    assert "on 128 groups of simulated" in full and "@misc{phygdpo" in full
    assert ModelCard(full).data.tags[0] == "video-trl"


def test_model_card_of_a_local_base_model_claims_no_repository(tmp_path):
    for base_model in (str(tmp_path), "sandbox"):
        text = card(base_model=base_model)
        assert ModelCard(text).data.base_model is None and "huggingface.co/sandbox" not in text


def test_snippet_of_the_card_runs_as_it_stands(tmp_path, monkeypatch):
    """The reader copies the code block and runs it; here with local folders in place of repositories."""
    tiny_wan_pipeline().save_pretrained(tmp_path / "base")
    hub.save_lora(with_adapter().transformer, tmp_path / "adapter")
    text = card(
        base_model=str(tmp_path / "base"), repo_id=str(tmp_path / "adapter"), dtype="float32", call_kwargs=CALL
    )
    snippet = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    info = probe_video(tmp_path / "video.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (5, 32, 32, 16)
    (tmp_path / "adapter" / "ema").mkdir()
    (tmp_path / "adapter" / hub.LORA_FILE_NAME).rename(tmp_path / "adapter" / "ema" / hub.LORA_FILE_NAME)
    averaged = card(
        base_model=str(tmp_path / "base"), repo_id=str(tmp_path / "adapter"), dtype="float32", call_kwargs=CALL,
        averaged=True,
    )  # fmt: skip
    exec(averaged.split("```python\n")[1].split("```")[0], {})  # the weights that the card's numbers are of
    assert "numbers of evaluations on this card are of the average" in averaged and "`ema`" not in text


def test_push_to_an_impossible_id_promises_no_later_upload(tmp_path):
    (tmp_path / hub.LORA_FILE_NAME).touch()
    for push in (hub.push, hub.push_dataset):
        with pytest.raises(ValueError, match=r"Expected a repository on the Hub as 'user/name'.*got 'a/b/c'"):
            push(tmp_path, "a/b/c")


def test_push_of_a_folder_without_adapter_sends_nothing(tmp_path):
    (tmp_path / "README.md").write_text("# nothing here")
    with pytest.raises(ValueError, match="Nothing to push: .* has no pytorch_lora_weights.safetensors"):
        hub.push(tmp_path, "somebody/nothing")


def test_no_text_ends_a_block_of_the_card_or_its_evaluation(tmp_path):
    """Three backticks end a block of code, and the marks of the section in a prompt would take what lies between."""
    prompt = "```\n<!-- evaluation --><script>alert(1)</script>` ````"
    made = card(
        prompt=prompt,
        videos=[(prompt, "samples/a.mp4")],
        dataset="x](http://evil.example)<b>",
        hyperparameters={"headers": {"authorization": "Bearer sk-0123456789abcdef0123"}, "note": prompt},
    )
    assert "sk-0123" not in made
    blocks = re.findall(r"^(`{3,})\w*\n(.*?)^\1$", made, re.DOTALL | re.MULTILINE)
    snippet = blocks[0][1]
    assert ast.parse(snippet) and repr(prompt) in snippet  # whole
    outside = ModelCard(made).text.replace(snippet, "")  # in the front matter it is data
    assert "<script>" not in outside and "<b>" not in outside and outside.count("<!-- evaluation -->") == 1
    path = tmp_path / "README.md"
    path.write_text(made)
    hub.add_evaluation(path, [hub.Measurement("pc", 0.5)])
    changed = path.read_text()
    assert snippet in changed and "## Samples" in changed and "| pc | 0.5 |" in changed
    hub.add_evaluation(path, [hub.Measurement("pc", 0.7)])
    assert "| pc | 0.7 |" in path.read_text() and "| pc | 0.5 |" not in path.read_text()


def test_the_snippet_loads_by_the_transformer_where_a_pipeline_has_no_lora_loader():
    without = [name for name in supported_pipelines() if not issubclass(getattr(diffusers, name), LoraBaseMixin)]
    assert sorted(without) == sorted(WITHOUT_LORA_LOADER)
    facts = {"repo_id": "me/adapter", "method": "DPO", "method_name": "dpo", "prompt": "a ball", "fps": 24.0}
    card = model_card(base_model="x/y", pipeline_class="HunyuanVideo15Pipeline", **facts)
    assert "pipeline.transformer.load_lora_adapter('me/adapter', weight_name=" in str(card)


METADATA = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.target_modules": ["attn1.to_q"]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([1], "is no JSON object"),
        (METADATA | {"transformer.r": "4"}, "positive whole ranks"),
        (METADATA | {"transformer.r": 0}, "positive whole ranks"),
        (METADATA | {"transformer.lora_alpha": None}, "alphas that are numbers"),
        (METADATA | {"transformer.rank_pattern": [1]}, "expected `rank_pattern` to be an object"),
        (METADATA | {"transformer.rank_pattern": {"attn2": 1e9}}, "positive whole ranks"),
        (METADATA | {"transformer.r": 10**9}, "expected matrices of rank 1000000000 of"),
        (METADATA | {"transformer.new": 1}, r"options \['new'\] that this version"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_metadata_name_the_file(tmp_path, metadata, message):
    tensors = {"transformer.a.lora_A.weight": torch.ones(4, 8), "transformer.a.lora_B.weight": torch.ones(8, 4)}
    header = {"lora_adapter_metadata": metadata if isinstance(metadata, str) else json.dumps(metadata)}
    safetensors.torch.save_file(tensors, path := tmp_path / hub.LORA_FILE_NAME, header)
    with pytest.raises(ValueError, match=rf"{hub.LORA_FILE_NAME}.*{message}"):
        hub.load_lora_state(path)


def test_a_flipped_bit_in_the_metadata_is_found(tmp_path):
    path = hub.save_lora(with_adapter(lora_alpha=32).transformer, tmp_path)
    content = path.read_bytes()
    assert content.count(rb"lora_alpha\": 32") == 1
    path.write_bytes(content.replace(rb"lora_alpha\": 32", rb"lora_alpha\": 72"))
    with pytest.raises(ValueError, match="is damaged: its content is not that of its checksum"):
        hub.load_lora_state(tmp_path)
