"""The whole of GT-Pair on real files with a tiny real pipeline: what comes out, and what can't stop it halfway."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.support import forks
from tests.support.curation.clips import SMALL, moving_video, write_clip
from tests.support.paths import DOCS, EXAMPLES, PYTHONPATH
from tests.support.tiny import tiny_wan_i2v_pipeline, tiny_wan_pipeline
from video_trl import VideoDPOTrainer, VideoRegDPOTrainer
from video_trl.cli import main
from video_trl.curation import GTPairConfig, run_gt_pair
from video_trl.data import check_columns, probe_video, read_video
from video_trl.sandbox.data.labelled_clips import make_footage


CALL = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
OPTIONS = SMALL | {"short_edge": 32, "num_frames": 9, "fps": 4.0, "seeds": [0, 1], "batch_size": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_wan_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Four clips to keep, three to drop."""
    root = tmp_path_factory.mktemp("footage")
    for seed in range(3):
        write_clip(root / f"good{seed}.mp4", seed=seed, prompt=f"a red ball falls {seed}")
    write_clip(root / "wide.mp4", moving_video(3, height=64, width=112))
    write_clip(root / "still.mp4", np.repeat(moving_video()[:1], 32, axis=0))
    (root / "zero.mp4").touch()
    (root / "again.mp4").write_bytes((root / "good0.mp4").read_bytes())
    return root


def config_of(models, footage, output_dir, **options):
    """Clips of 2 s, pairs of 9 frames at 4 fps; a tiny model makes 5 frames at 2 fps, which are 2.5 s."""
    models = [models] if isinstance(models, str) else models
    return GTPairConfig(
        sources=[str(footage)],
        output_dir=str(output_dir),
        models=models,
        model_options={name: {"fps": 2.0, "dtype": "float32", "call_kwargs": CALL} for name in models},
        **(OPTIONS | options),
    )


@pytest.fixture(scope="module")
def done(model, footage, tmp_path_factory):
    """The run that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole") / "run"
    return root, run_gt_pair(config_of(model, footage, root))


def contents(root):
    """Every video and picture of a run by name."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.suffix in (".mp4", ".png")
    }


def plain(result, root):
    """Pairs without the folder that they lie in."""
    return json.loads(json.dumps(result.pairs.to_list()).replace(str(root), ""))


# ---- what comes out ----------------------------------------------------------------------------------------------


def test_every_clip_is_accounted_for_and_the_funnel_falls(done):
    _, result = done
    assert result.summary == "7 clips in = 4 kept + 1 empty + 1 repeated + 1 static; 4 group rows"
    assert result.funnel == {
        "listed": 7, "acquired": 5, "filtered": 4, "normalised": 4, "generated": 4, "pairs": 4,
    }  # fmt: skip


def test_pairs_feed_the_trainers_and_have_one_format(done):
    root, result = done
    check_columns(result.pairs, "group")
    for row in result.pairs:
        formats = {probe_video(video) for video in (row["chosen"], *row["rejected"])}
        assert len(formats) == 1 and len(row["rejected"]) == 2 == len(set(row["seeds"]))
        first = read_video(row["chosen"])[0]
        assert np.array_equal(np.array(Image.open(row["reference_image"])), first)
        assert {"route", "source", "content", "config"} <= set(json.loads(row["provenance"]))
        assert [entry["seed"] for entry in row["rejected_generation"]] == row["seeds"]
    assert {tuple(read_video(row["chosen"]).shape[:3]) for row in result.pairs} == {(9, 32, 32), (9, 32, 64)}


def test_the_saved_dataset_is_the_returned_one(done):
    root, result = done
    loaded = datasets.load_dataset(str(root / "pairs"), split="train")
    assert loaded.features == result.pairs.features and loaded.to_list() == result.pairs.to_list()
    assert pq.read_table(root / "manifest.parquet").equals(result.manifest)
    assert len(pq.read_table(root / "generations.parquet")) == 8


