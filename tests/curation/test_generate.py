import inspect
import json

import numpy as np
import pytest
from PIL import Image

from tests.support.cells import CELLS
from tests.support.tiny import (
    MAX_SEQUENCE_LENGTH,
    TINY_FAMILIES,
    tiny_pipeline,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
    tiny_wan_ti2v_pipeline,
)
from video_trl.curation.engine.manifest import Shard, kept_rows
from video_trl.curation.generate import GENERATED, BatchGenerator, VideoModel, check_model, job_table, run_jobs
from video_trl.data import probe_video, read_video
from video_trl.data.buckets import AspectBucket
from video_trl.models import GenerationRules, family_of, generation_rules, pipeline_index


CALL = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
FORMAT = {"fps": 8.0, "num_frames": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two text-to-video pipelines and one that wants a first frame, as folders in diffusers layout."""
    root = tmp_path_factory.mktemp("models")
    tiny_wan_pipeline(seed=0).save_pretrained(root / "first")
    tiny_wan_pipeline(seed=1).save_pretrained(root / "second")
    tiny_wan_i2v_pipeline().save_pretrained(root / "image")
    return root


def model_of(path, **options):
    return VideoModel(str(path), **({"fps": 8.0, "dtype": "float32", "call_kwargs": CALL} | options))


def clips_of(count, bucket="32x32", image=None):
    return {
        "source_id": [f"clip{row}.mp4" for row in range(count)],
        "content": [f"{row:032d}" for row in range(count)],
        "prompt": ["a red ball falls to the floor"] * count,
        "reference_image": [image] * count,
        "bucket": [bucket] * count,
    }


def made(jobs, root):
    return [read_video(root / path) for path in jobs["rejected"].to_pylist()]


def test_every_clip_and_seed_is_made_once_in_the_format_of_the_pairs(models, tmp_path):
    model = model_of(models / "first")
    jobs = run_jobs(job_table(clips_of(2, "48x32"), model, [0, 1], FORMAT), model, tmp_path, **FORMAT)
    assert set(GENERATED) <= set(jobs.column_names) and len(set(jobs["rejected"].to_pylist())) == 4
    for path in jobs["rejected"].to_pylist():
        info = probe_video(tmp_path / path)
        assert (info.num_frames, info.fps, info.height, info.width) == (5, 8.0, 48, 32)
    assert len(set(jobs["seed"].to_pylist())) == 4  # neither clips nor seeds share their noise
    videos = made(jobs, tmp_path)
    assert not any(np.array_equal(videos[0], other) for other in videos[1:])
    assert json.loads(jobs["generation"].to_pylist()[0])["call_kwargs"] == CALL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "generated").rglob("*.mp4")}
    again = run_jobs(job_table(clips_of(2, "48x32"), model, [0, 1], FORMAT), model, tmp_path, **FORMAT)
    assert again.equals(jobs)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "generated").rglob("*.mp4")}


def test_the_recorded_seed_makes_the_video_again(models, tmp_path):
    model = model_of(models / "first")
    first = run_jobs(job_table(clips_of(2), model, [7], FORMAT), model, tmp_path / "a", **FORMAT)
    second = run_jobs(job_table(clips_of(2), model, [7], FORMAT), model, tmp_path / "b", **FORMAT)
    files = [[(tmp_path / run / path).read_bytes() for path in first["rejected"].to_pylist()] for run in "ab"]
    assert first["job"].equals(second["job"]) and files[0] == files[1]


def test_a_file_that_was_finished_before_a_kill_is_taken_as_it_is(models, tmp_path):
    """The process died between the file's rename and the commit of its row: the model is not even loaded."""
    model = model_of(models / "first")
    table = job_table(clips_of(1), model, [0], FORMAT)
    done = run_jobs(table, model, tmp_path, **FORMAT)
    for part in (tmp_path / "stages").rglob("part-*"):
        part.unlink()
    generator = BatchGenerator(model, tmp_path, **FORMAT)
    assert generator(table.to_pydict())["rejected"] == done["rejected"].to_pylist()
    assert generator.pipeline is None


@pytest.mark.parametrize("change", ["prompt", "bucket", "seed", "model", "steps", "length"])
def test_whatever_decides_the_pixels_names_the_job(models, change):
    model, clips, seeds, settings = model_of(models / "first"), clips_of(1), [0], dict(FORMAT)
    job = job_table(clips, model, seeds, settings)["job"].to_pylist()
    match change:
        case "prompt":
            clips["prompt"] = ["a blue ball falls"]
        case "bucket":
            clips["bucket"] = ["32x48"]
        case "seed":
            seeds = [1]
        case "model":
            model = model_of(models / "second")
        case "steps":
            model = model_of(models / "first", call_kwargs=CALL | {"num_inference_steps": 2})
        case "length":
            settings["num_frames"] = 9
    assert job_table(clips, model, seeds, settings)["job"].to_pylist() != job


def test_models_have_folders_of_their_own(models):
    slugs = {model_of(path).slug for path in (models / "first", models / "second")}
    slugs |= {VideoModel("a/b").slug, VideoModel("a-b").slug, VideoModel("a/b", revision="x").slug}
    assert len(slugs) == 5 and not any("/" in slug for slug in slugs)


def test_processes_share_the_jobs(models, tmp_path):
    model = model_of(models / "first")
    table = job_table(clips_of(3), model, [0], FORMAT)
    own = [f"{job}.mp4" for job in table["job"].to_pylist()[1::2]]
    run_jobs(table.slice(1, 1), model, tmp_path, **FORMAT)  # what the second of two processes would do
    assert sorted(path.name for path in (tmp_path / "generated").rglob("*.mp4")) == own
    whole = run_jobs(table, model, tmp_path, **FORMAT, shard=Shard(0, 2))
    assert len(list((tmp_path / "generated").rglob("*.mp4"))) == 3 == len(kept_rows(whole))


def test_image_to_video_starts_from_the_first_frame(models, tmp_path):
    """Two first frames, one prompt and one noise: another video. Without a frame, the way out is named."""
    model, jobs = model_of(models / "image"), []
    for index, level in enumerate((40, 210)):
        Image.fromarray(np.full((32, 32, 3), level, dtype=np.uint8)).save(tmp_path / f"{index}.png")
        clips = clips_of(1, image=f"{index}.png") | {"prompt": [f"a red ball falls {' ' * index}"]}
        jobs.append(run_jobs(job_table(clips, model, [0], FORMAT), model, tmp_path, **FORMAT))
    assert jobs[0]["seed"].equals(jobs[1]["seed"])
    assert not np.array_equal(made(jobs[0], tmp_path)[0], made(jobs[1], tmp_path)[0])
    with pytest.raises(ValueError, match="makes videos from a first frame, and a row has no `reference_image`"):
        run_jobs(job_table(clips_of(1), model, [0], FORMAT), model, tmp_path, **FORMAT)


def test_a_video_that_is_not_finite_drops_its_job(models, tmp_path):
    model = model_of(models / "first")
    table = job_table(clips_of(2), model, [0], FORMAT)
    generator = BatchGenerator(model, tmp_path, **FORMAT)
    generator(table.slice(0, 1).to_pydict())
    for parameter in generator.pipeline.vae.parameters():
        parameter.data.fill_(float("nan"))
    added = generator(table.to_pydict())
    assert added["dropped_by"] == [None, "not_finite"] and added["rejected"][1] is None
    assert len(list((tmp_path / "generated").rglob("*.mp4"))) == 1


def test_a_model_whose_videos_are_too_short_is_refused_before_and_after(models, tmp_path):
    model = model_of(models / "first", fps=16.0)
    message = r"makes 5 frames at 16 fps, 0\.31 s; pairs of 5 frames at 8 fps need 0\.50 s.*Ask it for more frames"
    with pytest.raises(ValueError, match=message):
        check_model(model, 5, 8.0)
    with pytest.raises(ValueError, match=message):
        run_jobs(job_table(clips_of(1), model, [0], FORMAT), model, tmp_path, **FORMAT)
    assert not list(tmp_path.rglob("*.mp4"))


def test_image_to_video_in_batches_makes_what_single_calls_make(models, tmp_path):
    """The pipeline takes no list of images: each video has a call of its own."""
    clips = clips_of(2) | {"reference_image": ["0.png", "1.png"]}
    runs = []
    for batch_size in (1, 2):
        root = tmp_path / str(batch_size)
        root.mkdir()
        for index, level in enumerate((40, 210)):
            Image.fromarray(np.full((32, 32, 3), level, dtype=np.uint8)).save(root / f"{index}.png")
        model = model_of(models / "image", batch_size=batch_size)
        jobs = run_jobs(job_table(clips, model, [0], FORMAT), model, root, **FORMAT)
        runs.append([(root / path).read_bytes() for path in jobs["rejected"].to_pylist()])
    assert runs[0] == runs[1] and len(set(runs[0])) == 2


@pytest.mark.parametrize("name", CELLS["GT-Pair"])
def test_every_family_makes_losers(name, tmp_path):
    """Two videos in a batch, each of its own prompt, noise and first frame, of the size and length asked for."""
    tiny, pipeline = TINY_FAMILIES[name], tiny_pipeline(name)
    pipeline.save_pretrained(tmp_path / "model")
    for index, level in enumerate((40, 210)):
        picture = np.full((tiny.side, tiny.side, 3), level, dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    clips = clips_of(2, f"{tiny.side}x{tiny.side}") | {"prompt": ["a red ball falls", "a blue ball rolls"]}
    clips["reference_image"] = ["0.png", "1.png"]
    length = family_of(pipeline).prompt_length(pipeline.transformer) or MAX_SEQUENCE_LENGTH
    call = {"num_frames": tiny.frames, "num_inference_steps": 1, **tiny.call}
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        call["max_sequence_length"] = length
    model = VideoModel(str(tmp_path / "model"), dtype="float32", call_kwargs=call, batch_size=2)
    rules = generation_rules(pipeline_index(pipeline), pipeline.transformer.config)
    clock = {"fps": rules.fps, "num_frames": tiny.frames}
    jobs = run_jobs(job_table(clips, model, [0], clock), model, tmp_path, **clock)
    videos = made(jobs, tmp_path)
    assert [video.shape for video in videos] == [(tiny.frames, tiny.side, tiny.side, 3)] * 2
    assert (videos[0] != videos[1]).any()


def test_another_size_than_the_one_asked_for_is_refused_not_scaled(tmp_path):
    """Wan 2.2's 5B rounds 48x80 to multiples of 32, with a line in the log."""
    tiny_wan_ti2v_pipeline().save_pretrained(tmp_path / "5b")
    model = model_of(tmp_path / "5b")
    with pytest.raises(ValueError, match=r"makes videos whose sides are multiples of 32.*\['48x80'\]"):
        check_model(model, 5, 8.0, [AspectBucket(64, 96), AspectBucket(48, 80)])
    with pytest.raises(ValueError, match=r"was asked for videos of 48x80 \(height x width\) and made 32x64"):
        run_jobs(job_table(clips_of(1, "48x80"), model, [0], FORMAT), model, tmp_path, **FORMAT)
    assert not list(tmp_path.rglob("*.mp4"))
    sized = model_of(tmp_path / "5b", call_kwargs=CALL | {"height": 32, "width": 64})  # scaled because one says so
    check_model(sized, 5, 8.0, [AspectBucket(48, 80)])
    jobs = run_jobs(job_table(clips_of(1, "48x80"), sized, [0], FORMAT), sized, tmp_path, **FORMAT)
    assert made(jobs, tmp_path)[0].shape == (5, 48, 80, 3)


@pytest.mark.parametrize(
    ("index", "config", "expected"),
    [
        ({"_class_name": "WanPipeline"}, {}, GenerationRules(16.0, 16)),
        ({"_class_name": "WanImageToVideoPipeline"}, {}, GenerationRules(16.0, 16, one_video_a_call=True)),
        ({"_class_name": "WanPipeline", "expand_timesteps": True}, {}, GenerationRules(24.0, 32)),
        ({"_class_name": "CogVideoXPipeline"}, {"patch_size_t": None}, GenerationRules(8.0, 16)),
        ({"_class_name": "CogVideoXImageToVideoPipeline"}, {"patch_size_t": 2}, GenerationRules(16.0, 16)),
        ({"_class_name": "HunyuanVideoImageToVideoPipeline"}, {}, GenerationRules(24.0, 16, True, 6.0)),
        (
            {"_class_name": "HunyuanVideoImageToVideoPipeline"},
            {"guidance_embeds": False, "image_condition_type": "token_replace"},
            GenerationRules(24.0, 16, True),
        ),
        (
            {"_class_name": "HunyuanVideoImageToVideoPipeline"},
            {"guidance_embeds": False, "image_condition_type": "latent_concat"},
            GenerationRules(24.0, 16, True, lost_frames=4),
        ),
        ({"_class_name": "MochiPipeline"}, {}, None),
    ],
)
def test_families_know_the_rate_and_the_sizes_of_their_videos(index, config, expected):
    assert generation_rules(index, config) == expected


def test_a_model_that_is_told_a_guidance_is_told_its_own(tmp_path):
    """The default of the pipeline's call is 1."""
    pipeline = tiny_pipeline("hunyuan-i2v")
    pipeline.save_pretrained(tmp_path / "model")
    generator = BatchGenerator(model_of(tmp_path / "model", call_kwargs={}), tmp_path, **FORMAT)
    generator._load()
    assert generator.call_kwargs == {"guidance_scale": 6.0}
    config = json.loads((tmp_path / "model" / "transformer" / "config.json").read_text())
    (tmp_path / "model" / "transformer" / "config.json").write_text(
        json.dumps(config | {"image_condition_type": "latent_concat"})
    )
    with pytest.raises(ValueError, match="throws the first 4 frames of what it makes away"):
        check_model(model_of(tmp_path / "model"), 5, 8.0)


def test_the_rate_of_a_model_is_its_familys_and_never_guessed(models, tmp_path):
    """16 fps of Wan: 9 frames are 0.56 s, of which a pair of 5 frames at 8 fps takes every second one."""
    call = CALL | {"num_frames": 9}
    files = []
    for fps in (None, 16.0):
        model = model_of(models / "first", fps=fps, call_kwargs=call)
        jobs = run_jobs(job_table(clips_of(1), model, [0], FORMAT), model, tmp_path, **FORMAT)
        files.append((tmp_path / jobs["rejected"][0].as_py()).read_bytes())
    assert files[0] == files[1]
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "model_index.json").write_text(json.dumps({"_class_name": "MochiPipeline"}))
    with pytest.raises(ValueError, match=r"the frame rate of its videos is not known here.*Set `fps` in its options"):
        check_model(VideoModel(str(tmp_path / "unknown")), 5, 8.0)


def test_a_model_that_is_not_there_is_found_before_anything_is_decoded(tmp_path):
    with pytest.raises(ValueError, match="no/such-model: expected a pipeline in diffusers layout.*Check the spelling"):
        check_model(VideoModel("no/such-model"), 81, 16.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "half precision"}, "expected a dtype of torch such as 'bfloat16', got 'half precision'"),
        ({"fps": 0.0}, "`batch_size` and `fps` must be positive, got 1 and 0.0"),
        ({"call_kwargs": {"generator": 1, "image": None}}, r"\['generator', 'image'\] in `call_kwargs` are set"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoModel("m", **options)
