"""The protocol of a teacher: a frozen encoder whose tokens have a known grid and known times."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from typing_extensions import Self

from ..files import fingerprint


CODE_VERSION = 1  # raise it when the same weights and video give other tokens, so that old caches are not used

# Keys of a configuration that tell how it was saved, not what the model computes (dtypes are taken from the weights).
_RECORDS = {"architectures", "dtype", "transformers_version"}
# Largest change of the width-to-height ratio by resizing that is taken for rounding to whole patches.
_ASPECT_TOLERANCE = 0.05


@dataclass(frozen=True)
class TeacherTokens:
    """
    Tokens of a batch of videos.

    Attributes:
        tokens: float32 `(B, F', H' * W', D)`, rows of the picture first, no prefix tokens.
        grid: `(F', H', W')`.
        frame_times: float32 `(F',)`, centre of each token frame on the axis of the clip's frames (frame 0 is 0.0): a
            tubelet of frames 1 and 2 has 1.5.
    """

    tokens: Tensor
    grid: tuple[int, int, int]
    frame_times: Tensor


@runtime_checkable
class VideoTeacher(Protocol):
    """
    A frozen encoder.

    Attributes:
        name: short identifier, for logs and model cards.
        identity: hash of weights, configuration, input size and code version; two teachers with one identity give the
            same tokens.
    """

    name: str

    @property
    def identity(self) -> str: ...

    def __call__(self, video: Tensor) -> TeacherTokens:
        """
        Encodes whole clips, without gradient and in the teacher's own precision.

        Args:
            video: float `(B, T, 3, H, W)` in [0, 1].

        Raises:
            ValueError: the video has another layout, or its frames or sides do not suit the teacher.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Moves the teacher, in place."""
        ...


class ModelTeacher(ABC):
    """
    What the teachers made of a `transformers` model share: checks, resizing, identity.

    Args:
        model (`torch.nn.Module`): with a `config`; frozen here and put into evaluation mode.
        name: short identifier.
        height, width: size of the picture that the model sees, multiples of its patch, given together; None is the
            size that its configuration names. A video of another shape (its sides' ratio differs by more than 5 %) is
            refused, since squeezing a picture changes its motion.
        antialias: False resizes as VideoREPA's official code does, by bicubic interpolation without a filter, which
            reads a ninth of the pixels when it shrinks to a third. For parity only.
        frame_groups: shows the frames in so many groups of consecutive ones, each by itself, and puts their tokens one
            after the other (VideoREPA, appendix C, strategy 2); 1 shows all of them at once.
        crops: shows the picture in so many rows and columns of tiles, each by itself (strategy 3).
        skip_first_frame: leaves out frame 0, which the first latent frame of causal video autoencoders encodes alone:
            4k + 1 frames become 4k, which tubelets divide.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        patch_size: int,
        tubelet_size: int,
        native_size: tuple[int, int],
        height: int | None = None,
        width: int | None = None,
        antialias: bool = True,
        skip_first_frame: bool = True,
        frame_groups: int = 1,
        crops: Sequence[int] = (1, 1),
    ) -> None:
        if (height is None) != (width is None):
            raise ValueError(f"`height` and `width` go together, got {height} and {width}. Pass both or none.")
        size = native_size if height is None or width is None else (height, width)
        if any(side < patch_size or side % patch_size for side in size):
            raise ValueError(
                f"{name}: height and width must be positive multiples of its patch size {patch_size}, got {size}."
            )
        if frame_groups < 1 or len(crops) != 2 or min(crops) < 1:
            raise ValueError(
                f"{name}: expected `frame_groups` >= 1 and two positive numbers as `crops`, got {frame_groups} and "
                f"{crops}."
            )
        if any(side // patch_size % parts for side, parts in zip(size, crops, strict=True)):
            raise ValueError(
                f"{name}: {size[0] // patch_size} x {size[1] // patch_size} tokens cannot be cut into {crops[0]} x "
                f"{crops[1]} equal tiles. Choose `crops` that divide them."
            )
        self.frame_groups, self.crops = frame_groups, (crops[0], crops[1])
        self.model: Any = model.requires_grad_(False).eval()
        self.name = name
        self.size = size
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.antialias = antialias
        self.skip_first_frame = skip_first_frame

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def identity(self) -> str:
        """32 hexadecimal digits. Reads all weights once."""
        config = {k: v for k, v in self._config().items() if k not in _RECORDS and not k.startswith("_")}
        settings = [CODE_VERSION, transformers.__version__, type(self).__name__, config, self._settings()]
        return fingerprint(settings, self.model)

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, video: Tensor) -> TeacherTokens:
        """See `VideoTeacher.__call__`. The video comes to the teacher's device; its tokens stay there."""
        self._check(video)
        frames = video[:, self.first_frame :].to(self.device, torch.float32)
        pixels = normalise(resize(frames, self.size, antialias=self.antialias))
        grid = (
            self._num_token_frames(frames.shape[1]),
            self.size[0] // self.patch_size,
            self.size[1] // self.patch_size,
        )
        # The caller's autocast would give other tokens in training than those in the cache.
        with torch.autocast(self.device.type, enabled=False):
            tokens = self._encode_parts(pixels.to(next(self.model.parameters()).dtype), grid)
        assert tokens.shape[:2] == (len(video), grid[0] * grid[1] * grid[2]), (tokens.shape, grid)
        return TeacherTokens(
            tokens=tokens.float().unflatten(1, (grid[0], grid[1] * grid[2])),
            grid=grid,
            frame_times=self._frame_times(grid[0]),
        )

    @property
    def first_frame(self) -> int:
        """Number of the first frame that the teacher sees."""
        return int(self.skip_first_frame)

    def _encode_parts(self, pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens of the whole clip, from one look at it or from one at each of its parts."""
        if self.frame_groups == 1 and self.crops == (1, 1):
            return self._encode(pixels, grid)
        rows, columns = self.crops
        part = (grid[0] // self.frame_groups, grid[1] // rows, grid[2] // columns)
        groups = []
        for frames in pixels.chunk(self.frame_groups, dim=1):
            bands = []
            for band in frames.chunk(rows, dim=3):
                tiles = [self._encode(tile, part).unflatten(1, part) for tile in band.chunk(columns, dim=4)]
                bands.append(torch.cat(tiles, dim=3))  # (B, F', H', W', D)
            groups.append(torch.cat(bands, dim=2))
        return torch.cat(groups, dim=1).flatten(1, 3)

    @abstractmethod
    def _encode(self, pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Normalised pixels `(B, T, 3, H, W)` of the right size -> tokens `(B, F' * H' * W', D)`."""

    def _config(self) -> dict[str, Any]:
        return dict(self.model.config.to_dict())

    def _settings(self) -> list[Any]:
        """Everything beside weights and configuration that the tokens depend on."""
        parts = [] if self.frame_groups == 1 and self.crops == (1, 1) else [self.frame_groups, self.crops]
        return [self.size, self.antialias, self.skip_first_frame, *parts]

    def _num_token_frames(self, num_frames: int) -> int:
        return num_frames // self.tubelet_size

    def _frame_times(self, num_token_frames: int) -> Tensor:
        starts = torch.arange(num_token_frames, dtype=torch.float32) * self.tubelet_size
        return self.first_frame + starts + (self.tubelet_size - 1) / 2

    def _check(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise ValueError(
                f"{self.name}: expected a float video of shape (B, T, 3, H, W) in [0, 1], got {video.dtype} "
                f"{tuple(video.shape)}. From uint8 (B, T, H, W, 3): `video.movedim(-1, 2).float() / 255`."
            )
        # A video in [-1, 1], as the autoencoder takes it, would pass for a dark one.
        if video.numel() and (video.amin() < -1e-3 or video.amax() > 1 + 1e-3):
            raise ValueError(
                f"{self.name}: pixels must be in [0, 1], got [{video.amin():.3g}, {video.amax():.3g}]. "
                "From [-1, 1]: `(video + 1) / 2`."
            )
        num_frames = video.shape[1] - self.first_frame
        if num_frames < self.tubelet_size or num_frames % self.tubelet_size:
            skipped = " after frame 0 is left out" if self.skip_first_frame else ""
            raise ValueError(
                f"{self.name}: the number of frames{skipped} must be a positive multiple of {self.tubelet_size}, got "
                f"{num_frames}. Use clips of 4k + 1 frames with `skip_first_frame=True`, of 4k with False."
            )
        if self._num_token_frames(num_frames) % self.frame_groups or num_frames % self.frame_groups:
            raise ValueError(
                f"{self.name}: {num_frames} frames, which make {self._num_token_frames(num_frames)} token frames, "
                f"cannot be shown in {self.frame_groups} equal groups. Choose `frame_groups` that divides both."
            )
        ratio = (video.shape[4] / video.shape[3]) / (self.size[1] / self.size[0])
        if abs(ratio - 1) > _ASPECT_TOLERANCE:
            raise ValueError(
                f"{self.name}: a video of {video.shape[3]} x {video.shape[4]} pixels would be squeezed to "
                f"{self.size[0]} x {self.size[1]}. Pass `height` and `width` of its shape, multiples of "
                f"{self.patch_size}."
            )


def normalise(video: Tensor) -> Tensor:
    """`(B, T, 3, H, W)` in [0, 1] -> mean 0 and variance 1 over ImageNet, which all teachers were trained with."""
    mean = video.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = video.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (video - mean) / deviation


def resize(video: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    """`(B, T, C, H, W)` to another `(H, W)`, bicubic."""
    if tuple(video.shape[-2:]) == size:
        return video
    frames = F.interpolate(video.flatten(0, 1), size, mode="bicubic", align_corners=False, antialias=antialias)
    return frames.unflatten(0, video.shape[:2])
