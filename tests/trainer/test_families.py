"""
Every trainer on every family of models, with an adapter and with all weights: the cells of the table in
docs/trainers/models.md, which names these tests.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import video_trl
from tests.support import cells as proven
from tests.support import rounding
from tests.support.adapters import IN_FOLDER
from tests.support.cells import TRAINERS
from tests.support.paths import DOCS
from tests.support.tiny import (
    FAMILIES,
    MAX_SEQUENCE_LENGTH,
    PROMPTS,
    TINY_FAMILIES,
    tiny_cogvideox_pipeline,
    tiny_encoded_group,
    tiny_encoded_video,
    tiny_group_dataset,
    tiny_latents_shape,
    tiny_pipeline,
    tiny_transformer,
    tiny_video,
    tiny_wan_i2v_pipeline,
)
from tests.support.trainer.runs import assert_equal_weights, frozen_weights, trained_weights
from video_trl.data import read_video
from video_trl.hub import LORA_FILE_NAME
from video_trl.hub.card import WITHOUT_LORA_LOADER
from video_trl.models import family_of
from video_trl.trainer import LogVideosCallback


WEIGHTS = ("lora", "full")
CELLS = [(family, name, weights) for family in TINY_FAMILIES for name in TRAINERS for weights in WEIGHTS]
FLOAT32 = ("vae", "image_encoder")  # whatever the others are: the first is sensitive, the second small
CELL_IDS = ["-".join(cell) for cell in CELLS]
MARKED = [  # the later families take the same paths as the first four
    pytest.param(*cell, marks=[pytest.mark.slow] if cell[1:] != ("DPO", "lora") and cell[0] not in FAMILIES else [])
    for cell in CELLS
]


def make(family: str, name: str, directory: Path, **changes: Any) -> Any:
    """A trainer for one or two steps at a learning rate that moves the weights visibly; alpha is twice the rank."""
    extra = changes.pop("extra", {})
    arguments = {"model": tiny_pipeline(family), "train_dataset": rows_for(family, name)} | extra
    args = getattr(video_trl, f"Video{name}Config")(
        **{
            "output_dir": str(directory),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "lora_rank": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **({"physics_rewarding": False} if name == "GroupDPO" else {}),
            **({"align_layer": 1, "projector": "linear"} if name == "REPA" else {}),
            **TINY_FAMILIES[family].options,
            **changes,
        }
    )
    return getattr(video_trl, f"Video{name}Trainer")(args=args, **arguments)


def rows_for(family: str, name: str) -> list[dict[str, Any]]:
    """Encoded rows of the kind that a trainer takes; pairs for the preference methods."""
    if name == "SFT":
        return tiny_encoded_video(family=family)
    if name != "REPA":
        return tiny_encoded_group(m=1, family=family)
    channels, _, height, width = tiny_latents_shape(family)
    generator = torch.Generator().manual_seed(1)
    teacher = {  # of a teacher that sees a frame where the transformer has a latent one
        "teacher_scale": torch.full((3, 4), 0.02),
        "teacher_grid": torch.tensor([3, 2, 2]),
        "teacher_frame_times": torch.tensor([0.0, 2.5, 6.5]),
    }
    return [
        row | teacher | {"teacher_tokens": torch.randint(-127, 128, (3, 4, 8), generator=generator, dtype=torch.int8)}
        for row in tiny_encoded_video(family=family, latents_shape=(channels, 3, height, width))
    ]


def velocity(pipeline: Any, family: str) -> Tensor:
    """What the transformer of a pipeline predicts for one encoded row."""
    adapter = family_of(pipeline)
    (row,) = tiny_encoded_video(1, seed=5, family=family)
    length = adapter.prompt_length(pipeline.transformer) or MAX_SEQUENCE_LENGTH
    conditions = adapter.pad_prompts([{column: row[column] for column in adapter.prompt_columns}], length)
    conditions |= {column: row[column][None] for column in adapter.row_columns if column not in conditions}
    timesteps = adapter.noise_process.sample_timesteps(torch.tensor([0.6]))
    with torch.no_grad():
        return adapter.predict(pipeline.transformer.eval(), row["latents"][None], timesteps, conditions)


def load_adapter(pipeline: Any, directory: Path) -> None:
    """As a user does, and as the card says it: by the pipeline, or its transformer where that has no LoRA loader."""
    if type(pipeline).__name__ in WITHOUT_LORA_LOADER:
        pipeline.transformer.load_lora_adapter(directory, weight_name=LORA_FILE_NAME)
    else:
        pipeline.load_lora_weights(directory, **IN_FOLDER)


def first_log(made: Any) -> dict[str, float]:
    return next(entry for entry in made.state.log_history if "loss" in entry)


def test_the_table_of_models_is_what_the_tests_run_on():
    page = (DOCS / "trainers" / "models.md").read_text(encoding="utf-8")
    lines = page[page.index("| family |") :].split("\n\n")[0].splitlines()
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert titles[2:] == list(proven.CELLS)
    assert [row[0].strip("`") for row in rows] == list(TINY_FAMILIES)
    for row in rows:
        name = row[0].strip("`")
        assert ("image to video" in row[1]) == name.endswith("i2v")
        assert row[2:] == ["x" if name in families else "" for families in proven.CELLS.values()], name


@pytest.mark.parametrize(("family", "name", "weights"), MARKED, ids=CELL_IDS)
def test_a_trainer_trains_and_its_weights_reload(family, name, weights, tmp_path):
    made = make(family, name, tmp_path, use_peft=weights == "lora")
    untouched = tiny_pipeline(family)
    before, frozen = trained_weights(made), frozen_weights(made)
    made.train()

    if name in ("DPO", "GroupDPO"):
        assert first_log(made)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    elif name == "RegDPO":
        assert first_log(made)["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(entry["loss"]) for entry in made.state.log_history if "loss" in entry)

    after = trained_weights(made)
    own = {key for key in before if not key.startswith("trained_head.")}
    moved = {key for key in own if not torch.equal(before[key], after[key])}
    if weights == "lora":
        assert_equal_weights(frozen_weights(made), frozen)
        targets = [f".{target}.lora_" for target in made.family.lora_target_modules]
        assert own and all(any(target in key for target in targets) for key in own) and moved == own
    else:
        assert set(frozen) == made.family.idle_weights(made.model) and moved == own
    for part in ("vae", "text_encoder"):
        assert_equal_weights(
            dict(made.pipeline.components[part].state_dict()), dict(getattr(untouched, part).state_dict())
        )

    made.save_model()
    fresh = tiny_pipeline(family)
    base, expected = velocity(fresh, family), velocity(made.pipeline, family)
    assert not torch.allclose(base, expected, atol=1e-5)
    if weights == "lora":
        load_adapter(fresh, tmp_path)
        assert torch.equal(velocity(fresh, family), expected)
    else:
        fresh.transformer = type(fresh.transformer).from_pretrained(tmp_path / "transformer")
        assert_equal_weights(dict(fresh.transformer.named_parameters()), without_head(after) | frozen)
        # Weights mapped from a file may be aligned otherwise in memory, and matrix products then round otherwise.
        rounding.assert_close(velocity(fresh, family), expected, rounding.SINGLE)


def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if not name.startswith("trained_head.")}


@pytest.mark.parametrize("family", proven.later_ones_slow(proven.CELLS["videos"]))
def test_from_videos_to_videos(family, tmp_path):
    """Raw rows are encoded, trained on, and the adapter's file makes the same video in a fresh pipeline."""
    tiny = TINY_FAMILIES[family]
    frames, size = tiny.frames, {"height": tiny.side, "width": tiny.side}
    made = make(
        family,
        "DPO",
        tmp_path,
        cache_dir=str(tmp_path / "cache"),
        extra={
            "train_dataset": tiny_group_dataset(n=2, m=1, num_frames=frames, **size),
            "callbacks": [LogVideosCallback(PROMPTS[:2], every_steps=2, call_kwargs={"num_inference_steps": 2})],
        },
    )
    encoders = [module for name, module in made.pipeline.components.items() if "encoder" in name or name == "vae"]
    assert all(next(encoder.parameters()).device.type == "cpu" for encoder in encoders if encoder is not None)
    made.train()
    assert first_log(made)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for step in (0, 2):
        assert read_video(tmp_path / "samples" / f"step_{step}" / "01.mp4").shape == (frames, tiny.side, tiny.side, 3)
    assert made.sampler.call_kwargs["num_frames"] == frames

    made.save_model()
    fresh = tiny_pipeline(family)
    load_adapter(fresh, tmp_path)
    call = made.sampler.call_kwargs | {"num_inference_steps": 2, "output_type": "np"}
    if "i2v" in family:
        call["image"] = Image.fromarray(tiny_video(0, **size)[0])
    videos = [
        pipeline(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **call).frames
        for pipeline in (made.pipeline, fresh, tiny_pipeline(family))
    ]
    assert (videos[0] == videos[1]).all() and abs(videos[0] - videos[2]).max() > 1e-4
    card = (tmp_path / "README.md").read_text()
    assert f"import {type(fresh).__name__}" in card and ("load_image" in card) == ("i2v" in family)


