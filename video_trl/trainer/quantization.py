"""Keep the frozen weights under an adapter in few bits. Policy and reference share them, so that both round alike."""

import importlib.util
from typing import Literal

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from torch import Tensor


Quantization = Literal["nf4", "int8", "fp8"]

_LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
# Everything outside the blocks, by families: a hundredth of the weights, and the first and last word on every number.
_NOT_QUANTIZED = (
    "condition_embedder",
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


def check_optimizer(name: str) -> None:
    """Raise a `ValueError` if `optim` of the configuration keeps its states by a library that is not installed."""
    if name in ("adamw_torch_8bit", "adamw_torch_4bit"):
        library = "torchao"
    elif any(part in name for part in ("8bit", "bnb", "paged")):
        library = "bitsandbytes"
    else:
        return
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"`optim={name!r}` needs the package {library}, which is not installed: "
            "pip install 'video-trl[quantization]'."
        )


def quantization_config(kind: Quantization, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """
    How diffusers is to quantise the blocks of the transformer while it loads a pipeline, and nothing else.

    Args:
        kind (`str`): `"nf4"`: 4 bits, in blocks of 64 with double quantisation (QLoRA's), by bitsandbytes. `"int8"`
            and `"fp8"`: 8 bits (e4m3) with a scale a row, by torchao. Weights are brought back to `dtype` where they
            are multiplied.
        dtype (`torch.dtype`): Of the computation.
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
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def plain(weight: Tensor) -> Tensor:
    """A weight that a library keeps quantised inside of it, as ordinary numbers; any other as it is."""
    quantised = type(weight.data).__module__.startswith("torchao.")
    return weight.data.dequantize() if quantised else weight.detach()