def test_the_manifest_has_every_measure_also_of_dropped_clips(done):
    rows = {Path(row["path"]).stem: row for row in done[1].manifest.to_pylist()}
    assert rows["still"]["dropped_by"] == "static" and rows["still"]["motion"] == rows["still"]["value"] < 2
    assert rows["still"]["text"] is not None and rows["still"]["video"] is None
    assert rows["good2"]["motion"] > 2 and rows["good2"]["bucket"] == "32x32"
    assert rows["again"]["detail"].endswith("good0.mp4")  # the copy without a caption


def test_a_run_that_is_done_computes_nothing(done, model, footage, monkeypatch):
    root, result = done
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*") if path.name not in (
        "manifest.parquet", "generations.parquet", "train.parquet",
    )}  # fmt: skip
    monkeypatch.setattr(
        "video_trl.curation.clips.measures.measure_clip", None
    )  # to call any of these would be an error
    monkeypatch.setattr("video_trl.curation.clips.normalise.normalise_video", None)
    monkeypatch.setattr("video_trl.curation.generate.DiffusionPipeline.from_pretrained", None)
    again = run_gt_pair(config_of(model, footage, root))
    assert again.summary == result.summary and plain(again, root) == plain(result, root)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_thresholds_decode_nothing_again(done, model, footage, monkeypatch):
    root, _ = done
    monkeypatch.setattr("video_trl.curation.clips.measures.measure_clip", None)
    strict = run_gt_pair(config_of(model, footage, root, min_motion=1000.0))
    assert strict.summary == "7 clips in = 0 kept + 5 static + 1 empty + 1 repeated; 0 preference rows"
    assert len(strict.pairs) == 0 and len(strict.manifest) == 7


@pytest.fixture(scope="module")
def two_models(model, footage, tmp_path_factory):
    """A text-to-video and an image-to-video model in one run."""
    second, root = tmp_path_factory.mktemp("second") / "image", tmp_path_factory.mktemp("two") / "run"
    tiny_wan_i2v_pipeline().save_pretrained(second)
    models = [model, str(second)]
    return root, models, run_gt_pair(config_of(models, footage, root, seeds=[0], row_type="preference"))


def test_a_preference_row_for_every_video_of_every_model(two_models):
    root, models, result = two_models
    check_columns(result.pairs, "preference")
    assert result.summary.endswith("8 preference rows") and result.funnel["generated"] == 4
    assert [row["generator"] for row in result.pairs] == 4 * models
    assert [row["rejected_generation"]["model"] for row in result.pairs] == 4 * models
    assert [row["seeds"] for row in result.pairs] == [[row["rejected_generation"]["seed"]] for row in result.pairs]
    assert len({Path(row["rejected"]["path"]).read_bytes() for row in result.pairs}) == 8
    assert len({row["chosen"]["path"] for row in result.pairs}) == 4


@pytest.mark.parametrize(
    ("trainer_class", "row_type"), [(VideoDPOTrainer, "group"), (VideoRegDPOTrainer, "preference")]
)
def test_the_pairs_train_as_they_are(done, two_models, tmp_path, trainer_class, row_type):
    """The dataset of a run, clips of two shapes, into one optimiser step."""
    args = trainer_class.config_class(
        output_dir=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        resolution_buckets=["32x32", "32x64"],
        num_frames=9,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
    )
    saved = datasets.load_dataset(str(two_models[0] / "pairs"), split="train")
    dataset = saved if row_type == "preference" else done[1].pairs
    trainer = trainer_class(tiny_wan_pipeline(), args, dataset)
    square, wide = (4, 3, 4, 4), (4, 3, 4, 8)
    copies = len(dataset) // 4
    assert sorted(trainer.train_dataset.shapes) == copies * (3 * [square]) + copies * [wide]
    trainer.train()
    first = trainer.state.log_history[0]
    assert first.get("loss/dpo", first["loss"]) == pytest.approx(math.log(2), rel=1e-3) and first["grad_norm"] > 0


