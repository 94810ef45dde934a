"""What `import video_trl` promises: light, lazy, complete."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from importlib import resources

import pytest

import video_trl


HEAVY = ("torch", "transformers", "diffusers", "datasets", "peft", "accelerate", "trl", "numpy", "av")


def test_import_loads_no_heavy_package():
    """In a fresh interpreter: another test may have loaded torch into this one."""
    code = f"import sys, video_trl; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_is_the_one_of_the_installed_distribution():
    assert video_trl.__version__ == importlib.metadata.version("video-trl")


@pytest.mark.parametrize("name", [name for name in video_trl.__all__ if name != "__version__"])
def test_public_names_resolve_to_what_they_are_called(name):
    value = getattr(video_trl, name)
    assert isinstance(value, type) and value.__name__ == name
    assert name in dir(video_trl)


def test_every_trainer_has_its_config():
    trainers = {name.removesuffix("Trainer") for name in video_trl.__all__ if name.endswith("Trainer")}
    configs = {name.removesuffix("Config") for name in video_trl.__all__ if name.endswith("Config")}
    assert trainers == configs != set()


def test_unknown_name_raises_and_says_what_is_there():
    with pytest.raises(AttributeError, match="VideoGroupDPOTrainre.*VideoGroupDPOTrainer"):
        video_trl.VideoGroupDPOTrainre  # noqa: B018
    assert not hasattr(video_trl, "torch")


def test_package_data_is_there():
    package = resources.files("video_trl")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("templates", "report.html").is_file()


def test_importing_a_trainer_says_nothing():
    """No words of the libraries underneath about what they could not load: the first output is ours."""
    code = "import logging; logging.basicConfig(); from video_trl import VideoSFTTrainer"
    if importlib.util.find_spec("torchao"):
        code += "; import torchao.kernel.intmm"  # as training does
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
