"""
The sandbox's text-to-video pipeline: the real diffusers Wan classes at a size that two CPU cores can train.

`build_pipeline` makes it with fresh weights (what `train_base` trains); `load_sandbox` loads the weights that are
shipped with the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ..judge.judge import SandboxJudge
from ..world.prompts import BASE_MOTIONS, MOTIONS, STILL_SCENES, all_prompts
from ..world.simulate import FPS, HEIGHT, NUM_FRAMES, WIDTH


PIPELINE_PATH = Path(__file__).parents[1] / "assets" / "pipeline"

LATENT_CHANNELS = 16
MAX_PROMPT_TOKENS = 24  # the longest sentence has 17 words and an end mark
FLOW_SHIFT = 3.0  # as Wan2.1 ships for 480p


@dataclass(frozen=True)
class Sandbox:
    """
    Everything a first run needs, without a download.

    Attributes:
        pipeline: text-to-video pipeline in float32 on the CPU.
        judge: scores its videos.
        train_prompts, heldout_prompts: sentences of its motions; the held-out ones use paraphrases that nothing was
            trained on.
        call_kwargs: pass these to `pipeline(prompt, **call_kwargs)`: the size, steps and guidance it was trained for.
    """

    pipeline: WanPipeline
    judge: SandboxJudge
    train_prompts: list[str]
    heldout_prompts: list[str]
    call_kwargs: Mapping[str, Any] = field(default_factory=lambda: dict(CALL_KWARGS))


CALL_KWARGS: dict[str, Any] = {
    "num_frames": NUM_FRAMES,
    "height": HEIGHT,
    "width": WIDTH,
    "num_inference_steps": 12,
    "guidance_scale": 2.0,
    "max_sequence_length": MAX_PROMPT_TOKENS,
}


def load_sandbox(path: str | Path = PIPELINE_PATH) -> Sandbox:
    """
    Loads the shipped pipeline, its judge and its prompts. Nothing is downloaded.

    Args:
        path: folder in diffusers layout; another one than the shipped is what `train_base` wrote.

    Raises:
        ValueError: no pipeline in `path`.
    """
    if not (Path(path) / "model_index.json").is_file():
        raise ValueError(
            f"Expected a diffusers pipeline in {path}, found no model_index.json. The package ships one; "
            f"to make your own run `python -m video_trl.sandbox.weights.train_base --work DIR --output DIR2` and "
            f"pass DIR2."
        )
    pipeline = WanPipeline.from_pretrained(path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    train, heldout = all_prompts("train", BASE_MOTIONS), all_prompts("heldout", BASE_MOTIONS)
    return Sandbox(pipeline, SandboxJudge(fps=FPS), train, heldout)


def build_pipeline() -> WanPipeline:
    """The pipeline with fresh weights, drawn from torch's global generator."""
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=64,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=build_vae().eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def build_vae() -> AutoencoderKLWan:
    """A causal video autoencoder of Wan's kind: 4x in time, 8x in space (2x of it by patches, as in Wan2.2)."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the sandbox's sentences, lower case, without punctuation, closed by `</s>`."""
    sentences = all_prompts("train", MOTIONS + STILL_SCENES)
    words = sorted({word.strip(".,").lower() for sentence in sentences for word in sentence.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_PROMPT_TOKENS,
    )
