"""LTX-2, text to video; without its sound."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, LTX2VideoTransformer3DModel, SchedulerMixin
from torch import Tensor, nn

from .base import FRAME_RATE, GenerationRules, module_device, unwrap
from .ltx import PIXELS_PER_LATENT, LTXFamily


# Weights of the sound, and of the attention between sound and video; marks of the keyframes of other pipelines.
_IDLE = re.compile(r"(^|\.)(audio_|video_to_audio_|video_a2v_|av_cross_attn_|keyframes_)")


@dataclass(frozen=True)
class LTX2Family(LTXFamily):
    """
    [`ModelFamily`] of `LTX2VideoTransformer3DModel`, of whose two streams the video's is trained.

    The attention between video and sound is switched off, as in one of the calls that its pipeline guides with
    (`modality_scale`), so that no sound is needed and what stands in its place changes no bit of the video.
    Embeddings of prompts are those behind the pipeline's `connectors`, and depend on `max_sequence_length`, which must
    be that of the pipeline's call (1024 if nothing is said there).
    """

    name: str = "ltx2"
    pipeline_classes: tuple[str, ...] = ("LTX2Pipeline",)
    published_prompt_tokens: int = 1024

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """24 fps, which the pipeline takes for granted if it is told no other, and sides of 32."""
        return GenerationRules(24.0, PIXELS_PER_LATENT)

    @property
    def text_encoders(self) -> dict[str, str]:
        """Gemma, and the connectors behind it, which take its hidden states and no words."""
        return {"text_encoder": "tokenizer", "connectors": ""}

    def idle_weights(self, transformer: nn.Module) -> frozenset[str]:
        """Those of the sound, and of the attention between it and the video."""
        return frozenset(name for name, _ in unwrap(transformer).named_parameters() if _IDLE.search(name))

    @torch.no_grad()
    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        """
        `prompt_embeds` `(L_i, D)` of each prompt, those that the connectors do not mask (with the registers of the
        published ones, all `max_sequence_length`), in the dtype and on the device of the connectors.

        Args:
            pipeline (`LTX2Pipeline`): Pipeline with its tokenizer, text encoder and connectors.
            prompts (`list[str]`): Prompts.
            max_sequence_length (`int`): Prompts are cut and padded to this number of tokens for the text encoder.
        """
        states, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=module_device(pipeline.text_encoder),
        )
        connectors, side = pipeline.connectors, pipeline.tokenizer.padding_side
        embeds, _, mask = connectors(states.to(connectors.dtype), mask, padding_side=side)
        return [{"prompt_embeds": embed[own].clone()} for embed, own in zip(embeds, mask.bool(), strict=True)]

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of 1024 tokens if not said otherwise."""
        length = prompt_tokens or self.published_prompt_tokens
        width, _ = _prompt_widths(unwrap(transformer).config)
        return {"prompt_embeds": (length, width), "prompt_mask": (length,), FRAME_RATE: ()}

    def _call(
        self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        base = unwrap(transformer)
        batch_size, _, frames, height, width = latents.shape
        rate = conditions[FRAME_RATE].float().view(-1, 1, 1)
        tokens = latents.to(base.dtype).flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
        _, audio_width = _prompt_widths(base.config)
        velocity = transformer(
            hidden_states=tokens,
            audio_hidden_states=tokens.new_zeros(batch_size, 1, base.config.audio_in_channels),
            encoder_hidden_states=conditions["prompt_embeds"].to(base.dtype),
            audio_encoder_hidden_states=tokens.new_zeros(batch_size, 1, audio_width),
            timestep=timesteps,
            sigma=timesteps,
            encoder_attention_mask=conditions["prompt_mask"],
            video_coords=base.rope.prepare_video_coords(batch_size, frames, height, width, tokens.device, fps=rate),
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (frames, height, width))


def _prompt_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Widths of the embeddings of prompts for video and sound: LTX-2.3 and later project them in the connectors."""
    if config["use_prompt_embeddings"]:
        return config["caption_channels"], config["caption_channels"]
    return config["cross_attention_dim"], config["audio_cross_attention_dim"]


def ltx2_family(
    transformer: LTX2VideoTransformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> LTX2Family:
    """Family of an LTX-2 transformer."""
    return LTX2Family()
