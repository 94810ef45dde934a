"""`examples/curate_phyaug.py` as a person runs it."""

import json

import pytest

from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script
from video_trl.curation import load_groups


SCRIPT = EXAMPLES / "curate_phyaug.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def test_the_demonstration_says_how_well_it_did(script, tmp_path, capsys):
    options = {"dtype": "float32", "batch_size": 16, "call_kwargs": {"num_inference_steps": 2}}
    sizes = ["--pool_clips", "40", "--representatives", "1", "--budget", "5", "--seeds", "0"]
    run = ["--config", str(script.SANDBOX_CONFIG), "--output_dir", str(tmp_path), *sizes]
    script.main([*run, "--model_options", json.dumps(options)])
    printed = capsys.readouterr().out
    for text in ("precision ", "recall  ", "categories ", "proportion of category", "40 clips in = ", "physics_poor"):
        assert text in printed
    groups = load_groups(tmp_path)
    assert 1 <= len(groups) <= 5 and f"; {len(groups)} groups" in printed


def test_a_model_without_clips_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="need --sources"):
        script.main(["--actions", "sandbox", "--annotator", "sandbox", "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