@pytest.mark.parametrize("family", [*FAMILIES[1:], pytest.param("ltx2-t2v", marks=pytest.mark.slow)])
def test_a_pipeline_is_loaded_by_its_path(family, tmp_path):
    tiny_pipeline(family).save_pretrained(tmp_path / "pipeline")
    made = make(family, "DPO", tmp_path / "run", bf16=True, extra={"model": str(tmp_path / "pipeline")})
    assert type(made.pipeline) is type(tiny_pipeline(family))
    assert {made.model.dtype, made.pipeline.text_encoder.dtype} == {torch.bfloat16}
    assert {made.pipeline.components[name].dtype for name in made.pipeline.components if name in FLOAT32} == {
        torch.float32
    }


@pytest.mark.parametrize("ratio", [0.875, 0.9])
def test_one_of_two_experts_does_not_train_at_all_noise_levels(ratio, tmp_path):
    pipeline = tiny_wan_i2v_pipeline(image_encoder=False)
    pipeline.register_to_config(boundary_ratio=ratio)  # loaded with `transformer_2=None`, as one does to save memory
    with pytest.raises(ValueError, match=r"Set `expert`, got None"):
        make("wan-i2v", "DPO", tmp_path, extra={"model": pipeline})
    low = round(1000 * ratio)
    made = make("wan-i2v", "DPO", tmp_path, expert="high_noise", extra={"model": pipeline})
    assert made.timestep_range == [low, 1000]
    with pytest.raises(ValueError, match="with `transformer_2` as its transformer to train"):
        make("wan-i2v", "DPO", tmp_path, expert="low_noise", extra={"model": pipeline})


