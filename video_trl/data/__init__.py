"""Video datasets: row types and checks, video files, encoding with a cache, collators."""

from .collators import GroupCollator, VideoCollator
from .columns import ENCODED_COLUMNS, ROW_TYPES, check_columns, column_names, group_features, is_encoded
from .encoding.encode import encode_dataset
from .encoding.store import EncodedDataset, SkippedRow
from .encoding.teacher_tokens import TeacherTokenDataset, dequantise_tokens, encode_teacher, quantise_tokens
from .video_file import VideoDecodeError, VideoLimits
from .video_io import VideoInfo, probe_video, read_video, video_hash, video_shape, write_video


__all__ = [
    "ENCODED_COLUMNS",
    "ROW_TYPES",
    "EncodedDataset",
    "GroupCollator",
    "SkippedRow",
    "TeacherTokenDataset",
    "VideoCollator",
    "VideoDecodeError",
    "VideoInfo",
    "VideoLimits",
    "check_columns",
    "column_names",
    "dequantise_tokens",
    "encode_dataset",
    "encode_teacher",
    "group_features",
    "is_encoded",
    "probe_video",
    "quantise_tokens",
    "read_video",
    "video_hash",
    "video_shape",
    "write_video",
]
