from tests.support.paths import DOCS
from tests.support.tiny import tiny_video, tiny_wan_pipeline
from video_trl.data import write_video
from video_trl.data.buckets import AspectBucket


PAGE = DOCS / "data" / "dataset_formats.md"


def test_examples_of_the_page_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("real", "seed0", "seed1", "seed2")):
        write_video(tmp_path / "videos" / f"{name}.mp4", tiny_video(seed), fps=8)
    namespace = {"pipeline": tiny_wan_pipeline()}
    blocks = [part.split("```")[0] for part in PAGE.read_text().split("```python\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        exec(block, namespace)
    assert namespace["args"].buckets()[-1] == AspectBucket(720, 1280)
    assert namespace["encoded"][0]["rejected_latents"].shape == (3, 4, 2, 4, 4)