def test_the_guidance_that_a_transformer_is_told_is_an_option(tmp_path):
    made = make("hunyuan-t2v", "SFT", tmp_path)
    told = make("hunyuan-t2v", "SFT", tmp_path, embedded_guidance=1.0)
    assert (made.family.guidance, made.sampler.call_kwargs["guidance_scale"]) == (6.0, 6.0)
    assert (told.family.guidance, told.sampler.call_kwargs["guidance_scale"]) == (1.0, 1.0)
    errors = [each.evaluate(rows_for("hunyuan-t2v", "SFT"))["eval_loss"] for each in (made, told)]
    assert errors[0] != errors[1]
    with pytest.raises(ValueError, match="for transformers that are told one; 'wan' is not"):
        make("wan-t2v", "SFT", tmp_path, embedded_guidance=1.0)


# ---- What does not fit is refused before anything is encoded or trained ---------------------------------------------


def test_a_bare_transformer_is_trained_where_it_says_enough(tmp_path):
    for family in ("wan-t2v", "wan-i2v"):
        make(family, "DPO", tmp_path, max_steps=1, extra={"model": tiny_pipeline(family).transformer}).train()
    for family in ("cogvideox-t2v", "cogvideox-i2v"):
        with pytest.raises(ValueError, match="Pass the pipeline instead of the bare transformer"):
            make(family, "DPO", tmp_path, extra={"model": tiny_pipeline(family).transformer})


def test_a_cogvideox_pipeline_without_encoders_is_enough_for_encoded_rows(tmp_path):
    pipeline = tiny_cogvideox_pipeline(text_encoder=None, tokenizer=None, vae=None)
    made = make("cogvideox-t2v", "DPO", tmp_path, max_steps=1, extra={"model": pipeline})
    made.train()
    assert made.max_sequence_length == MAX_SEQUENCE_LENGTH


@pytest.mark.parametrize(
    ("rows_of", "model", "message"),
    [
        ("wan-t2v", "wan-i2v", r"lack \['first_frame_latents', 'image_embeds'\]"),
        ("cogvideox-t2v", "cogvideox-i2v", r"lack \['first_frame_latents'\]"),
        ("wan-t2v", "cogvideox-t2v", "odd number of frames"),
    ],
)
def test_rows_encoded_for_another_model_are_refused(rows_of, model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(model, "DPO", tmp_path, extra={"train_dataset": rows_for(rows_of, "DPO")})


def test_rows_with_a_first_frame_train_a_text_to_video_model_too(tmp_path):
    for family in ("wan", "cogvideox"):
        make(f"{family}-t2v", "DPO", tmp_path, extra={"train_dataset": rows_for(f"{family}-i2v", "DPO")})


@pytest.mark.parametrize(("family", "length"), [("cogvideox-t2v", 16), ("wan-i2v", 512)])
def test_some_models_have_one_prompt_length(family, length, tmp_path):
    with pytest.raises(
        ValueError, match=rf"prompts of {length} tokens, padding included, got `max_sequence_length=8`"
    ):
        make(family, "DPO", tmp_path, max_sequence_length=8)
    assert make(family, "DPO", tmp_path).max_sequence_length == length


def test_a_pipeline_that_uses_its_transformer_otherwise_is_refused(tmp_path):
    """A text-to-video transformer of Wan 2.1 among the parts of image to video, which gives it other inputs."""
    pipeline = tiny_wan_i2v_pipeline(image_encoder=False)
    pipeline.register_modules(transformer=tiny_transformer())
    with pytest.raises(ValueError, match="trained for WanPipeline, got it in a WanImageToVideoPipeline"):
        make("wan-t2v", "DPO", tmp_path, extra={"model": pipeline})


def test_images_to_log_are_for_image_to_video(tmp_path):
    images = [Image.fromarray(tiny_video(0)[0])]
    with pytest.raises(ValueError, match="`images` must have one entry per prompt"):
        LogVideosCallback(PROMPTS[:2], images=images)
    callback = LogVideosCallback(PROMPTS[:1], images=images, call_kwargs={"num_inference_steps": 1})
    with pytest.raises(ValueError, match="a WanPipeline takes none"):
        make("wan-t2v", "DPO", tmp_path, extra={"callbacks": [callback]})
    made = make("wan-i2v", "DPO", tmp_path, extra={"callbacks": [callback]})
    given = callback._generate(made.sampler)[0]
    callback.images = [Image.fromarray(tiny_video(1)[0])]
    assert (given != callback._generate(made.sampler)[0]).any()
