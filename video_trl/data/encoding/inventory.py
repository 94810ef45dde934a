"""List the distinct videos and images of a raw dataset, their sizes, and which of them cannot be read."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from ...files import fingerprint
from ..buckets import AspectBucket, nearest_bucket
from ..columns import MapDataset, as_loss_weights, as_scores, as_videos
from ..images import image_hash, image_name
from ..video_io import VideoDecodeError, VideoSource, probe_video, source_name, video_hash, video_shape
from .store import SkippedRow


#: Column of raw rows with the first frame; without it, that of the only or chosen video is taken.
IMAGE_COLUMN = "image"

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Place:
    """Where a video, or an image, stands in the raw dataset."""

    row: int
    column: str
    position: int | None  # in a list of rejected videos

    def read(self, dataset: MapDataset) -> Any:
        cell = dataset[self.row][self.column]
        return cell if self.position is None else as_videos(cell)[self.position]

    def name(self, source: Any) -> str:
        suffix = "" if self.position is None else f"[{self.position}]"
        return f"row {self.row}, {self.column}{suffix} ({self.source_name(source)})"

    def source_name(self, source: Any) -> str:
        return image_name(source) if self.column == IMAGE_COLUMN else source_name(source)


@dataclass(frozen=True)
class Row:
    """A raw row, its videos by their content."""

    prompt: str
    videos: tuple[str, ...]  # hashes; a group's chosen video first
    names: tuple[str, ...]  # what messages call these videos, and the image
    scores: list[list[float]] | None
    image: str | None  # hash, where the row brings its first frame
    weight: float | None  # of the row in the loss, where it has one
    loss_weights: np.ndarray | None  # of the latents' elements in the errors
    bucket: AspectBucket | None  # size that all its videos are brought to; none: that of the options, or their own

    @property
    def sources(self) -> tuple[str, ...]:
        """Hashes of the videos and of the image."""
        return self.videos if self.image is None else (*self.videos, self.image)


@dataclass
class Inventory:
    """
    What a raw dataset holds, videos and images by the hash of their content.

    Args:
        dataset (`MapDataset`): Rows, videos not decoded (see `undecoded`).
        on_bad_video (`str`): `"raise"` to stop at the first unreadable video or image, `"skip"` to note it.

    Attributes:
        rows: All rows, in order.
        places: First occurrence of each distinct video and image.
        names: What messages call that occurrence.
        bad: Unreadable ones and why.
        sizes: Sizes that videos are to be brought to, where each has its own.
    """

    dataset: MapDataset
    on_bad_video: str
    rows: list[Row] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, AspectBucket] = field(default_factory=dict)

    def read(self, digest: str) -> Any:
        """The cell in which a video or image was found first."""
        return self.places[digest].read(self.dataset)

    def check_unchanged(self, digest: str) -> None:
        """Raise a `ValueError` if the file of a video or image has other content than when it was hashed."""
        place, source = self.places[digest], self.read(digest)
        now, _ = _hash_or_reason(place, source)
        if now != digest.partition("@")[0]:
            raise ValueError(
                f"{self.names[digest]}: the file has changed since encoding began, so what it was encoded to would be "
                "kept under the hash of another one. Start again when nothing writes to it."
            )

    def pixels_of(self, digest: str, pixels: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments `pixels` of `read_video`, with the video's own size where it has one."""
        size = self.sizes.get(digest)
        return {**pixels} if size is None else {**pixels, "height": size.height, "width": size.width}

    def note_bad(self, digest: str, reason: str) -> None:
        """Raise a `VideoDecodeError`, or note that a video or image is unreadable."""
        if self.on_bad_video == "raise":
            raise VideoDecodeError(
                f"{self.names[digest]}: {reason} Or set `on_bad_video='skip'` to leave out such rows and list them."
            )
        self.bad[digest] = reason


def take_inventory(
    dataset: MapDataset,
    row_type: str,
    *,
    with_images: bool,
    on_bad_video: str,
    buckets: Sequence[AspectBucket] = (),
    max_crop: float = 1.0,
) -> Inventory:
    """
    Hash every video, and every image where they are wanted, and choose the size of the videos where there are buckets.

    All videos of a row get the bucket nearest to its only or chosen one; the hash of a video then ends in its size,
    for it may be wanted in several. Of videos, only those that cannot be opened, or fit no bucket, are found bad
    here; `video_shapes` decodes them. Images are decoded.
    """
    inventory = Inventory(dataset, on_bad_video)

    def hashed(item: tuple[int, Any]) -> tuple[Row, list[Place], list[str | None]]:
        number, row = item
        places, sources = zip(*_row_cells(row, number, row_type, with_images), strict=True)
        digests, reasons = map(list, zip(*map(_hash_or_reason, places, sources), strict=True))
        bucket = None
        if buckets and reasons[0] is None:
            bucket, reasons[0] = _bucket_or_reason(sources[0], buckets, max_crop)
            own = [position for position, place in enumerate(places) if place.column != IMAGE_COLUMN]
            for position in own if bucket is not None else [0]:
                digests[position] = f"{digests[position]}@{bucket}"
        names = tuple(place.name(source) for place, source in zip(places, sources, strict=True))
        scores = None if row_type == "video" else row.get("rejected_scores")
        numbers = None if scores is None else as_scores(scores).tolist()
        videos = tuple(d for d, place in zip(digests, places, strict=True) if place.column != IMAGE_COLUMN)
        image = None if len(videos) == len(digests) else digests[-1]
        weight = None if row_type == "video" or row.get("weight") is None else float(row["weight"])
        elements = None if row_type == "video" or row.get("loss_weights") is None else row["loss_weights"]
        elements = None if elements is None else as_loss_weights(elements)
        return Row(row["prompt"], videos, names, numbers, image, weight, elements, bucket), list(places), reasons

    numbered = ((number, dataset[number]) for number in range(len(dataset)))
    for row, places, reasons in in_threads(hashed, numbered, len(dataset), "Hashing videos"):
        inventory.rows.append(row)
        if row.bucket is not None:
            inventory.sizes.update(dict.fromkeys(row.videos, row.bucket))
        for digest, name, place, reason in zip(row.sources, row.names, places, reasons, strict=True):
            inventory.places.setdefault(digest, place)
            inventory.names.setdefault(digest, name)
            if reason is not None:
                inventory.note_bad(digest, reason)
    return inventory


