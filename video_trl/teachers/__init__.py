"""Teachers: frozen video encoders whose tokens a denoiser is aligned with (VideoREPA)."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .base import ModelTeacher, TeacherTokens, VideoTeacher
from .dino import DINOTeacher, load_dino
from .videomae import VideoMAETeacher, load_videomae, load_videomaev2
from .vjepa2 import VJEPA2Teacher, load_vjepa2


_LOADERS = {
    "videomae": load_videomae,
    "vjepa2": load_vjepa2,
    "dinov2": load_dino,
    "dinov2_with_registers": load_dino,
    "dinov3_vit": load_dino,
}
_WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def load_teacher(
    name_or_path: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> VideoTeacher:
    """
    Loads a teacher.

    Args:
        name_or_path (`str`):
            `"sandbox"` (the small VideoMAE that ships with the package); a repo id or folder of VideoMAE, VideoMAEv2,
            V-JEPA 2, DINOv2 or DINOv3; or a file of VideoMAEv2 weights.
        device (`torch.device` or `str`, *optional*):
            Where to put it; the CPU by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of its weights and arithmetic. Tokens are float32 in any case.
        options:
            `height` and `width` (input size in pixels; default: that of the pretraining), `antialias`,
            `skip_first_frame`; of DINO also `frame_stride`; of VideoMAEv2 also `num_attention_heads`. See
            [`ModelTeacher`]. The sandbox's teacher takes none.

    Raises:
        ValueError: There is no such repo, folder or file, it is of another architecture, lacks weights, or a size does
            not suit it.
    """
    dtype = torch.float32 if dtype is None else dtype
    teacher: VideoTeacher
    if name_or_path == "sandbox":
        from ..sandbox.weights.teacher import load_sandbox_teacher

        teacher = load_sandbox_teacher(dtype=dtype, **options)
    elif Path(name_or_path).suffix in _WEIGHTS_SUFFIXES:
        if not Path(name_or_path).is_file():
            raise ValueError(f"There is no file {name_or_path}. Pass the path of VideoMAEv2 weights.")
        teacher = load_videomaev2(name_or_path, dtype=dtype, **options)
    else:
        teacher = _load_repo(name_or_path, dtype, options)
    return teacher if device is None else teacher.to(device)


def _load_repo(name_or_path: str, dtype: torch.dtype, options: dict[str, Any]) -> VideoTeacher:
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Cannot load a teacher from {name_or_path!r}: no such folder, or no access to such a repo "
            f"({reason}). Pass 'sandbox', a folder with a config.json, or a repo id."
        ) from error
    if "model_type" not in config:
        raise ValueError(f"{name_or_path!r} has no config.json that names an architecture. Pass a teacher's folder.")
    model_type = str(config["model_type"])
    if model_type.lower().startswith("videomaev2"):  # its repos bring their own code, which is not run
        file = cached_file(name_or_path, "model.safetensors")
        return load_videomaev2(file, dtype=dtype, name=Path(name_or_path).name, **options)
    if model_type not in _LOADERS:
        raise ValueError(
            f"{name_or_path!r} is of architecture {model_type!r}; a teacher is one of {', '.join(_LOADERS)} or "
            "VideoMAEv2. Any object that fulfils `video_trl.teachers.VideoTeacher` works where a teacher is passed."
        )
    return _LOADERS[model_type](name_or_path, dtype=dtype, **options)


__all__ = [
    "DINOTeacher",
    "ModelTeacher",
    "TeacherTokens",
    "VJEPA2Teacher",
    "VideoMAETeacher",
    "VideoTeacher",
    "load_teacher",
]
