"""
Look at this machine, and say what to do about what is missing. Nothing is downloaded and nothing is changed.

Examples:

  video-trl doctor
  video-trl doctor --output_dir /data/runs      also the disk that results will go to

Exit code 1 if something would stop a run.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from .parser import parse, say


OK, NOTE, FAULT = "ok", "note", "FAULT"
_LEAST_FREE_GIB = 20  # a model of 1.3 billion parameters with its text encoder, and some videos
_LEAST_MEMORY_GIB = 16  # the same model in bfloat16 passes through it
_LEAST_SHARED_GIB = 1  # batches of `dataloader_num_workers`
_NVIDIA_DRIVER = "/proc/driver/nvidia/version"
_EXTRAS = {
    "sentencepiece": "the judges VideoCon-Physics and VideoPhy-2: pip install 'video-trl[judges]'",
    "openai": "judges and annotators behind a server: pip install 'video-trl[remote]'",
    "sentence-transformers": "action clustering: pip install 'video-trl[curation]'",
    "scikit-learn": "linear probes: pip install 'video-trl[evaluation]'",
    "uvicorn": "the voting page: pip install 'video-trl[vote]'",
    "ray": "curation on a cluster: pip install 'video-trl[ray]'",
    "deepspeed": "sharded training with DeepSpeed: pip install 'video-trl[deepspeed]'",
    "tensorboard": "training curves with --report_to tensorboard: pip install tensorboard",
}

_KERNELS = ("flash-attn", "sageattention", "xformers")


@dataclass
class DoctorArguments:
    """What is looked at beside the machine."""

    output_dir: str = field(default=".", metadata={"help": "Folder that results will go to."})


@dataclass(frozen=True)
class Finding:
    """A line of the report: a verdict, what was looked at, what was found, what to do."""

    verdict: str
    subject: str
    text: str


def run(argv: Sequence[str]) -> int:
    (args,) = parse("doctor", __doc__, [DoctorArguments], argv)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (python, versions, device, attention, memory, codecs, hub)
    findings = [finding for check in checks for finding in check()]
    findings += disk(args.output_dir)
    for finding in findings:
        say(f"{finding.verdict:6}{finding.subject:22}{finding.text}")
    faults = sum(finding.verdict == FAULT for finding in findings)
    say(f"\n{faults or 'No'} fault{'' if faults == 1 else 's'} found.")
    return 1 if faults else 0


def python() -> Iterator[Finding]:
    """The interpreter against what this package declares."""
    from packaging.specifiers import SpecifierSet

    version, needed = platform.python_version(), metadata.metadata("video-trl")["Requires-Python"]
    fits = SpecifierSet(needed).contains(version, prereleases=True)
    yield Finding(
        OK if fits else FAULT, "Python", version if fits else f"{version}, needed {needed}: make a new environment"
    )


def versions() -> Iterator[Finding]:
    """Installed packages against the ranges that this package declares."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires("video-trl") or ()]
    for requirement in declared:
        if requirement.marker is not None:  # of an extra
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(FAULT, requirement.name, f"not installed: pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        advice = "" if fits else f", needed {requirement.specifier}: pip install '{requirement}'"
        yield Finding(OK if fits else FAULT, requirement.name, f"{version}{advice}")
    for name, purpose in _EXTRAS.items():
        if _installed(name):
            yield Finding(OK, name, metadata.version(name))
        else:
            yield Finding(NOTE, name, f"not installed; it is for {purpose}")


def device() -> Iterator[Finding]:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None and (Path(_NVIDIA_DRIVER).exists() or shutil.which("nvidia-smi")):
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        advice = "install the torch build for the driver's CUDA (see `nvidia-smi`), and look at CUDA_VISIBLE_DEVICES"
        yield Finding(
            FAULT, "device", f"an NVIDIA driver, but torch {torch.__version__} {built} and sees no GPU: {advice}"
        )
        return
    if accelerator is None:
        advice = "fine for the sandbox; models of a billion parameters need a GPU"
        yield Finding(NOTE, "device", f"CPU, {torch.get_num_threads()} threads: {advice}")
        return
    for number in range(torch.accelerator.device_count()):
        text = str(accelerator)
        if accelerator.type == "cuda":
            properties = torch.cuda.get_device_properties(number)
            text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding(OK, f"device {number}", text)
    if accelerator.type == "cuda" and not torch.cuda.is_bf16_supported():
        yield Finding(NOTE, "bfloat16", "not supported: training runs in float32, in twice the memory")


def attention() -> Iterator[Finding]:
    """Which implementations of attention run here, tried on a small input."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from ..data.encoding.processes import default_device

    place = default_device()
    query = torch.zeros(1, 4, 32, 64, device=place, dtype=torch.float32 if place.type == "cpu" else torch.bfloat16)
    working = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
            working.append(backend.name.lower())
        except RuntimeError:  # "No available kernel"
            continue
    fast = len(working) > 1
    advice = "" if fast else ": long videos will be slow and may not fit; install a torch build for this device"
    yield Finding(OK if fast else NOTE, "attention", f"{', '.join(working)}{advice}")
    kernels = [f"{name} {metadata.version(name)}" for name in _KERNELS if _installed(name)]
    absent = f"none of {', '.join(_KERNELS)}; not needed, torch's own are used"
    yield Finding(OK, "attention kernels", ", ".join(kernels) or absent)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def memory() -> Iterator[Finding]:
    """Memory of the machine, and shared memory of its processes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    advice = "" if total >= _LEAST_MEMORY_GIB else ": enough for the sandbox, little for a model"
    yield Finding(NOTE if advice else OK, "memory", f"{total:.0f} GiB{advice}")
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").total / 2**30
        advice = (
            "" if shared >= _LEAST_SHARED_GIB else ": keep --dataloader_num_workers 0, or `docker run --shm-size 8g`"
        )
        yield Finding(NOTE if advice else OK, "shared memory", f"{shared:.1f} GiB{advice}")


def codecs() -> Iterator[Finding]:
    """A clip is written and read; other formats are looked up."""
    import av
    import numpy as np

    from ..data.video_io import read_video, write_video

    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
        frames = read_video(path)
    good = frames.shape == (5, 32, 32, 3)
    yield Finding(OK if good else FAULT, "mp4", "written and read" if good else f"5 frames came back as {len(frames)}")
    missing = [name for name in ("hevc", "vp9", "av1", "mpeg4", "prores") if name not in av.codecs_available]
    text = f"no decoder of {', '.join(missing)}: pip install --force-reinstall av" if missing else "all usual decoders"
    yield Finding(NOTE if missing else OK, "other formats", text)


def hub() -> Iterator[Finding]:
    """Whether there is a token; it is neither shown nor tried."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding(NOTE, "Hub", "offline (HF_HUB_OFFLINE): only what is in the cache can be loaded")
    logged_in = get_token() is not None
    text = "a token is there" if logged_in else "no token: `hf auth login` for gated models and uploads"
    yield Finding(OK if logged_in else NOTE, "Hub login", text)
    yield from disk(constants.HF_HOME, "cache of the Hub")


def disk(folder: str, subject: str = "disk") -> Iterator[Finding]:
    """Free space, and whether files can be written there."""
    place = Path(folder).absolute()
    while not place.exists():  # it will be made
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize / 2**30
    if not os.access(place, os.W_OK):
        yield Finding(FAULT, subject, f"{place} cannot be written: choose another folder")
    elif free < _LEAST_FREE_GIB:
        yield Finding(NOTE, subject, f"{free:.1f} GiB free in {place}: enough for the sandbox, little for a model")
    else:
        yield Finding(OK, subject, f"{free:.0f} GiB free in {place}")
