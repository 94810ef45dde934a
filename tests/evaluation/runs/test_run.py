"""Runs: what is written, what is refused, and that every video is made exactly once whatever is killed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.support.evaluation.runs import make_run
from tests.support.tiny import (
    MAX_SEQUENCE_LENGTH,
    PROMPTS,
    TINY_FAMILIES,
    tiny_pipeline,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
)
from video_trl.data.video_io import read_video
from video_trl.evaluation.runs.generate import VideoGenerator, generate_run, load_generator
from video_trl.evaluation.runs.prompts import EvaluationPrompt
from video_trl.evaluation.runs.run import RUN_FILE, claimed, create_run, load_run
from video_trl.files import fingerprint, partial_path


CALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def generator():
    return VideoGenerator(tiny_wan_pipeline(), "tiny", fps=8, call_kwargs=CALL)


def _hashes(run):
    return {path.name: path.read_bytes() for path in sorted((run.folder / "videos").glob("*.mp4"))}


def test_run_describes_itself_and_resumes_without_work(tmp_path, generator):
    run = generate_run(tmp_path / "run", generator, PROMPTS[:2], seeds=(0, 3), name="tiny", batch_size=3)
    assert sorted(_hashes(run)) == ["00000-0.mp4", "00000-3.mp4", "00001-0.mp4", "00001-3.mp4"]
    run.check_videos()
    content = json.loads((run.folder / RUN_FILE).read_text())
    assert content["generation"]["call_kwargs"] == CALL and content["generation"]["seeds"] == [0, 3]
    assert content["generation"]["pipeline"] == "WanPipeline" and len(content["generation"]["revision"]) == 32
    assert content["versions"]["torch"] and content["provenance"]["model"] == "tiny"
    assert [prompt["text"] for prompt in content["prompts"]] == list(PROMPTS[:2])
    assert load_run(run.folder) == run

    stamps = {path: path.stat().st_mtime_ns for path in (run.folder / "videos").glob("*.mp4")}
    again = generate_run(tmp_path / "run", generator, PROMPTS[:2], seeds=(0, 3), name="tiny")
    assert again == run
    assert {path: path.stat().st_mtime_ns for path in (run.folder / "videos").glob("*.mp4")} == stamps


def test_shards_make_every_video_once_and_the_same_as_one_process(tmp_path, generator):
    whole = generate_run(tmp_path / "whole", generator, PROMPTS[:3], seeds=(0, 1), batch_size=2)
    for rank in (2, 0, 1):
        run = generate_run(tmp_path / "parts", generator, PROMPTS[:3], seeds=(0, 1), rank=rank, num_ranks=3)
        assert len(_hashes(run)) == 2 * (1 + (2, 0, 1).index(rank))
    for name in _hashes(whole):
        one, many = (read_video(r.folder / "videos" / name).astype(int) for r in (whole, run))
        assert np.abs(one - many).max() <= 8  # batches differ in the last bits, which the codec may round apart
    first, second = (read_video(whole.video(case)) for case in whole.cases[:2])
    assert not np.array_equal(first, second)  # another seed, another video


def test_missing_video_is_made_again_and_nothing_else(tmp_path, generator):
    run = generate_run(tmp_path, generator, PROMPTS[:2])
    before = _hashes(run)
    run.video(run.cases[1]).unlink()
    assert [case.key for case in run.missing()] == ["00001-0"]
    with pytest.raises(ValueError, match=r"1 of 2 videos are missing, the first being 00001-0.mp4 for 'a blue ball"):
        run.check_videos()
    generate_run(tmp_path, generator, PROMPTS[:2])
    assert _hashes(run) == before


def test_the_model_reads_the_longer_sentence_and_the_noise_comes_from_the_short_one(tmp_path, generator):
    plain = generate_run(tmp_path / "a", generator, [PROMPTS[0]])
    longer = generate_run(tmp_path / "b", generator, [EvaluationPrompt(PROMPTS[0], generation_text=PROMPTS[3])])
    assert plain.cases[0].noise_seed == longer.cases[0].noise_seed
    assert list(_hashes(plain).values()) != list(_hashes(longer).values())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seeds": (0, 1)}, "seeds"),
        ({"name": "other"}, "name"),
        ({"training_seed": 3}, "training_seed"),
        ({"benchmark": "videophy2"}, "benchmark"),
    ],
)
def test_another_run_in_the_directory_is_refused(tmp_path, generator, change, key):
    generate_run(tmp_path, generator, PROMPTS[:1], name="tiny")
    with pytest.raises(ValueError, match=rf"holds another run, which differs in {key}"):
        generate_run(tmp_path, generator, PROMPTS[:1], **({"name": "tiny"} | change))


def test_other_weights_are_another_run(tmp_path, generator):
    generate_run(tmp_path, generator, PROMPTS[:1])
    other = VideoGenerator(tiny_wan_pipeline(seed=1), "tiny", fps=8, call_kwargs=CALL)
    with pytest.raises(ValueError, match="which differs in revision"):
        generate_run(tmp_path, other, PROMPTS[:1])


def test_an_unfinished_run_is_not_finished_in_another_environment(tmp_path, generator):
    run = generate_run(tmp_path, generator, PROMPTS[:1])
    content = json.loads((tmp_path / RUN_FILE).read_text())
    content["versions"]["torch"] = "1.0"
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    generate_run(tmp_path, generator, PROMPTS[:1])  # complete: nothing would be mixed
    run.video(run.cases[0]).unlink()
    with pytest.raises(ValueError, match="begun with other versions.*1.0 then"):
        generate_run(tmp_path, generator, PROMPTS[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", " "]}, "must not be blank"),
        ({"prompts": ["a", "b", "a"]}, "'a'"),
        ({"seeds": []}, "Seeds must be distinct"),
        ({"seeds": [1, 1]}, "Seeds must be distinct"),
        ({"seeds": [-1]}, "at least 0"),
        ({"name": ""}, "needs a name"),
        ({"source": {"call_kwargs": {"image": object()}}}, "written as JSON"),
        ({"source": {"fps": float("nan")}}, "written as JSON"),
    ],
)
def test_bad_descriptions_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_run(tmp_path / "run", **({"name": "n", "prompts": ["a"], "seeds": [0], "source": {}} | arguments))
    assert not (tmp_path / "run" / RUN_FILE).exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all I have")
    with pytest.raises(ValueError, match="no evaluation run.*thesis.txt"):
        create_run(tmp_path, name="n", prompts=["a"], seeds=[0], source={})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_load_run_refuses_what_is_no_run_or_was_edited(tmp_path):
    with pytest.raises(ValueError, match="found no run.json"):
        load_run(tmp_path)
    create_run(tmp_path / "run", name="n", prompts=['a, "b"\nc'], seeds=[0], source={})
    assert load_run(tmp_path / "run").prompts[0].text == 'a, "b"\nc'
    text = (tmp_path / "run" / RUN_FILE).read_text()
    (tmp_path / "run" / RUN_FILE).write_text(text.replace('\\"b\\"', "x"))
    with pytest.raises(ValueError, match="edited after the run"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="not in format 1"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).write_text(text[:50])
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_run(tmp_path / "run")


def test_unreadable_videos_are_counted_and_named(tmp_path):
    run = make_run(tmp_path, "n", [(0.5, 0.5)] * 3, scored=False)
    for case in run.cases[1:]:
        path = run.video(case)
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"2 of 3 videos cannot be read.*00001-0.mp4"):
        run.check_videos()


def test_values_that_are_not_finite_are_refused_and_leave_no_video(tmp_path):
    pipeline = tiny_wan_pipeline()
    pipeline.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite for 'a red ball falls to the floor' with seed 0"):
        generate_run(tmp_path, VideoGenerator(pipeline, "broken", fps=8, call_kwargs=CALL), PROMPTS[:1])
    assert not list(tmp_path.glob("videos/*.mp4"))


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_work_on_the_same_case(tmp_path):
    """Another process holds case 1, as `claimed` does, and is killed without a chance to give it back."""
    lock = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with claimed(lock, [0, 2]):
            pass
        with pytest.raises(ValueError, match="Another process is working in"), claimed(lock, [0, 1]):
            pytest.fail("the case is held by another process")
        other.kill()
    with claimed(lock, [0, 1, 2]):
        pass


def test_kill_in_the_middle_costs_nothing_that_was_done(tmp_path, generator):
    """SIGKILL while videos are being written; afterwards only what is missing is made and no leftover stays."""
    arguments = (tmp_path, generator, PROMPTS)
    # Forked: the child need not import everything again, and dies without any clean-up of Python's.
    process = multiprocessing.get_context("fork").Process(
        target=generate_run, args=arguments, kwargs={"seeds": range(50)}
    )
    process.start()
    videos, deadline = tmp_path / "videos", time.monotonic() + 120
    while len(list(videos.glob("*.mp4"))) < 3 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    partial_path(videos / "00003-49.mp4").touch()  # what the writer of a video leaves when it is killed inside
    run = load_run(tmp_path)
    done = {path.name: path.stat().st_mtime_ns for path in videos.glob("*.mp4")}
    assert 3 <= len(done) < 196
    for case in run.missing()[:-4]:  # all but four are put there by hand, to save the time
        os.link(videos / "00000-0.mp4", run.video(case))
    generate_run(*arguments, seeds=range(50))
    assert not run.missing() and len(list(videos.glob("*.mp4"))) == 200
    assert {name: (videos / name).stat().st_mtime_ns for name in done} == done
    assert [path.name for path in videos.glob(".*")] == [".lock"]
    run.check_videos()


def test_hash_of_a_pipeline_sees_weights_and_settings_and_nothing_else(generator):
    first = generator.describe()["revision"]
    other = tiny_wan_pipeline()
    other.scheduler._internal_dict["_use_default_values"].reverse()  # its order changes from process to process
    assert VideoGenerator(other, "x", fps=8).describe()["revision"] == first
    other.transformer.proj_out.bias.data[0] += 1e-3
    assert VideoGenerator(other, "x", fps=8).describe()["revision"] != first


def test_load_generator_reads_a_folder_and_records_its_content(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "model")
    first = load_generator(str(tmp_path / "model"), fps=8, call_kwargs=CALL)
    assert first.revision == fingerprint(tmp_path / "model") and first.describe()["dtype"] == "float32"
    tiny_wan_pipeline(seed=1).save_pretrained(tmp_path / "model")
    assert load_generator(str(tmp_path / "model"), fps=8).revision != first.revision


@pytest.mark.parametrize(
    ("name", "fps", "call"),
    [
        ("ltx-t2v", 25.0, {"frame_rate": 25.0}),  # positions in time are in seconds
        ("hunyuan-i2v", 24.0, {"guidance_scale": 6.0}),  # of the model, not of the call
        ("wan-5b-t2v", 24.0, {}),
    ],
)
def test_a_generator_is_called_as_its_family_wants(name, fps, call, tmp_path):
    tiny_pipeline(name).save_pretrained(tmp_path / "model")
    made = load_generator(str(tmp_path / "model"), call_kwargs={"num_frames": 9})
    assert made.fps == fps and made.call_kwargs == {**call, "num_frames": 9}
    if "frame_rate" in call:
        assert load_generator(str(tmp_path / "model"), fps=12).call_kwargs["frame_rate"] == 12


@pytest.mark.parametrize("name", ["cogvideox-i2v", "ltx-i2v"])
def test_a_vae_of_another_dtype_is_given_its_own(name, tmp_path):
    """Pipelines that hand it what the others have; on an accelerator the others are bfloat16 by default."""
    tiny = TINY_FAMILIES[name]
    tiny_pipeline(name).save_pretrained(tmp_path / "model")
    call = {"num_frames": tiny.frames, "height": tiny.side, "width": tiny.side, "num_inference_steps": 1}
    call["max_sequence_length"] = MAX_SEQUENCE_LENGTH
    generator = load_generator(str(tmp_path / "model"), fps=8, dtype="bfloat16", call_kwargs=call)
    prompt = EvaluationPrompt(text=PROMPTS[0], image=str(tmp_path / "first.png"))
    Image.fromarray(np.full((tiny.side, tiny.side, 3), 40, dtype=np.uint8)).save(prompt.image)
    run = generate_run(tmp_path / "run", generator, [prompt])
    assert len(list((run.folder / "videos").rglob("*.mp4"))) == 1
    assert not {"encode", "decode"} & set(vars(generator.pipeline.vae))


def test_first_frames_that_are_missing_or_not_taken_are_told_before_a_run_is_begun(tmp_path, generator):
    of_images = VideoGenerator(tiny_wan_i2v_pipeline(), "tiny", fps=8, call_kwargs=CALL)
    for made, prompts, words in (
        (of_images, PROMPTS, "WanImageToVideoPipeline makes videos of first frames, and .* have none"),
        (
            generator,
            [EvaluationPrompt("a", image="a.png")],
            "WanPipeline makes videos of text alone, and 1 of 1 prompts",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            generate_run(tmp_path / "run", made, prompts)
    assert not (tmp_path / "run").exists()


def test_a_generator_of_no_family_needs_its_rate(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    with pytest.raises(ValueError, match="`fps` is needed for .*, a MochiPipeline"):
        load_generator(str(tmp_path))


def test_a_pipeline_that_fails_for_several_videos_makes_one_at_a_time(tmp_path):
    call = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1}
    generator = VideoGenerator(tiny_pipeline("hunyuan1.5-t2v"), "tiny", fps=24, call_kwargs=call)
    run = generate_run(tmp_path, generator, PROMPTS[:2], batch_size=2)
    assert len(list((run.folder / "videos").rglob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "no-such/model", "fps": 8}, "No folder 'no-such/model'"),
        ({"adapter": "no-such/adapter"}, "No folder 'no-such/adapter'"),
        ({"adapter": "."}, "No adapter in '.'"),
        ({"dtype": "bfloat16"}, "one revision and one dtype"),
        ({"model": ".", "fps": 8}, "found no model_index.json"),
    ],
)
def test_load_generator_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_generator(**arguments)
