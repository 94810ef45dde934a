"""Tiny instances of the real classes. Everything is seeded and built in process: no file, no download, no mock."""

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
import torch
from datasets import Dataset, Features, List, Value, Video
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from video_trl.models import ModelFamily, family_of
from video_trl.models.base import FRAME_RATE


WORDS = "a and ball blue bounces drops falls floor green hits left on red right rolls slides swings the to".split()
PROMPTS = (
    "a red ball falls to the floor",
    "a blue ball rolls to the right",
    "the green ball bounces",
    "a red ball hits a blue ball and bounces to the left",
)
MAX_SEQUENCE_LENGTH = 16
LATENTS_SHAPE = (4, 2, 4, 4)  # (C, F, H, W) of a tiny video of 5 frames of 32 x 32 pixels
TEXT_DIM = 16
FAMILIES = ("wan-t2v", "wan-i2v", "cogvideox-t2v", "cogvideox-i2v")
COGVIDEOX_LATENTS_SHAPE = (4, 3, 4, 4)  # of 9 frames: CogVideoX wants 8k + 1
IMAGE_TOKENS = 5  # of the tiny image encoder: a class token and 2 x 2 patches


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `</s>` at the end, `<pad>` (id 0) behind it, as the tokenizer of UMT5 does."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae(seed: int = 0, **config: Any) -> AutoencoderKLWan:
    """Wan 2.1's VAE with 4 channels: 4 times in time, 8 times in height and width."""
    torch.manual_seed(seed)
    defaults = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [0.5, 1.0, 1.5, 2.0],
    }
    return AutoencoderKLWan(**(defaults | config)).eval()


def tiny_transformer(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    """Wan 2.1's transformer with 2 layers of 2 heads of 12 channels, patch (1, 2, 2)."""
    torch.manual_seed(seed)
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(defaults | config)).eval()


def tiny_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """UMT5 encoder of width 16."""
    torch.manual_seed(seed)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Text-to-video pipeline laid out as Wan 2.1's, scheduler included. A training step takes milliseconds."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _silent(
        WanPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(seed),
            vae=tiny_vae(seed),
            scheduler=scheduler,
            transformer=tiny_transformer(seed),
        )
    )


@dataclass(frozen=True)
class TinyFamily:
    """
    What the tests that run on every family need to know of one.

    Args:
        make: Its tiny pipeline, by seed.
        frames, side: Frames and pixels of a side of the smallest video that is none of an image alone.
        noisy: The noisy latents `(B, C, F, H, W)` in the keyword arguments of a transformer call of its pipeline.
        options: Of a trainer, without which it would be refused.
        call: Arguments of the pipeline's call that switch guidance off, so that each step is one transformer call.
        is_ours: Which of several calls in a step is the one that training makes, by its keyword arguments.
        of_others: Arguments of that call which do not reach the video.
    """

    make: Callable[..., DiffusionPipeline]
    frames: int = 5
    side: int = 32
    noisy: Callable[[dict[str, Any]], torch.Tensor] = lambda kwargs: kwargs["hidden_states"]
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    is_ours: Callable[[dict[str, Any]], bool] = lambda kwargs: True
    of_others: tuple[str, ...] = ()


def tiny_pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    """The tiny pipeline of one of `TINY_FAMILIES`."""
    return TINY_FAMILIES[family].make(seed)


@lru_cache
def _family_of(name: str) -> tuple[ModelFamily, ModelMixin, tuple[int, int, int, int]]:
    """Family and transformer of a tiny pipeline, neither to be changed, and the latents of its smallest video."""
    pipeline, tiny = tiny_pipeline(name), TINY_FAMILIES[name]
    family = family_of(pipeline)
    joined, side = family.compression(pipeline.vae)
    config = pipeline.transformer.config
    channels = config.out_channels or config.in_channels
    shape = (channels, (tiny.frames - 1) // joined + 1, tiny.side // side, tiny.side // side)
    return family, pipeline.transformer, shape


def tiny_latents_shape(family: str) -> tuple[int, int, int, int]:
    """(C, F, H, W) of the smallest video that is none of an image alone."""
    return _family_of(family)[2]


def tiny_wan_i2v_pipeline(seed: int = 0, image_encoder: bool = True) -> WanImageToVideoPipeline:
    """
    Image-to-video pipeline laid out as Wan 2.1's 14B: 4 channels of noisy latents, 4 of the mask, 4 of the first
    frame, and embeddings of the image; or, as the transformers of Wan 2.2's 14B, without the latter.
    """
    image = {"image_dim": TEXT_DIM, "added_kv_proj_dim": 24} if image_encoder else {}
    torch.manual_seed(seed)
    clip = CLIPVisionConfig(
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        hidden_act="gelu",
    )
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return _silent(
        WanImageToVideoPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(seed),
            vae=tiny_vae(seed),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            image_processor=CLIPImageProcessorPil(**size) if image_encoder else None,
            image_encoder=CLIPVisionModel(clip).eval() if image_encoder else None,
            transformer=tiny_transformer(seed, in_channels=12, **image),
        )
    )


