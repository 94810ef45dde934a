"""Tiny random instances of the teachers' real classes, with biases that are not zero, and videos for them."""

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
)


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """All weights anew and none special: a fresh model's zero biases and unit norms would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def videomae(**config) -> VideoMAEModel:
    defaults = {"image_size": 32, "patch_size": 8, "num_frames": 4, "intermediate_size": 48, "layer_norm_eps": 1e-6}
    return randomise(VideoMAEModel(VideoMAEConfig(**SIZES, **(defaults | config))))


def videomae_with_decoder() -> VideoMAEForPreTraining:
    decoder = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        intermediate_size=48,
        decoder_intermediate_size=48,
        **SIZES,
        **decoder,
    )
    return randomise(VideoMAEForPreTraining(config))


def vjepa2(**config) -> VJEPA2Model:
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    defaults = {"patch_size": 8, "crop_size": 32, "frames_per_clip": 4, "mlp_ratio": 2.0}
    return randomise(VJEPA2Model(VJEPA2Config(**SIZES, **predictor, **(defaults | config))))


def dinov2() -> Dinov2Model:
    return randomise(Dinov2Model(Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **SIZES)))


def dinov2_with_registers() -> Dinov2WithRegistersModel:
    config = Dinov2WithRegistersConfig(image_size=28, patch_size=14, mlp_ratio=2, num_register_tokens=3, **SIZES)
    return randomise(Dinov2WithRegistersModel(config))


def dinov3() -> DINOv3ViTModel:
    config = DINOv3ViTConfig(image_size=32, patch_size=16, intermediate_size=48, num_register_tokens=4, **SIZES)
    return randomise(DINOv3ViTModel(config))


def video(num_frames: int, height: int = 32, width: int = 32, batch_size: int = 2, seed: int = 0) -> Tensor:
    """float `(B, T, 3, H, W)` in [0, 1]."""
    return torch.rand(batch_size, num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
