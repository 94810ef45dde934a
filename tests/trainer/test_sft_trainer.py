"""The loss of `VideoSFTTrainer` against the same computation written out by hand, and the rows it takes."""

import re

import datasets
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.support.paths import DOCS
from tests.support.tiny import (
    tiny_encoded_group,
    tiny_encoded_video,
    tiny_group_dataset,
    tiny_transformer,
    tiny_wan_pipeline,
)
from tests.support.trainer.runs import (
    assert_equal_weights,
    double,
    first_batch,
    frozen_weights,
    losses,
    trained_weights,
)
from tests.trainer.test_group_dpo_trainer import error_by_hand, generator_of
from video_trl import VideoSFTConfig, VideoSFTTrainer


def config(directory, **changes) -> VideoSFTConfig:
    defaults = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return VideoSFTConfig(**(defaults | changes))


def test_the_loss_equals_the_computation_by_hand(tmp_path):
    rows = tiny_encoded_video(2)
    made = VideoSFTTrainer(double(tiny_wan_pipeline()), config(tmp_path), rows)
    loss = made.compute_loss(made.model, first_batch(made, 0, 1))
    expected = []
    for index, row in enumerate(rows):
        generator = generator_of(42, 0, index)
        sigma = torch.rand((), generator=generator, dtype=torch.float64).float().item()
        torch.randint(1, (), generator=generator)
        noise = torch.randn(4, 2, 4, 4, generator=generator)
        expected.append(error_by_hand(tiny_transformer().double(), row["latents"], noise, sigma, row["prompt_embeds"]))
    # Float32 noise levels, noise and latents, mixed by other operations: four roundings of each squared difference.
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=8 * 2.0**-24)


@pytest.mark.parametrize("use_peft", [True, False])
def test_training_lowers_the_loss_and_evaluation_sees_it(tmp_path, use_peft):
    args = config(tmp_path, max_steps=60, use_peft=use_peft, learning_rate=1e-2 if use_peft else 3e-3)
    made = VideoSFTTrainer(tiny_wan_pipeline(), args, tiny_encoded_video(1), tiny_encoded_video(1))
    base, before = frozen_weights(made), made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < before
    assert len(losses(made)) == 60
    if use_peft:
        assert_equal_weights(frozen_weights(made), base)
    made.save_model()
    assert (tmp_path / ("README.md" if use_peft else "transformer")).exists()


def test_all_weights_are_saved_loaded_and_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "use_peft": False, "learning_rate": 1e-3}
    straight = VideoSFTTrainer(tiny_wan_pipeline(), config(tmp_path, **saving), tiny_encoded_video(4))
    assert straight.reference is None
    straight.train()
    resumed = VideoSFTTrainer(tiny_wan_pipeline(), config(tmp_path / "resumed", **saving), tiny_encoded_video(4))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "checkpoint-4", subfolder="transformer")
    assert_equal_weights(loaded.state_dict(), straight.model.state_dict())
    again = VideoSFTTrainer(
        loaded, config(tmp_path / "again", use_peft=False, max_sequence_length=16), tiny_encoded_video(4)
    )
    rows = tiny_encoded_video(2)
    assert again.evaluate(rows)["eval_loss"] == straight.evaluate(rows)["eval_loss"]


def test_group_rows_train_on_their_chosen_videos(tmp_path):
    """The control of a preference run takes the same dataset: raw, encoded, and as an Arrow table."""
    group = tiny_encoded_group(4)
    arrow = datasets.Dataset.from_list(
        [{name: value.tolist() for name, value in row.items() if name != "prompt"} for row in group]
    )
    runs = []
    for rows in (tiny_encoded_video(4), group, arrow):
        made = VideoSFTTrainer(tiny_wan_pipeline(), config(tmp_path), rows)
        made.train()
        runs.append(trained_weights(made))
    # `tiny_encoded_video` draws other numbers than the chosen side of groups with three rejected videos.
    assert_equal_weights(runs[1], runs[2])
    assert any(not torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())
    raw = VideoSFTTrainer(
        tiny_wan_pipeline(), config(tmp_path, cache_dir=str(tmp_path / "cache")), tiny_group_dataset(2, 2)
    )
    raw.train()
    assert len(raw.train_dataset) == 2 and "rejected_latents" not in raw.train_dataset[0]


def test_other_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="A video dataset needs the columns"):
        VideoSFTTrainer(tiny_wan_pipeline(), config(tmp_path), [{"prompt": "a ball", "clip": "a.mp4"}])


def test_the_quick_start_of_the_page_runs(tmp_path, monkeypatch):
    page = (DOCS / "trainers" / "sft_trainer.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1).replace("0_032", "0_002")
    block = block.replace("max_steps=100", f'max_steps=1, use_cpu=True, disable_tqdm=True, cache_dir="{tmp_path}"')
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "quick start", "exec"), {})
    assert (tmp_path / "sandbox-sft" / "pytorch_lora_weights.safetensors").is_file()
    default = f"`learning_rate={VideoSFTConfig(output_dir=str(tmp_path), use_cpu=True).learning_rate:g}`"
    assert default.replace("0.0001", "1e-4") in page