def tiny_wan_ti2v_vae(seed: int = 0) -> AutoencoderKLWan:
    """Wan 2.2's residual VAE with all of its 48 channels: 4 times in time, 16 times in height and width."""
    return tiny_vae(
        seed,
        base_dim=3,
        decoder_base_dim=3,
        z_dim=48,
        latents_mean=[0.01 * channel for channel in range(48)],
        latents_std=[0.5 + 0.02 * channel for channel in range(48)],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )


def tiny_wan_a14b_pipeline(seed: int = 0) -> WanPipeline:
    """Text-to-video pipeline laid out as Wan 2.2's A14B: a transformer for high and one for low noise."""
    return _with_experts(tiny_wan_pipeline(seed), tiny_transformer(seed + 1), 0.875)


def tiny_wan_a14b_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """The same from a first frame, which reaches the transformers as latents alone."""
    return _with_experts(tiny_wan_i2v_pipeline(seed, False), tiny_transformer(seed + 1, in_channels=12), 0.9)


def _with_experts(wan: DiffusionPipeline, second: WanTransformer3DModel, boundary_ratio: float) -> Any:
    return _silent(type(wan)(**wan.components | {"transformer_2": second}, boundary_ratio=boundary_ratio))


def tiny_wan_ti2v_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """The same model in its image-to-video pipeline."""
    return tiny_wan_ti2v_pipeline(seed, WanImageToVideoPipeline)


def tiny_skyreels_pipeline(seed: int = 0) -> SkyReelsV2Pipeline:
    """Text-to-video pipeline laid out as SkyReels-V2's."""
    return _as_skyreels(tiny_wan_pipeline(seed), SkyReelsV2Pipeline, seed)


def tiny_skyreels_i2v_pipeline(seed: int = 0) -> SkyReelsV2ImageToVideoPipeline:
    """Image-to-video pipeline laid out as SkyReels-V2's."""
    return _as_skyreels(tiny_wan_i2v_pipeline(seed), SkyReelsV2ImageToVideoPipeline, seed)


def _as_skyreels(wan: DiffusionPipeline, pipeline_class: type[DiffusionPipeline], seed: int) -> Any:
    """The other parts are those of Wan 2.1."""
    names = set(inspect.signature(SkyReelsV2Transformer3DModel.__init__).parameters)
    config = {name: value for name, value in wan.transformer.config.items() if name in names}
    torch.manual_seed(seed)
    transformer = SkyReelsV2Transformer3DModel(**config).eval()
    taken = inspect.signature(pipeline_class.__init__).parameters
    parts = {name: part for name, part in wan.components.items() if name in taken}
    return _silent(pipeline_class(**parts | {"transformer": transformer}))


def tiny_wan_ti2v_pipeline(
    seed: int = 0, pipeline_class: type[WanPipeline] | type[WanImageToVideoPipeline] = WanPipeline
) -> WanPipeline | WanImageToVideoPipeline:
    """A pipeline laid out as Wan 2.2's 5B: one transformer for text and image to video, timesteps by token."""
    return _silent(
        pipeline_class(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(seed),
            vae=tiny_wan_ti2v_vae(seed),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            transformer=tiny_transformer(seed, in_channels=48, out_channels=48),
            expand_timesteps=True,
        )
    )


def tiny_cogvideox_vae(seed: int = 0, **config: Any) -> AutoencoderKLCogVideoX:
    """CogVideoX's VAE with 4 channels: 4 times in time, 8 times in height and width."""
    torch.manual_seed(seed)
    defaults = {
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_height": 32,
        "sample_width": 32,
        "scaling_factor": 0.7,
    }
    return AutoencoderKLCogVideoX(**(defaults | config)).eval()


