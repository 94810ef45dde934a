"""Videos during training: on disk, in TensorBoard, and without a trace in the training itself."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.tiny import PROMPTS, tiny_encoded_group, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import assert_equal_weights, config, losses, trained_weights, trainer
from video_trl.data import probe_video, read_video, write_video
from video_trl.trainer import LogVideosCallback
from video_trl.trainer.publishing.sampling import generation


CALL = {"num_inference_steps": 2}  # the size is that of the training data


def callback(**changes) -> LogVideosCallback:
    return LogVideosCallback(PROMPTS[:2], **({"every_steps": 2, "fps": 8, "call_kwargs": CALL} | changes))


def test_videos_appear_on_disk_and_in_tensorboard_and_training_is_the_same(tmp_path):
    plain = trainer(config(tmp_path / "plain", max_steps=4))
    plain.train()
    args = config(tmp_path / "logged", max_steps=4, report_to="tensorboard")
    logged = trainer(args, callbacks=[callback()])
    logged.train()
    assert_equal_weights(trained_weights(logged), trained_weights(plain))
    assert losses(logged) == losses(plain)

    samples = tmp_path / "logged" / "samples"
    assert {str(path.relative_to(samples)) for path in samples.rglob("*.mp4")} == {
        f"step_{step}/{number:02d}.mp4" for step in (0, 2, 4) for number in (0, 1)
    }
    video = read_video(samples / "step_4" / "00.mp4")
    assert video.shape == (5, 32, 32, 3)

    (events,) = list((tmp_path / "logged").rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent), size_guidance={"images": 0})
    accumulator.Reload()
    assert "train/rewards/margins" in accumulator.Tags()["scalars"]
    images = accumulator.Images("samples/00")
    assert [image.step for image in images] == [0, 2, 4]
    gif = Image.open(io.BytesIO(images[0].encoded_image_string))
    assert gif.format == "GIF" and gif.n_frames == 5 and gif.size == (32, 32)


def test_the_videos_are_those_of_the_prompt_seed_and_current_adapter(tmp_path):
    made = trainer(config(tmp_path, max_steps=2), callbacks=[callback(seeds=[3, 5])])
    made.train()
    frames = made.pipeline(
        PROMPTS[1],
        generator=torch.Generator().manual_seed(5),
        num_frames=5,
        height=32,
        width=32,
        max_sequence_length=16,
        output_type="np",
        **CALL,
    ).frames[0]
    expected = write_video(tmp_path / "expected.mp4", (255 * frames).round().astype(np.uint8), fps=8)
    assert np.array_equal(read_video(tmp_path / "samples" / "step_2" / "01.mp4"), read_video(expected))
    assert not np.array_equal(read_video(tmp_path / "samples" / "step_0" / "01.mp4"), read_video(expected))


def test_the_frame_rate_is_that_of_the_training_videos_where_it_is_known(tmp_path):
    raw = tiny_group_dataset(1, 1)  # at 8 frames per second
    settings = {"cache_dir": str(tmp_path / "cache"), "max_steps": 1, "num_frames": 1}
    made = trainer(config(tmp_path, **settings), train_dataset=raw, callbacks=[callback(every_steps=1, fps=None)])
    made.train()
    assert probe_video(tmp_path / "samples" / "step_1" / "00.mp4").fps == 8
    made.create_model_card()
    assert "fps=8)" in (tmp_path / "README.md").read_text()
    assert trainer(config(tmp_path, fps=4, **settings), train_dataset=raw).sampler.fps == 4
    assert trainer(config(tmp_path)).sampler.fps == 16


def test_by_default_videos_are_made_at_each_evaluation(tmp_path):
    args = config(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=3)
    made = trainer(args, eval_dataset=tiny_encoded_group(1))
    made.add_callback(callback(every_steps=None))
    made.train()
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_0", "step_3", "step_4"}


def test_an_evaluation_on_several_datasets_makes_one_set(tmp_path):
    def decoded(name: str, eval_dataset) -> int:
        args = config(tmp_path / name, max_steps=2, eval_strategy="steps", eval_steps=2)
        made = trainer(args, eval_dataset=eval_dataset, callbacks=[callback(every_steps=None)])
        calls = []
        made.pipeline.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
        made.train()
        return len(calls)

    one = tiny_encoded_group(1)
    assert decoded("several", {"first": one, "second": one}) == decoded("one", one) > 0


def test_generation_leaves_no_trace():
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    with pytest.raises(RuntimeError), generation(pipeline, torch.device("cpu")):
        assert not pipeline.transformer.training
        random.random(), np.random.random(), torch.rand(1)
        raise RuntimeError
    assert pipeline.transformer.training and not pipeline.vae.training
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "a ball"}, "must be a list"),
        ({"prompts": ["a ball"], "seeds": [1, 2]}, r"one entry per prompt \(1\), got 2"),
        ({"prompts": ["a ball"], "every_steps": 0}, "at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogVideosCallback(**arguments)


def test_an_evaluator_measures_the_pipeline_and_selects_the_best_checkpoint(tmp_path):
    calls = []

    def evaluator(pipeline, *, output_dir, step):
        torch.rand(3), np.random.random(), random.random()
        calls.append((step, output_dir, pipeline.transformer.training))
        return {"judge/pc": {2: 0.9, 4: 0.5}.get(step, 0.0)}

    plain = trainer(config(tmp_path / "plain", max_steps=4))
    plain.train()
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "judge/pc", "greater_is_better": True}
    args = config(tmp_path / "run", max_steps=4, **saving, **best)
    made = trainer(args, eval_dataset=tiny_encoded_group(1), evaluator=evaluator)
    made.train()
    assert calls == [(2, str(tmp_path / "run"), False), (4, str(tmp_path / "run"), False)]
    assert losses(made) == losses(plain)
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert [entry["eval_judge/pc"] for entry in made.state.log_history if "eval_judge/pc" in entry] == [0.9, 0.5]