def _row_cells(row: Any, number: int, row_type: str, with_images: bool) -> list[tuple[Place, Any]]:
    """Where each source of a row stands, and what stands there; the image last."""
    if row_type == "video":
        cells = [(Place(number, "video", None), row["video"])]
    else:
        rejected = enumerate(as_videos(row["rejected"]))
        cells = [
            (Place(number, "chosen", None), row["chosen"]),
            *((Place(number, "rejected", position), source) for position, source in rejected),
        ]
    if with_images and row.get(IMAGE_COLUMN) is not None:
        cells.append((Place(number, IMAGE_COLUMN, None), row[IMAGE_COLUMN]))
    return cells


def _hash_or_reason(place: Place, source: Any) -> tuple[str, str | None]:
    try:
        return (f"image-{image_hash(source)}" if place.column == IMAGE_COLUMN else video_hash(source)), None
    except VideoDecodeError as error:
        return f"unreadable-{fingerprint(str(error))}", _without_name(error, place.source_name(source))


def _bucket_or_reason(
    source: VideoSource, buckets: Sequence[AspectBucket], max_crop: float
) -> tuple[AspectBucket | None, str | None]:
    try:
        info = probe_video(source)
    except VideoDecodeError as error:
        return None, _without_name(error, source_name(source))
    bucket = nearest_bucket(info.width, info.height, buckets, max_crop)
    if bucket is not None:
        return bucket, None
    return None, (
        f"its size {info.height}x{info.width} (height x width) would lose more than {max_crop:.0%} of the picture in "
        f"each of the buckets {', '.join(map(str, buckets))}. Add a nearer one, or raise `max_crop` (of a "
        "trainer: `resolution_max_crop`)."
    )


def _without_name(error: VideoDecodeError, name: str) -> str:
    """The reason alone: the same damaged content may stand in several rows, under several names."""
    return str(error).removeprefix(f"{name}: ")


def video_shapes(inventory: Inventory, pixels: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """
    (T, H, W) of every distinct video, by decoding all with the keyword arguments `pixels` of `read_video`: damage
    shows before the expensive part, not hours later.
    """

    def shape_or_reason(item: tuple[str, VideoSource]) -> tuple[str, tuple[int, int, int] | None, str]:
        digest, source = item
        try:
            return digest, video_shape(source, **inventory.pixels_of(digest, pixels)), ""
        except VideoDecodeError as error:
            return digest, None, _without_name(error, source_name(source))

    readable = [
        digest
        for digest, place in inventory.places.items()
        if digest not in inventory.bad and place.column != IMAGE_COLUMN  # images were decoded when they were hashed
    ]
    sources = ((digest, inventory.read(digest)) for digest in readable)
    shapes = {}
    for digest, shape, reason in in_threads(shape_or_reason, sources, len(readable), "Checking videos"):
        if shape is None:
            inventory.note_bad(digest, reason)
        else:
            shapes[digest] = shape
    return shapes


def usable_rows(inventory: Inventory) -> tuple[list[Row], list[SkippedRow]]:
    """
    Rows without an unreadable video or image, and the others.

    Raises:
        ValueError: If no row is left.
    """
    rows, skipped = [], []
    for number, row in enumerate(inventory.rows):
        bad = [position for position, digest in enumerate(row.sources) if digest in inventory.bad]
        if bad:
            skipped.append(SkippedRow(number, row.names[bad[0]], inventory.bad[row.sources[bad[0]]]))
        else:
            rows.append(row)
    if not rows:
        first = f"{skipped[0].video}: {skipped[0].reason}"
        raise ValueError(f"No row is left: all {len(skipped)} have an unreadable video. The first: {first}")
    return rows, skipped


def check_shapes(
    inventory: Inventory,
    rows: Sequence[Row],
    shapes: Mapping[str, tuple[int, int, int]],
    check_video: Callable[[tuple[int, int, int]], None],
) -> None:
    """
    Check the sizes of all videos.

    Raises:
        ValueError: If `check_video` refuses a size, or the videos of one row differ in size.
    """
    checked = set()
    for row in rows:
        for digest in row.videos:
            shape, first = shapes[digest], row.videos[0]
            if shape not in checked:
                try:
                    check_video(shape)
                except ValueError as error:
                    raise ValueError(f"{inventory.names[digest]}: {error}") from error
                checked.add(shape)
            if shape != shapes[first]:
                raise ValueError(
                    f"{inventory.names[digest]}: expected (frames, height, width) {shapes[first]} as of "
                    f"{inventory.names[first]}, got {shape}. Set `num_frames`, `height` and `width`."
                )


def in_threads(function: Callable[[T], R], items: Iterable[T], total: int, description: str) -> Iterator[R]:
    """`map` in threads, in order, with a progress bar; holds only a few items at a time."""
    workers = min(8, os.cpu_count() or 1)
    iterator = iter(items)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, desc=description) as progress:
        while chunk := list(islice(iterator, 2 * workers)):
            for result in pool.map(function, chunk):
                progress.update()
                yield result