def tiny_cogvideox_transformer(seed: int = 0, **config: Any) -> CogVideoXTransformer3DModel:
    """CogVideoX-5B's transformer (rotary positions) with 2 layers of 2 heads of 16 channels, patch 2."""
    torch.manual_seed(seed)
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT_DIM,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": MAX_SEQUENCE_LENGTH,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**(defaults | config)).eval()


def tiny_cogvideox_scheduler(**config: Any) -> CogVideoXDDIMScheduler:
    """The scheduler of the 5B checkpoints; 2B's has `snr_shift_scale=3.0`."""
    defaults = {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    }
    return CogVideoXDDIMScheduler(**(defaults | config))


def tiny_t5_encoder(seed: int = 0) -> T5EncoderModel:
    """T5 encoder of width 16."""
    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def tiny_cogvideox_pipeline(seed: int = 0, **components: Any) -> CogVideoXPipeline:
    """Text-to-video pipeline laid out as CogVideoX-5B's, scheduler included; `components` replace its own."""
    pipeline_class = components.pop("pipeline_class", CogVideoXPipeline)
    return _silent(
        pipeline_class(
            **{
                "tokenizer": tiny_tokenizer(),
                "text_encoder": tiny_t5_encoder(seed),
                "vae": tiny_cogvideox_vae(seed),
                "transformer": tiny_cogvideox_transformer(seed),
                "scheduler": tiny_cogvideox_scheduler(),
            }
            | components
        )
    )


def tiny_cogvideox_i2v_pipeline(seed: int = 0, **components: Any) -> CogVideoXImageToVideoPipeline:
    """Image-to-video pipeline laid out as CogVideoX-5B-I2V's: twice the channels, learned positions."""
    transformer = tiny_cogvideox_transformer(seed, in_channels=8, use_learned_positional_embeddings=True)
    return tiny_cogvideox_pipeline(
        seed, pipeline_class=CogVideoXImageToVideoPipeline, **({"transformer": transformer} | components)
    )


def tiny_cogvideox15_pipeline(seed: int = 0) -> CogVideoXPipeline:
    """Text-to-video pipeline laid out as CogVideoX 1.5's: latent frames in pairs."""
    return tiny_cogvideox_pipeline(seed, transformer=tiny_cogvideox_transformer(seed, patch_size_t=2))


def tiny_cogvideox15_i2v_pipeline(seed: int = 0) -> CogVideoXImageToVideoPipeline:
    """Image-to-video pipeline laid out as CogVideoX 1.5's: with one more embedding."""
    transformer = tiny_cogvideox_transformer(seed, in_channels=8, patch_size_t=2, ofs_embed_dim=16)
    return tiny_cogvideox_pipeline(seed, pipeline_class=CogVideoXImageToVideoPipeline, transformer=transformer)


def tiny_ltx_pipeline(
    seed: int = 0, pipeline_class: type[LTXPipeline] | type[LTXImageToVideoPipeline] = LTXPipeline
) -> LTXPipeline | LTXImageToVideoPipeline:
    """A pipeline laid out as LTX-Video's: 8 times in time, 32 times in height and width, one token a latent pixel."""
    torch.manual_seed(seed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
    ).eval()
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_DIM,
    ).eval()
    return _silent(
        pipeline_class(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
            vae=vae,
            text_encoder=tiny_t5_encoder(seed),
            tokenizer=tiny_tokenizer(),
            transformer=transformer,
        )
    )


def tiny_ltx_i2v_pipeline(seed: int = 0) -> LTXImageToVideoPipeline:
    """The same model in its image-to-video pipeline."""
    return tiny_ltx_pipeline(seed, LTXImageToVideoPipeline)


def tiny_hunyuan_pipeline(seed: int = 0, **config: Any) -> HunyuanVideoPipeline:
    """Text-to-video pipeline laid out as HunyuanVideo's: two text encoders, blocks of two kinds, embedded guidance."""
    ids = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(seed)
    llama = LlamaConfig(hidden_size=TEXT_DIM, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, **ids)
    clip = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, projection_dim=8, **ids
    )
    text_encoder, text_encoder_2 = LlamaModel(llama).eval(), CLIPTextModel(clip).eval()
    torch.manual_seed(seed)
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    transformer = HunyuanVideoTransformer3DModel(**(defaults | config)).eval()
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()
    return _silent(
        HunyuanVideoPipeline(
            text_encoder=text_encoder,
            tokenizer=tiny_tokenizer(),
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=text_encoder_2,
            tokenizer_2=tiny_tokenizer(),
        )
    )