def test_clips_without_a_caption_get_one_or_are_dropped(model, footage, tmp_path):
    write_clip(tmp_path / "clips" / "untold.mp4", seed=5, prompt=None)
    write_clip(tmp_path / "clips" / "told.mp4", seed=6, prompt="a blue ball rolls")

    class Captioner:
        name = "captioner-1"
        seen: list[str] = []

        def __call__(self, videos):
            self.seen += videos
            return ["a green ball bounces" if read_video(video).shape[0] == 9 else "" for video in videos]

    config = config_of(model, tmp_path / "clips", tmp_path / "run", seeds=[0])
    assert "1 no_prompt" in run_gt_pair(config).summary
    captioned = run_gt_pair(config, captioner=Captioner())
    assert sorted(captioned.pairs["prompt"]) == ["a blue ball rolls", "a green ball bounces"]
    assert run_gt_pair(config, captioner=Captioner()).summary == captioned.summary
    assert len(Captioner.seen) == 1 and isinstance(captioned.pairs.features["rejected"], datasets.Video)


def test_formats_that_differ_are_refused(done, model, footage, tmp_path):
    """Somebody wrote another file over a generated one: training on it would teach the format."""
    root, result = done
    victim = Path(result.pairs[0]["rejected"][1]["path"])
    whole = victim.read_bytes()
    try:
        write_clip(victim, moving_video(height=32, width=48), prompt=None)
        with pytest.raises(
            ValueError, match=r"expected the format of .*mp4, \(9, 4\.0, 32, 32\), got \(32, 16\.0, 32"
        ):
            run_gt_pair(config_of(model, footage, root))
    finally:
        victim.write_bytes(whole)


# ---- stopping and sharing ----------------------------------------------------------------------------------------


WORKER = """
import json, sys
from video_trl.curation import GTPairConfig, run_gt_pair
run_gt_pair(GTPairConfig(**json.loads(sys.argv[1])))
"""


def start(config):
    return forks.start("-c", WORKER, json.dumps(dataclasses.asdict(config)))


def wait_until(condition, worker):
    while not condition():
        assert not worker.ended(), "the worker ended before it could be killed"
        time.sleep(0.005)


MEASURING, GENERATING = ("stages/measure-*/part-*", 2), ("generated/*/*.mp4", 3)


