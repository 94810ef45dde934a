"""First frames of image-to-video rows: where they come from, what is stored of them, and once."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from tests.support import rounding
from tests.support.tiny import (
    MAX_SEQUENCE_LENGTH,
    PROMPTS,
    tiny_cogvideox_i2v_pipeline,
    tiny_hunyuan_i2v_pipeline,
    tiny_latents_shape,
    tiny_video,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
)
from video_trl.data import EncodedDataset, VideoDecodeError, encode_dataset, write_video
from video_trl.data.columns import column_names
from video_trl.data.encoding.store import EncodedWriter, check_conditions
from video_trl.data.images import image_hash, read_image
from video_trl.models import WanFamily, family_for
from video_trl.trainer.publishing.sampling import Sampler
from video_trl.trainer.setup.chosen_rows import chosen_as_video
from video_trl.trainer.setup.rows import IndexedDataset


@pytest.fixture(scope="module")
def wan():
    return tiny_wan_i2v_pipeline()


@pytest.fixture(scope="module", params=["wan-i2v", "cogvideox-i2v"])
def case(request, wan):
    """A pipeline and the number of frames of its videos."""
    pipeline = wan if request.param == "wan-i2v" else tiny_cogvideox_i2v_pipeline()
    return pipeline, 4 * (tiny_latents_shape(request.param)[1] - 1) + 1


def encode(dataset, pipeline, cache_dir, row_type: str = "video", **options) -> EncodedDataset:
    family = family_for(pipeline.transformer, pipeline.scheduler)
    options = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "device": "cpu"} | options
    return encode_dataset(dataset, pipeline, family, row_type, cache_dir=cache_dir, **options)


def by_hand(pipeline, image: np.ndarray, frames: int) -> dict[str, torch.Tensor]:
    family = family_for(pipeline.transformer, pipeline.scheduler)
    return {
        name: values[0] for name, values in family.encode_image(pipeline, [PIL.Image.fromarray(image)], frames).items()
    }


def video_row(seed: int = 0, **more) -> dict:
    return {"prompt": PROMPTS[0], "video": tiny_video(seed), **more}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def stored(encoded: EncodedDataset) -> list[str]:
    """Names of all tensors on disk."""
    shards = sorted(encoded.directory.glob("*.safetensors"))
    return [key for shard in shards for key in load_file(shard)]


# --- Where the first frame comes from --------------------------------------------------------------------------------


def test_the_first_frame_is_that_of_the_chosen_video_and_is_shared(case, tmp_path):
    pipeline, frames = case
    videos = [tiny_video(seed, num_frames=frames) for seed in range(4)]
    rows = [
        {"prompt": PROMPTS[0], "chosen": videos[0], "rejected": [videos[1], videos[2]]},
        {"prompt": PROMPTS[1], "chosen": videos[0], "rejected": [videos[2], videos[3]]},
        {"prompt": PROMPTS[2], "chosen": videos[1], "rejected": [videos[2], videos[3]]},
    ]
    encoded = encode(rows, pipeline, tmp_path, "group", batch_size=2)
    columns = family_for(pipeline.transformer, pipeline.scheduler).condition_columns
    for row, example in zip(rows, encoded, strict=True):
        assert list(example) == ["prompt", "chosen_latents", "rejected_latents", *columns]
        for name, expected in by_hand(pipeline, row["chosen"][0], frames).items():
            rounding.assert_close(example[name], expected, rounding.SINGLE)
    distinct = [key for key in stored(encoded) if key.startswith("first_frame_latents/")]
    assert len(distinct) == 2  # of three rows, two begin alike
    assert all(parameter.device.type == "cpu" for parameter in pipeline.vae.parameters())


def test_text_to_video_stores_no_image_and_ignores_the_column(tmp_path):
    pipeline = tiny_wan_pipeline()
    example = encode([video_row(image=tiny_video(1)[0])], pipeline, tmp_path)
    assert list(example[0]) == ["prompt", "latents", "prompt_embeds"]
    other = encode([video_row(image="no such file")], pipeline, tmp_path)
    assert other.directory == example.directory


def test_an_image_of_the_row_replaces_the_first_frame_whatever_form_it_has(wan, tmp_path):
    pixels = tiny_video(7)[3]
    path = tmp_path / "first.png"
    path.write_bytes(png(pixels))
    cells = [pixels, PIL.Image.fromarray(pixels), str(path), path, {"path": None, "bytes": png(pixels)}]
    rows = [video_row(image=cell) for cell in (*cells, None)]
    encoded = encode(rows, wan, tmp_path)
    expected = by_hand(wan, pixels, 5)
    for example in list(encoded)[:-1]:
        for name, values in expected.items():
            rounding.assert_close(example[name], values, rounding.SINGLE)
    for name, values in by_hand(wan, tiny_video(0)[0], 5).items():  # no image: that of the video
        rounding.assert_close(encoded[-1][name], values, rounding.SINGLE)
    assert len([key for key in stored(encoded) if key.startswith("image_embeds/")]) == 2
    assert len([key for key in stored(encoded) if key.startswith("videos/")]) == 1


def test_a_column_of_the_image_type_is_read_undecoded(wan, tmp_path):
    pixels, video = tiny_video(7)[3], write_video(tmp_path / "video.mp4", tiny_video(0), fps=8)
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "video": datasets.Video(),
            "image": datasets.Image(),
        }
    )
    row = {"prompt": PROMPTS[0], "video": str(video), "image": {"path": None, "bytes": png(pixels)}}
    example = encode(datasets.Dataset.from_list([row], features=features), wan, tmp_path)[0]
    for name, values in by_hand(wan, pixels, 5).items():
        rounding.assert_close(example[name], values, rounding.SINGLE)


def test_images_are_scaled_and_cropped_as_videos_are(wan, tmp_path):
    large = tiny_video(3, num_frames=5, height=64, width=96)
    rows = [{"prompt": PROMPTS[0], "video": large}, {"prompt": PROMPTS[0], "video": large, "image": large[0]}]
    first, second = encode(rows, wan, tmp_path, height=32, width=32)
    for name in ("first_frame_latents", "image_embeds"):
        rounding.assert_close(first[name], second[name], rounding.SINGLE)
    kept = encode([video_row(image=large[0])], wan, tmp_path)[0]  # no size asked for: that of the row's video
    rounding.assert_close(kept["first_frame_latents"], first["first_frame_latents"], rounding.SINGLE)


def test_one_image_before_videos_of_two_lengths_is_encoded_for_both(wan, tmp_path):
    image = tiny_video(7)[0]
    rows = [{"prompt": "a ball", "video": tiny_video(0, num_frames=frames), "image": image} for frames in (5, 9)]
    encoded = encode(rows, wan, tmp_path)
    assert [row["first_frame_latents"].shape[1] for row in encoded] == [2, 3]


# --- The cache -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_covers_images_and_what_encodes_them(wan, tmp_path):
    rows = [video_row(image=tiny_video(1)[0])]
    names = [encode(rows, wan, tmp_path).directory]
    assert encode([video_row(image=PIL.Image.fromarray(tiny_video(1)[0]))], wan, tmp_path).directory == names[0]
    names.append(encode([video_row(image=tiny_video(2)[0])], wan, tmp_path).directory)
    names.append(encode([video_row()], wan, tmp_path).directory)
    other = tiny_wan_i2v_pipeline()
    with torch.no_grad():
        next(other.image_encoder.parameters()).add_(0.1)
    names.append(encode(rows, other, tmp_path).directory)
    other = tiny_wan_i2v_pipeline()
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    names.append(encode(rows, other, tmp_path).directory)
    names.append(encode(rows, tiny_wan_i2v_pipeline(image_encoder=False), tmp_path).directory)
    assert len(set(names)) == 6


def test_a_prompt_that_is_read_with_its_image_is_stored_once_for_each(tmp_path):
    pipeline, frames = tiny_hunyuan_i2v_pipeline(), [tiny_video(seed)[0] for seed in (1, 2)]
    family = family_for(pipeline.transformer)
    pairs = [(PROMPTS[0], frames[0]), (PROMPTS[0], frames[1]), (PROMPTS[1], frames[0]), (PROMPTS[0], frames[0])]
    rows = [video_row(seed, image=frame) | {"prompt": prompt} for seed, (prompt, frame) in enumerate(pairs)]
    found = encode(rows, pipeline, tmp_path, batch_size=2)
    for example, (prompt, frame) in zip(found, pairs, strict=True):
        picture = [PIL.Image.fromarray(frame)]
        (expected,) = family.encode_prompt_with_image(pipeline, [prompt], picture, MAX_SEQUENCE_LENGTH)
        for name, values in (expected | by_hand(pipeline, frame, 5)).items():
            rounding.assert_close(example[name], values, rounding.SINGLE)
    for column in ("prompts", "image_embeds", "pooled_prompt_embeds"):
        assert len([key for key in stored(found) if key.startswith(f"{column}/")]) == 3
    pipeline.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert encode(rows, pipeline, tmp_path).directory != found.directory
    pipeline.register_modules(image_processor=None)
    with pytest.raises(ValueError, match="no 'image_processor' to encode with"):
        encode(rows, pipeline, tmp_path)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("missing.png", r"row 1, image \(missing.png\).*cannot open the file"),
        (
            {"path": "cut.png", "bytes": png(tiny_video(0)[0])[:-60]},
            r"row 1, image \(cut.png\).*cannot read the image",
        ),
        ({"path": None, "bytes": b""}, r"row 1, image \(<image>\).*cannot read the image"),
        (np.zeros((4, 4), dtype=np.uint8), r"row 1, image.*expected uint8 of shape \(height, width, 3\)"),
        (3, r"row 1, image.*expected a path.*got int"),
    ],
)
def test_an_unreadable_image_stops_or_its_row_is_left_out_by_name(wan, tmp_path, cell, message):
    rows = [video_row(0), video_row(1, image=cell)]
    with pytest.raises(VideoDecodeError, match=message):
        encode(rows, wan, tmp_path)
    encoded = encode(rows, wan, tmp_path, on_bad_video="skip")
    assert len(encoded) == 1 and encoded.skipped[0].row == 1 and "image" in encoded.skipped[0].video


def test_a_pipeline_without_its_image_encoder_cannot_encode(tmp_path):
    pipeline = tiny_wan_i2v_pipeline()
    pipeline.register_modules(image_encoder=None)
    with pytest.raises(ValueError, match="no 'image_encoder' to encode with"):
        encode([video_row()], pipeline, tmp_path)


def test_encoded_rows_know_their_family(wan, tmp_path):
    encoded = encode([video_row()], wan, tmp_path)
    assert encoded.encoder == "wan-i2v"
    check_conditions(encoded, family_for(tiny_wan_pipeline().transformer))
    other = tiny_cogvideox_i2v_pipeline()
    with pytest.raises(ValueError, match="was encoded for 'wan-i2v', but the transformer is 'cogvideox-i2v'"):
        check_conditions(encoded, family_for(other.transformer, other.scheduler))


def test_chosen_videos_of_encoded_rows_know_their_family_and_rate_too(tmp_path):
    """Latents of Wan and CogVideoX have one shape, and their prompts one width."""
    with EncodedWriter(tmp_path / "group-x", "group", "x", encoder="wan", fps=12.0) as writer:
        writer.add("v", torch.ones(4, 1, 4, 4))
        writer.finish([{"prompt": "a", "prompt_embeds": "v", "chosen": "v", "rejected": ["v"]}], [])
    chosen = chosen_as_video(EncodedDataset(tmp_path / "group-x"))
    assert set(column_names(chosen)) == {"prompt", "prompt_embeds", "latents"}
    other = tiny_cogvideox_i2v_pipeline()
    with pytest.raises(ValueError, match="was encoded for 'wan', but the transformer is 'cogvideox-i2v'"):
        check_conditions(chosen, family_for(other.transformer, other.scheduler))
    rows = IndexedDataset(chosen, [(4, 1, 4, 4)])
    sampler = Sampler(None, WanFamily(), rows, device=torch.device("cpu"), max_sequence_length=16)
    assert sampler.fps == 12.0


@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_chosen_video_as_a_video_row_keeps_its_image(as_dataset):
    rows = [{"prompt": "a", "chosen": "a.mp4", "rejected": ["b.mp4"], "image": "a.png"}]
    kept = chosen_as_video(datasets.Dataset.from_list(rows) if as_dataset else rows)
    assert dict(kept[0]) == {"prompt": "a", "video": "a.mp4", "image": "a.png"}


# --- read_image ------------------------------------------------------------------------------------------------------


def test_images_are_upright_and_rgb(tmp_path: Path):
    pixels = tiny_video(0, height=16, width=24)[0]
    rotated = PIL.Image.fromarray(np.rot90(pixels))
    exif = rotated.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it upright
    rotated.save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "phone.png"), pixels)
    transparent = PIL.Image.fromarray(pixels).convert("RGBA")
    assert np.array_equal(read_image(transparent), pixels) and image_hash(transparent) == image_hash(pixels)
    grey = PIL.Image.fromarray(pixels[..., 0])
    assert np.array_equal(read_image(grey), np.repeat(pixels[..., :1], 3, axis=2))
    assert read_image(pixels, height=8, width=8).shape == (8, 8, 3)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_levels_of_16_bits_are_scaled_and_not_cut_off():
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    seen = read_image({"bytes": encoded(PIL.Image.fromarray(levels))})
    assert np.array_equal(seen, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2))
    with pytest.raises(VideoDecodeError, match="expected levels of 8 or 16 bits, got 32"):
        read_image(PIL.Image.fromarray(np.ones((4, 4), dtype=np.float32)))


def test_whatever_is_damaged_in_an_image_names_it():
    """PIL raises a ValueError for a cut-off header, and others for tags that lie."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    good = [encoded(PIL.Image.fromarray(pixels), kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF")]
    rng, refused = np.random.default_rng(1), 0
    for number in range(600):
        data = bytearray(good[number % len(good)])
        for place in rng.integers(0, min(len(data), 160), int(rng.integers(1, 10))):
            data[place] = rng.integers(256)
        try:
            assert read_image({"path": "a.png", "bytes": bytes(data)}).dtype == np.uint8
        except VideoDecodeError as error:
            refused += "a.png: cannot read the image" in str(error)
    assert refused > 100
    with pytest.raises(VideoDecodeError, match="a.png: cannot read the image"):
        read_image({"path": "a.png", "bytes": good[0][:8] + b"\0\0\0\5IHDR" + good[0][16:]})