def tiny_llava_tokenizer() -> PreTrainedTokenizerFast:
    """
    One token a word, as far as the template of HunyuanVideo's image-to-video pipeline allows: that counts on its
    marks, on the image being the sixth token and on a prompt beginning with the 104th.
    """
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "\n\n"]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = [pre_tokenizers.Whitespace(), pre_tokenizers.Split("ships", "isolated")]  # "relationships" are two tokens
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="</s>", unk_token="<unk>", model_max_length=256
    )


def tiny_hunyuan_i2v_pipeline(seed: int = 0) -> HunyuanVideoImageToVideoPipeline:
    """Image-to-video pipeline laid out as HunyuanVideo's: LLaVA reads the prompt and 24 x 24 patches of the image."""
    parts = tiny_hunyuan_pipeline(seed, image_condition_type="token_replace").components
    tokenizer = tiny_llava_tokenizer()
    llama = LlamaConfig(**parts["text_encoder"].config.to_dict() | {"vocab_size": len(tokenizer)})
    clip = CLIPVisionConfig(
        hidden_size=TEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(seed)
    llava = LlavaConfig(text_config=llama, vision_config=clip, image_token_index=image, pad_token_id=0)
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    own = {
        "text_encoder": LlavaForConditionalGeneration(llava).eval(),
        "tokenizer": tokenizer,
        "image_processor": CLIPImageProcessorPil(**size),
    }
    return _silent(HunyuanVideoImageToVideoPipeline(**parts | own))


def tiny_hunyuan15_pipeline(seed: int = 0, task: str = "t2v") -> HunyuanVideo15Pipeline:
    """
    A pipeline laid out as HunyuanVideo-1.5's: words in a chat of 108 tokens, quoted ones as bytes, tokens of images.
    Prompts of 16 tokens, of which the published one has 1000, are an attribute that no file keeps.
    """
    tokenizer = tiny_tokenizer()
    last = "{% for message in messages %}{% if loop.last %}{{ message['content'] }}{% endif %}{% endfor %}"
    tokenizer.chat_template = "{{ 'a ' * 108 }}" + last
    torch.manual_seed(seed)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=TEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    byt5 = T5Config(
        vocab_size=384, d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    siglip = SiglipVisionConfig(
        hidden_size=TEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text_encoders = {"text_encoder": Qwen2_5_VLTextModel(qwen).eval(), "text_encoder_2": T5EncoderModel(byt5).eval()}
    image_encoder = SiglipVisionModel(siglip).eval()
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=TEXT_DIM,
        image_embed_dim=TEXT_DIM,
        rope_axes_dim=(2, 2, 4),
        target_size=32,
        task_type=task,
    ).eval()
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16, 16, 16), layers_per_block=1, spatial_compression_ratio=8
    ).eval()
    image: dict[str, Any] = {}
    if task == "i2v":
        processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        image = {"image_encoder": image_encoder, "feature_extractor": processor}
    pipeline_class = HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline
    pipeline = pipeline_class(
        **text_encoders,
        **image,
        tokenizer=tokenizer,
        tokenizer_2=ByT5Tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )
    pipeline.tokenizer_max_length = MAX_SEQUENCE_LENGTH
    return _silent(pipeline)


def tiny_hunyuan15_i2v_pipeline(seed: int = 0) -> HunyuanVideo15ImageToVideoPipeline:
    """The same from a first frame."""
    return tiny_hunyuan15_pipeline(seed, "i2v")


def tiny_ltx2_pipeline(seed: int = 0) -> LTX2Pipeline:
    """A pipeline laid out as LTX-2's: a stream of sound beside that of the video, and connectors behind Gemma."""
    ids = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    text = {
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 2, "boi_token_index": 2, "eoi_token_index": 2}
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    torch.manual_seed(seed)
    gemma = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text | ids, vision_config=vision, **tokens)).eval()
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": 8}
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        **{f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in connector.items()},
    ).eval()
    torch.manual_seed(seed)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=TEXT_DIM,
    ).eval()
    torch.manual_seed(seed)
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,  # by itself it counts stages that shrink the time alone
        temporal_compression_ratio=8,
    ).eval()
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    ).eval()
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    ).eval()
    return _silent(
        LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
            vae=vae,
            audio_vae=audio_vae,
            text_encoder=gemma,
            tokenizer=tokenizer,
            connectors=connectors,
            transformer=transformer,
            vocoder=vocoder,
        )
    )


