"""Datasets of videos: row types and their checks, video files, encoding and its cache, collators."""

from .collators import GroupCollator, VideoCollator
from .columns import ENCODED_COLUMNS, ROW_TYPES, check_columns, column_names, group_features, is_encoded
from .encode import encode_dataset
from .encoded import EncodedDataset, SkippedRow
from .video_io import VideoDecodeError, VideoInfo, probe_video, read_video, video_hash, write_video


__all__ = [
    "ENCODED_COLUMNS",
    "ROW_TYPES",
    "EncodedDataset",
    "GroupCollator",
    "SkippedRow",
    "VideoCollator",
    "VideoDecodeError",
    "VideoInfo",
    "check_columns",
    "column_names",
    "encode_dataset",
    "group_features",
    "is_encoded",
    "probe_video",
    "read_video",
    "video_hash",
    "write_video",
]
