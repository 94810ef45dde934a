"""Physics-IQ on small files of its layout: motion as OpenCV finds it, and scores that can be said beforehand."""

import numpy as np
import pytest
from PIL import Image

from video_trl.cli import main
from video_trl.data.video_io import write_video
from video_trl.evaluation.benchmarks.physics_iq import (
    METRICS,
    _with_masks,
    generated_videos,
    load_physics_iq,
    physics_iq,
    score_of,
)


FPS = 4
KEY = "0001_perspective-left_trimmed-ball-falls"


def _moving(speed, num_frames=5 * FPS):
    """A bright square of 24 pixels that goes right."""
    frames = np.full((num_frames, 64, 96, 3), 60, np.uint8)
    for t, frame in enumerate(frames):
        left = min(int(speed * t), 72)
        frame[16:40, left : left + 24] = (250, 220, 90)
    return frames


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    root = tmp_path_factory.mktemp("physics-iq")
    real = root / "split-videos" / "testing" / f"{FPS}FPS"
    for take, speed in (("1", 3.0), ("2", 2.5)):
        write_video(
            real / f"000{take}_testing-videos_{FPS}FPS_perspective-left_take-{take}_trimmed-ball-falls.mp4",
            _moving(speed), fps=FPS, crf=0,
        )  # fmt: skip
    (root / "switch-frames").mkdir()
    frame = root / "switch-frames" / "0001_switch-frames_anyFPS_perspective-left_trimmed-ball-falls.jpg"
    Image.fromarray(_moving(3.0)[0]).save(frame)
    (root / "descriptions.csv").write_text(
        "scenario,description,category\n"
        "0001_perspective-left_take-1_trimmed-ball-falls.mp4,A ball falls.,Solid Mechanics\n"
        "0002_perspective-left_take-2_trimmed-ball-falls.mp4,A ball falls.,Solid Mechanics\n"
    )
    return root


def _made(folder, speed):
    write_video(folder / f"{KEY}.mp4", _moving(speed), fps=FPS, crf=0)
    return generated_videos(folder)


def test_motion_is_where_opencv_finds_it():
    """Sizes and first moments of OpenCV 4.13's masks, by the functions that the benchmark's own program calls."""
    frames = np.random.default_rng(3).integers(90, 110, (6, 40, 56, 3), dtype=np.uint8)
    for t, frame in enumerate(frames):
        frame[8 + 2 * t : 18 + 2 * t, 6 * t + 4 : 6 * t + 16] = (250, 200 + t, 40 * t)
        frame[30, 50] = 255  # a speck
    masks = [mask for _, mask in _with_masks(iter(frames))]
    assert [int(mask.sum()) for mask in masks] == [0, 214, 306, 344, 409, 449]
    moments = [int(np.flatnonzero(mask).sum()) for mask in masks]
    assert moments == [0, 166365, 256719, 312650, 397692, 471448]


def test_another_take_has_100_and_what_stands_still_has_less(benchmark, tmp_path):
    other = physics_iq(_made(tmp_path / "other", 2.5), benchmark)
    assert other.score == 100.0 and other.metrics == pytest.approx(other.variance) and other.num_videos == 1
    assert all(0 < other.variance[name] < 1 for name in METRICS)
    same = physics_iq(_made(tmp_path / "same", 3.0), benchmark)
    assert same.metrics == {**dict.fromkeys(METRICS[:3], 1.0), "mse": 0.0} and same.score == 100.0
    still = physics_iq(_made(tmp_path / "still", 0.0), benchmark)
    assert still.metrics["spatial_iou"] == 0.0 and still.score < 10


def test_the_score_is_the_mean_of_proportions_less_the_error():
    variance = {"spatiotemporal_iou": 0.5, "spatial_iou": 0.8, "weighted_spatial_iou": 0.4, "mse": 0.002}
    metrics = {"spatiotemporal_iou": 0.1, "spatial_iou": 0.2, "weighted_spatial_iou": 0.1, "mse": 0.012}
    assert score_of(metrics, variance) == round(100 * ((0.2 + 0.25 + 0.25) / 3 - 0.01), 2)


def test_prompts_are_first_takes_with_their_frames(benchmark):
    (prompt,) = load_physics_iq(benchmark)
    assert (prompt.text, prompt.category) == (KEY, "Solid Mechanics") and prompt.image.endswith("falls.jpg")
    assert prompt.generation_text == "A ball falls."


def test_the_command_compares_folders(benchmark, tmp_path, capsys):
    _made(tmp_path / "dpo", 2.5)
    argv = ["eval", "--benchmark", "physics-iq", "--physics_iq", str(benchmark), "--results"]
    assert main([*argv, f"dpo={tmp_path / 'dpo'}"]) == 0
    assert "dpo" in (out := capsys.readouterr().out) and "100.00" in out
    assert main([*argv, str(tmp_path / "dpo")]) == 2 and "NAME=RUN" in capsys.readouterr().err
    assert main(["eval", "--benchmark", "physics-iq"]) == 2 and "--physics_iq is needed" in capsys.readouterr().err


def test_what_is_missing_is_named(benchmark, tmp_path):
    write_video(tmp_path / f"{KEY}.mp4", _moving(3.0, num_frames=8), fps=FPS)
    with pytest.raises(ValueError, match="expected 5 seconds, 20 frames, got 8"):
        physics_iq(generated_videos(tmp_path), benchmark)
    with pytest.raises(ValueError, match="0009"):
        physics_iq({"0009": [tmp_path / f"{KEY}.mp4"]}, benchmark)
    with pytest.raises(ValueError, match="found none"):
        generated_videos(benchmark)
    with pytest.raises(ValueError, match="expected the real videos"):
        physics_iq(generated_videos(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="table of descriptions"):
        load_physics_iq(tmp_path)
    real = tmp_path / "split-videos" / "testing" / f"{FPS}FPS" / "notes.mp4"
    real.parent.mkdir(parents=True)
    real.touch()
    with pytest.raises(ValueError, match=r"notes.mp4: expected a name such as 0001_"):
        physics_iq(generated_videos(tmp_path), tmp_path)