def tiny_video(seed: int, num_frames: int = 5, height: int = 32, width: int = 32) -> np.ndarray:
    """A falling square on a plain background, uint8 `(T, H, W, 3)`; its colours and column depend on the seed."""
    generator = np.random.default_rng(seed)
    video = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    video[:] = generator.integers(0, 96, 3)
    colour, side = generator.integers(128, 256, 3), max(height // 4, 1)
    left = int(generator.integers(0, max(width - side, 1)))
    for frame in range(num_frames):
        top = (height - side) * frame // max(num_frames - 1, 1)
        video[frame, top : top + side, left : left + side] = colour
    return video


def tiny_mp4(seed: int, fps: int = 8, **size: int) -> bytes:
    """The `tiny_video` of a seed as the bytes of a real mp4 file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = tiny_video(seed, **size)
        options = {"crf": "12", "threads": "1", "x264-params": "cpu-independent=1"}  # as `write_video` does
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def tiny_group_dataset(n: int = 4, m: int = 3, seed: int = 0, **size: int) -> Dataset:
    """Raw group rows: one chosen and `m` rejected mp4 files each, and the rejected ones' judge scores."""
    generator = np.random.default_rng(seed)
    video = Video(decode=False)
    features = Features(
        {
            "prompt": Value("string"),
            "chosen": video,
            "rejected": List(video),
            "rejected_scores": List({"sa": Value("float32"), "pc": Value("float32")}),
        }
    )
    rows = []
    for row in range(n):
        files = [{"path": None, "bytes": tiny_mp4(seed + row * (m + 1) + k, **size)} for k in range(m + 1)]
        scores = [{"sa": sa, "pc": pc} for sa, pc in generator.uniform(0, 1, (m, 2)).tolist()]
        prompt = PROMPTS[row % len(PROMPTS)]
        rows.append({"prompt": prompt, "chosen": files[0], "rejected": files[1:], "rejected_scores": scores})
    return Dataset.from_list(rows, features=features)


def tiny_encoded_group(
    n: int = 4, m: int = 3, seed: int = 0, latents_shape: Sequence[int] | None = None, family: str = "wan-t2v"
) -> list[dict[str, Any]]:
    """Encoded group rows of random numbers, the keys and shapes of `EncodedDataset`, for one of `FAMILIES`."""
    generator = torch.Generator().manual_seed(seed)
    latents_shape = latents_shape or tiny_latents_shape(family)
    rows = []
    for row in range(n):
        prompt = PROMPTS[row % len(PROMPTS)]
        of_family, transformer, _ = _family_of(family)
        length, width = of_family.condition_shapes(transformer, latents_shape, MAX_SEQUENCE_LENGTH)["prompt_embeds"]
        if (
            "image_embeds" in of_family.row_columns or of_family.prompt_length(transformer) is None
        ):  # stored without the padding
            length = len(prompt.split()) + 1
        rows.append(
            {
                "prompt": prompt,
                "chosen_latents": torch.randn(*latents_shape, generator=generator),
                "rejected_latents": torch.randn(m, *latents_shape, generator=generator),
                "prompt_embeds": torch.randn(length, width, generator=generator),
                "rejected_scores": torch.rand(m, 2, generator=generator),
            }
            | _tiny_conditions(family, latents_shape, generator)
        )
    return rows


def _tiny_conditions(name: str, latents_shape: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
    """What rows carry besides videos and their first embedding of the prompt."""
    family, transformer, _ = _family_of(name)
    shapes = family.condition_shapes(transformer, latents_shape, MAX_SEQUENCE_LENGTH)
    shapes |= {"image_embeds": (IMAGE_TOKENS, TEXT_DIM)} if "image_embeds" in shapes else {}
    columns = [column for column in family.row_columns[1:] if column != FRAME_RATE]
    rate = {FRAME_RATE: torch.tensor(8.0)} if FRAME_RATE in family.row_columns else {}
    return {column: torch.randn(*shapes[column], generator=generator) for column in columns} | rate


def tiny_encoded_video(
    n: int = 4, seed: int = 0, latents_shape: Sequence[int] | None = None, family: str = "wan-t2v"
) -> list[dict[str, Any]]:
    """Encoded video rows: the chosen side of `tiny_encoded_group`."""
    names = {"chosen_latents": "latents"}
    left_out = ("rejected_latents", "rejected_scores")
    rows = tiny_encoded_group(n, 1, seed, latents_shape, family)
    return [{names.get(key, key): value for key, value in row.items() if key not in left_out} for row in rows]


def _unpacked(tokens: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Tokens `(B, N, C)` as latents."""
    return tokens.transpose(1, 2).unflatten(2, (kwargs["num_frames"], kwargs["height"], kwargs["width"]))


TINY_FAMILIES: dict[str, TinyFamily] = {
    "wan-t2v": TinyFamily(tiny_wan_pipeline),
    "wan-i2v": TinyFamily(tiny_wan_i2v_pipeline, noisy=lambda kwargs: kwargs["hidden_states"][:, :4]),
    "cogvideox-t2v": TinyFamily(
        tiny_cogvideox_pipeline, frames=9, noisy=lambda kwargs: kwargs["hidden_states"].transpose(1, 2)
    ),
    "cogvideox-i2v": TinyFamily(
        tiny_cogvideox_i2v_pipeline, frames=9, noisy=lambda kwargs: kwargs["hidden_states"].transpose(1, 2)[:, :4]
    ),
    "wan-a14b-t2v": TinyFamily(tiny_wan_a14b_pipeline, options={"expert": "high_noise"}),
    "wan-a14b-i2v": TinyFamily(
        tiny_wan_a14b_i2v_pipeline,
        noisy=lambda kwargs: kwargs["hidden_states"][:, :4],
        options={"expert": "high_noise"},
    ),
    "wan-5b-t2v": TinyFamily(tiny_wan_ti2v_pipeline, side=64),
    "wan-5b-i2v": TinyFamily(tiny_wan_ti2v_i2v_pipeline, side=64),
    "skyreels-t2v": TinyFamily(tiny_skyreels_pipeline),
    "skyreels-i2v": TinyFamily(tiny_skyreels_i2v_pipeline, noisy=lambda kwargs: kwargs["hidden_states"][:, :4]),
    "cogvideox1.5-t2v": TinyFamily(
        tiny_cogvideox15_pipeline, frames=9, noisy=lambda kwargs: kwargs["hidden_states"].transpose(1, 2)
    ),
    "cogvideox1.5-i2v": TinyFamily(
        tiny_cogvideox15_i2v_pipeline,
        frames=9,
        noisy=lambda kwargs: kwargs["hidden_states"].transpose(1, 2)[:, :4],
    ),
    "ltx-t2v": TinyFamily(
        tiny_ltx_pipeline,
        frames=9,
        side=64,
        noisy=lambda kwargs: _unpacked(kwargs["hidden_states"], kwargs),
        call={"guidance_scale": 1.0, "frame_rate": 8.0},
    ),
    "ltx-i2v": TinyFamily(
        tiny_ltx_i2v_pipeline,
        frames=9,
        side=64,
        noisy=lambda kwargs: _unpacked(kwargs["hidden_states"], kwargs),
        call={"guidance_scale": 1.0, "frame_rate": 8.0},
    ),
    "hunyuan-t2v": TinyFamily(tiny_hunyuan_pipeline, call={}),
    "hunyuan-i2v": TinyFamily(tiny_hunyuan_i2v_pipeline, call={"guidance_scale": 6.0}),  # its default is 1
    "hunyuan1.5-t2v": TinyFamily(
        tiny_hunyuan15_pipeline, noisy=lambda kwargs: kwargs["hidden_states"][:, :4], call={}
    ),
    "hunyuan1.5-i2v": TinyFamily(
        tiny_hunyuan15_i2v_pipeline, noisy=lambda kwargs: kwargs["hidden_states"][:, :4], call={}
    ),
    "ltx2-t2v": TinyFamily(
        tiny_ltx2_pipeline,
        frames=9,
        side=64,
        noisy=lambda kwargs: _unpacked(kwargs["hidden_states"], kwargs),
        # Of the guidances only that by the video alone is on, whose call is the one that training makes.
        call={
            "guidance_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "stg_scale": 0.0,
            "modality_scale": 2.0,
            "guidance_rescale": 0.0,
            "frame_rate": 8.0,
        },
        is_ours=lambda kwargs: kwargs["isolate_modalities"],
        of_others=("audio_hidden_states", "audio_encoder_hidden_states", "audio_num_frames"),
    ),
}
"""Every family, by the name that its tests have. A new one is an entry here."""
