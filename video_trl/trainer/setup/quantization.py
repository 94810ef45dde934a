"""Quantise the frozen weights under an adapter, for policy and reference alike."""

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from torch import Tensor, nn


Quantization = Literal["nf4", "int8", "fp8"]

_LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
# Optimizers by transformers' names, and the library beside torch that each needs.
_OPTIMIZERS: dict[str, str | None] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), "bitsandbytes"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), "bitsandbytes"),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), "bitsandbytes"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), "bitsandbytes"),
}
# Everything outside the blocks, by families: a hundredth of the weights, and the first and last word on every number.
_NOT_QUANTIZED = (
    "condition_embedder",
    "context_embedder",
    "context_embedder_2",
    "image_embedder",
    "x_embedder",
    "time_text_embed",
    "time_embed",
    "caption_projection",
    "proj_in",
    "patch_embedding",
    "patch_embed",
    "time_embedding",
    "ofs_embedding",
    "norm_out",
    "proj_out",
)


def check_quantization(kind: Quantization, *, use_peft: bool) -> None:
    """
    Check that weights can be quantised here, before any is loaded.

    Raises:
        ValueError: If all weights are to be trained, or the library, or a GPU that it needs, is not there.
    """
    if not use_peft:
        raise ValueError(
            f"`quantization={kind!r}` rounds weights that `use_peft=False` would train: an update is smaller than a "
            "rounding. Train an adapter (`use_peft=True`), or leave `quantization` unset."
        )
    library = _LIBRARIES[kind]
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"`quantization={kind!r}` needs the package {library}, which is not installed: "
            "pip install 'video-trl[quantization]'."
        )
    if kind == "nf4" and not torch.accelerator.is_available():
        raise ValueError(
            "`quantization='nf4'` needs a GPU: diffusers quantises with bitsandbytes there only. On a CPU use 'int8' "
            "or 'fp8'."
        )


def check_quantised_engine(kind: Quantization | None, engine: str) -> None:
    """Raise a `ValueError` if weights are to be quantised, and divided among processes too."""
    if kind is not None and engine != "ddp":
        raise ValueError(
            f"`quantization={kind!r}` is supported with every process holding the weights (engine 'ddp'), got the "
            f"engine '{engine}'. Drop one of the two."
        )


def check_optimizer(name: str) -> None:
    """
    Raise a `ValueError` if `optim` of the configuration is not known to train, save and resume as it should, or
    keeps its states by a library that is not installed.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(
            f"`optim={name!r}` is not supported: it is not known to train and resume an adapter to the same numbers. "
            f"Use one of {', '.join(map(repr, _OPTIMIZERS))}, or pass an optimizer of your own as `optimizers`."
        )
    library = _OPTIMIZERS[name]
    if library is not None and importlib.util.find_spec(library) is None:
        extra = "'video-trl[quantization]'" if library in _LIBRARIES.values() else library
        raise ValueError(f"`optim={name!r}` needs the package {library}, which is not installed: pip install {extra}.")


def quantization_config(
    kind: Quantization, dtype: torch.dtype, component: str = "transformer"
) -> PipelineQuantizationConfig:
    """
    How diffusers is to quantise the blocks of the transformer while it loads a pipeline, and nothing else.

    Args:
        kind (`str`): `"nf4"`: 4 bits, in blocks of 64 with double quantisation (QLoRA's), by bitsandbytes. `"int8"`
            and `"fp8"`: 8 bits (e4m3) with a scale a row, by torchao. Weights are brought back to `dtype` where they
            are multiplied.
        dtype (`torch.dtype`): Of the computation.
        component (`str`, defaults to `"transformer"`): The transformer, as the pipeline calls it.
    """
    config: BitsAndBytesConfig | TorchAoConfig
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(_NOT_QUANTIZED),
        )
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        weights = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
        config = TorchAoConfig(weights, modules_to_not_convert=list(_NOT_QUANTIZED))
    return PipelineQuantizationConfig(quant_mapping={component: config})


def quantised_layers(transformer: nn.Module) -> Iterator[nn.Linear]:
    """The frozen linear layers that `quantization_config` quantises, of any transformer, quantised or not."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            if not any(part in _NOT_QUANTIZED for part in name.split(".")):
                yield module


def quantised_bytes(kind: Quantization, layer: nn.Linear) -> int:
    """Bytes of a layer's weight once it is quantised."""
    numbers, rows = layer.weight.numel(), layer.out_features
    # nf4: a byte of scale for 64 weights, and four bytes for 256 of those.
    return int(numbers * (0.5 + 1 / 64 + 4 / (64 * 256))) if kind == "nf4" else numbers + 4 * rows


def unpacking_bytes(kind: Quantization, layer: nn.Linear) -> int:
    """Bytes that are alive for a moment while a layer's weight is brought back to what it was, as libraries do it."""
    copies = {"nf4": 1, "int8": 3, "fp8": 5}  # torchao multiplies by the scale in float32
    return copies[kind] * layer.weight.nbytes


def keep_weights_quantised(transformer: nn.Module) -> None:
    """
    Let no linear layer hold its weight in full precision from the forward to the backward pass.

    torchao's own product, and diffusers' of a GGUF file, save the weight as it was multiplied, so that in the backward
    pass all layers would be there a second time, in the precision of the computation; bitsandbytes' does not.
    """
    for module in transformer.modules():
        if type(module) is nn.Linear and _by_torchao(module.weight):
            module.__class__ = _QuantisedLinear
        elif isinstance(module, nn.Linear) and _is_gguf(module.weight):
            module.__class__ = _GGUFLinear


class _QuantisedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler decides by itself what it computes again
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)


class _GGUFLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return _Product.apply(inputs, self.weight, bias)


class _Product(torch.autograd.Function):
    """The product with a frozen weight, which is brought back to full precision once more for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, inputs.dtype
        return F.linear(inputs, plain(weight).to(inputs.dtype) if _is_gguf(weight) else weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient @ plain(ctx.weight).to(gradient.dtype)).to(ctx.dtype), None, None


def plain(weight: Tensor) -> Tensor:
    """A weight that a library keeps quantised inside of it, as ordinary numbers; any other as it is."""
    if _is_gguf(weight):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor  # of an optional package

        return dequantize_gguf_tensor(weight)
    return weight.data.dequantize() if _by_torchao(weight) else weight.detach()


def _is_gguf(weight: Tensor) -> bool:
    return type(weight).__name__ == "GGUFParameter"


def _by_torchao(weight: Tensor) -> bool:
    return type(weight.data).__module__.startswith("torchao.")