@pytest.mark.parametrize("moments", [[GENERATING], pytest.param([MEASURING, GENERATING], marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(done, model, footage, tmp_path, moments):
    """kill -9 in the middle of generating, or of measuring and then of generating; then the run is let finish."""
    whole_root, whole = done
    root = tmp_path / "run"
    config = config_of(model, footage, root)
    finished: dict[Path, int] = {}
    for pattern, count in moments:
        worker = start(config)
        wait_until(lambda: len(list(root.glob(pattern))) >= count, worker)  # noqa: B023
        worker.kill()
        worker.wait()
        assert not (root / "manifest.parquet").exists()
        finished |= {path: path.stat().st_mtime_ns for path in root.rglob("*.mp4") if not path.parent.name[0] == "."}
    result = run_gt_pair(config)
    assert result.summary == whole.summary and plain(result, root) == plain(whole, whole_root)
    assert contents(root) == contents(whole_root)  # to the bit, and not a file more
    generated = [path for path in finished if path.parent.parent.name == "generated"]
    assert len(generated) >= 3 and all(path.stat().st_mtime_ns == finished[path] for path in generated)


@pytest.mark.slow  # test_manifest.py has two processes on one stage
def test_two_processes_of_the_example_do_together_what_one_does(done, model, footage, tmp_path):
    """As a user starts it, by a launcher and with a configuration file."""
    whole_root, whole = done
    root, settings = tmp_path / "run", tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(dataclasses.asdict(config_of(model, footage, root))))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    ran = subprocess.run(
        [*launcher, str(EXAMPLES / "curate_gt_pairs.py"), "--config", str(settings)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == whole.summary and ran.stdout.count(whole.summary) == 1
    assert contents(root) == contents(whole_root)
    assert len(pq.read_table(root / "manifest.parquet")) == 7
    for stage, rows in (("probe", 7), ("measure", 5), ("normalise", 4), ("generate", 8)):
        parts = [pq.read_table(part) for part in root.glob(f"stages/{stage}-*/part-*")]
        assert sum(map(len, parts)) == rows, f"{stage}: a row was computed twice, or not at all"
    pairs = datasets.load_dataset(str(root / "pairs"), split="train")
    assert json.loads(json.dumps(pairs.to_list()).replace(str(root), "")) == plain(whole, whole_root)


# ---- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 80}, r"must be 4k \+ 1 for the VAEs, got 80\. Use 81"),
        ({"short_edge": 700}, "`short_edge` in multiples of 16"),
        ({"min_fps": 50.0}, "0 < min_fps <= max_fps, got 50.0 and 45.0"),
        ({"max_seconds": 4.0}, "0 < min_seconds <= max_seconds"),
        ({"num_frames": 161}, "161 frames at 16 fps are longer than the longest clip"),
        ({"ratios": ["4:3"]}, r"`ratios` out of \['9:16', '3:4', '1:1', '16:9'\].*got \['4:3'\]"),
        ({"seeds": [1, 1]}, "expected different ones"),
        ({"seeds": []}, "at least one model or generator and one seed"),
        ({"models": ["a", "a"]}, "each model once"),
        ({"model_options": {"wan": {}}}, r"options only for models.*\['wan'\]"),
        ({"model_options": {"sandbox": {"step": 3}}}, "`model_options`.*'step'.*Known: revision, fps"),
        ({"row_type": "triplet"}, "`row_type` must be 'auto', 'preference' or 'group', got 'triplet'"),
    ],
)
def test_configurations_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GTPairConfig(**options)


def test_faults_of_a_run_are_found_before_anything_is_decoded(model, footage, tmp_path):
    with pytest.raises(ValueError, match="at least one source"):
        run_gt_pair(GTPairConfig(output_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="no/such-model: expected a pipeline"):
        run_gt_pair(GTPairConfig(sources=[str(footage)], output_dir=str(tmp_path / "run"), models=["no/such-model"]))
    assert not (tmp_path / "run").exists()


def test_a_run_that_keeps_no_clip_says_of_each_rule_what_it_saw(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "short.mp4", moving_video())
    argv = ["curate", "gt-pairs", "--sources", str(tmp_path / "clips"), "--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--num_frames", "5", "--fps", "8"]) == 1
    printed = capsys.readouterr().out
    assert "No clip is left." in printed and "duration: " in printed and "short.mp4, " in printed
    assert ", the limit is 4" in printed and printed.count("1 clip in = 0 kept + 1 duration") == 1


def test_the_page_names_every_option_with_its_default():
    page = (DOCS / "data" / "gt_pair.md").read_text(encoding="utf-8")
    table = [line for line in page.split("## Options\n")[1].split("\n## ")[0].splitlines() if line.startswith("| `")]
    documented = dict(re.findall(r"`([^`]+)`", line)[:2] for line in table)
    assert documented == {name: repr(value) for name, value in dataclasses.asdict(GTPairConfig()).items()}


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "data" / "gt_pair.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, {})
        expected = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert expected == capsys.readouterr().out.splitlines()[: len(expected)]


def test_defaults_are_the_papers():
    config = GTPairConfig()
    assert (config.min_fps, config.max_fps, config.min_seconds, config.max_seconds) == (16, 45, 5, 6)
    assert (config.min_edge, config.short_edge, config.fps, config.num_frames) == (512, 720, 16, 81)
    assert [str(bucket) for bucket in config.buckets()] == ["1280x720", "960x720", "720x720", "720x1280"]


# ---- the footage itself ------------------------------------------------------------------------------------------


def test_footage_is_the_same_for_the_same_seed_and_another_for_another():
    size = {"height": 32, "width": 48, "fps": 8.0, "seconds": 2.0}
    one, two, other = (make_footage("balls", seed, **size) for seed in (0, 0, 1))
    assert np.array_equal(one.video, two.video) and one.prompt == two.prompt
    assert one.video.shape == (16, 32, 48, 3) and not np.array_equal(one.video, other.video)
    assert make_footage("static", 0, **size).defect == "static" and one.defect is None


def test_footage_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="Expected one of the kinds small_ball, .*got 'cats'"):
        make_footage("cats", 0)
