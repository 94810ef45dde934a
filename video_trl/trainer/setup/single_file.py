"""Load the transformer of a pipeline from one file: as ComfyUI or its original code have it, or quantised as GGUF."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import GGUFQuantizationConfig, ModelMixin
from diffusers.loaders import single_file_model
from safetensors import SafetensorError, safe_open

from ...load import DTYPE_OPTION
from ...models import TRANSFORMERS


SAFETENSORS, GGUF = ".safetensors", ".gguf"
_WAY_OUT = "Give the file of that model, whole."
# Names of tensors by which files of ComfyUI scale weights in 8 bits; diffusers would take such weights unscaled.
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale")


def check_transformer_file(file: str, *, use_peft: bool, quantization: str | None) -> None:
    """
    Check a file of weights as far as its name and the options go, before anything is loaded.

    Raises:
        ValueError: If there is no such file, it is of another kind, its weights are quantised and would be trained, or
            the package that reads it is not installed.
    """
    path = Path(file)
    if path.suffix not in (SAFETENSORS, GGUF):
        raise ValueError(f"`transformer_file` must end in {SAFETENSORS} or {GGUF}, got {file!r}.")
    if not path.is_file():
        raise ValueError(
            f"`transformer_file`: there is no file {file!r}. Download it first, for instance with "
            "`hf download <repository> <file> --local-dir .`."
        )
    if quantization is not None:
        raise ValueError(
            f"`quantization={quantization!r}` is applied to the weights of the pipeline, and `transformer_file` "
            "replaces them. Leave one unset; a GGUF file has its weights in few bits already."
        )
    if path.suffix != GGUF:
        return
    if not use_peft:
        raise ValueError(
            f"The weights in {file!r} are quantised, and `use_peft=False` would train them: an update is smaller than "
            "a rounding. Train an adapter (`use_peft=True`), or give a .safetensors file."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file!r} needs the package gguf, which is not installed: pip install 'video-trl[gguf]'.")


def load_transformer_file(
    file: str, class_name: str, pipeline: str, component: str, dtype: torch.dtype, options: Mapping[str, Any]
) -> ModelMixin:
    """
    A transformer with the configuration that it has in a pipeline, and the weights of a file.

    Args:
        file (`str`): Weights that `check_transformer_file` has accepted, named as in diffusers, ComfyUI or the
            original code.
        class_name (`str`): Class of the transformer.
        pipeline (`str`): Repository id or path of a pipeline in diffusers layout, whose configuration is read.
        component (`str`): What the pipeline calls the transformer.
        dtype (`torch.dtype`): Of the weights; of a GGUF file, of those that are not quantised, and of products.
        options (`Mapping`): Of `from_pretrained`: `revision`, `token`, `cache_dir` and `local_files_only` count here.

    Raises:
        ValueError: If diffusers reads no single file for this class, or the file is not whole, not one of this
            transformer, or scales weights in a way that diffusers does not read.
    """
    kind: Any = TRANSFORMERS[class_name]
    if class_name not in single_file_model.SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(
            f"`transformer_file={file!r}`: diffusers converts no single file of a {class_name}. Use a repository or "
            "folder in diffusers layout as the model and leave the option unset; your own weights, saved by "
            "`transformer.save_pretrained`, go into its folder `transformer`."
        )
    if Path(file).suffix == SAFETENSORS:
        _check_scales(file)
        quantization = None
    else:
        quantization = GGUFQuantizationConfig(compute_dtype=dtype)
    hub = {name: options[name] for name in ("token", "cache_dir", "local_files_only") if name in options}
    other = f"{file!r} is not the `{component}` of {pipeline!r}, a {class_name}"
    with _unused_weights() as unused:
        try:
            transformer = kind.from_single_file(
                file,
                config=pipeline,
                subfolder=component,
                config_revision=options.get("revision"),
                quantization_config=quantization,
                **{DTYPE_OPTION: None if quantization is None else dtype},
                **hub,
            )
        except NotImplementedError as error:  # of a weight without contents
            raise ValueError(
                f"{other}: some of its weights are missing. Give the file of that model, whole."
            ) from error
        except Exception as error:  # whatever a converter meets in names and shapes that it does not expect
            raise ValueError(
                f"{other} ({type(error).__name__}: {error}). Give the file of that model, whole."
            ) from error
    if unused:
        raise ValueError(f"{other}: {len(unused)} weights, such as {unused[0]!r}, have no place there. {_WAY_OUT}")
    if quantization is None:
        _cast(transformer, dtype)
    return transformer


def _cast(transformer: ModelMixin, dtype: torch.dtype) -> None:
    """To the dtypes that `from_pretrained` gives; `from_single_file` would round what is to stay in float32."""
    exact = set(transformer._keep_in_fp32_modules or ())
    for name, weight in transformer.named_parameters():
        weight.data = weight.data.to(torch.float32 if exact & set(name.split(".")) else dtype)


def _check_scales(file: str) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            scales = [name for name in tensors.keys() if name.endswith(_SCALES)]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file!r} is not a whole safetensors file ({error}). Download it again.") from error
    if scales:
        raise ValueError(
            f"{file!r} keeps weights in 8 bits with scales ({scales[0]!r}, ...), which diffusers does not read: they "
            "would be taken unscaled. Give a file in bfloat16 or float16, or a GGUF file."
        )


@contextmanager
def _unused_weights() -> Iterator[list[str]]:
    """Names of weights in a file that have no place in the model, of which diffusers says no more than a log line."""
    names: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            names.extend(record.getMessage().partition("\n")[2].strip(" []'").split(", "))

    note, logger = Note(logging.WARNING), single_file_model.logger
    note.addFilter(lambda record: "were not used" in record.getMessage())
    level = logger.level
    logger.addHandler(note)
    logger.setLevel(logging.WARNING)
    try:
        yield names
    finally:
        logger.removeHandler(note)
        logger.setLevel(level)
