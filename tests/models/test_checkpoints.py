"""The configurations of listed checkpoints: enough to plan a run, and of the size that the checkpoints have."""

import pytest

from video_trl.cli.dry_run import empty_encoders, empty_models, latents_shape
from video_trl.models.checkpoints import known_checkpoint, known_checkpoints


# Parameters of the transformer in billions, and the latents of 17 frames of 64x64 pixels.
FACTS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1.42, (16, 5, 8, 8)),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14.29, (16, 5, 8, 8)),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (14.29, (16, 5, 8, 8)),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": (14.29, (16, 5, 8, 8)),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (5.00, (48, 5, 4, 4)),
    "zai-org/CogVideoX-5b": (5.57, (16, 5, 8, 8)),
    "zai-org/CogVideoX1.5-5B": (5.57, (16, 5, 8, 8)),
    "zai-org/CogVideoX1.5-5B-I2V": (5.57, (16, 5, 8, 8)),
    "Lightricks/LTX-Video": (1.92, (128, 3, 2, 2)),
    "hunyuanvideo-community/HunyuanVideo": (12.82, (16, 5, 8, 8)),
    "hunyuanvideo-community/HunyuanVideo-I2V": (12.82, (16, 5, 8, 8)),
    "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": (8.33, (32, 5, 4, 4)),
    "Lightricks/LTX-2": (18.88, (128, 3, 2, 2)),
}


@pytest.mark.parametrize("name", known_checkpoints())
def test_a_listed_checkpoint_is_planned_without_the_hub(name):
    family, transformer, vae = empty_models(name, None)
    shape = latents_shape(family, vae, (17, 64, 64))
    assert len(family.blocks(transformer)) >= 20
    assert {*family.text_encoders, *family.image_encoders} <= set(known_checkpoint(name) or ())
    if name in FACTS:
        billions = sum(weight.numel() for weight in transformer.parameters()) / 1e9
        assert (round(billions, 2), shape) == FACTS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", {"text_encoder": 5.68, "image_encoder": 0.63}),
        ("hunyuanvideo-community/HunyuanVideo", {"text_encoder": 7.5, "text_encoder_2": 0.12}),
        ("hunyuanvideo-community/HunyuanVideo-I2V", {"text_encoder": 8.36, "text_encoder_2": 0.12}),
        (
            "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
            {"text_encoder": 7.07, "text_encoder_2": 0.22, "image_encoder": 0.43},
        ),
        ("Lightricks/LTX-2", {"text_encoder": 12.19, "connectors": 1.43}),
    ],
)
def test_the_encoders_of_a_listed_checkpoint_have_their_published_sizes(name, billions):
    for component, encoder in empty_encoders(name, None, billions).items():
        found = sum(weight.numel() for weight in encoder.parameters()) / 1e9
        assert found == pytest.approx(billions[component], abs=0.006), component
