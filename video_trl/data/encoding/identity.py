"""What encoders and tokenizers are: all that their numbers depend on beside weights, for the names of caches."""

import json
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# Attributes of modules that change no number: where weights came from, and what concerns training.
_WITHOUT_EFFECT = ("training", "gradient_checkpointing", "name_or_path")
_OF_ADAPTERS = ("_disable_adapters", "_active_adapter")  # PEFT's, which do, and whose names look private


def module_settings(module: nn.Module) -> dict[str, Any]:
    """
    Class and plain attributes of a module and of all modules in it, which its `config` need not say: tiling, slicing,
    the scale of an adapter; and the names of hooks on them and of functions in place of methods. Made for JSON.
    """
    return {
        name: [
            type(part).__qualname__,
            {key: _plain(value) for key, value in sorted(vars(part).items()) if _counts(key) and _is_plain(value)},
            *_code_of(part),
        ]
        for name, part in module.named_modules()
    }


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary and rules of a tokenizer, and on which side it cuts and fills. Made for JSON."""
    settings = {
        "class": type(tokenizer).__name__,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        "special_tokens": tokenizer.special_tokens_map,
    }
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return {**settings, "vocabulary": tokenizer.get_vocab()}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call has left there.
    return {**settings, "rules": {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}}


def _code_of(part: nn.Module) -> list[str]:
    """What runs beside the class's own code, by name."""
    own = [value for key, value in sorted(vars(part).items()) if _counts(key) and callable(value)]
    code = [*part._forward_pre_hooks.values(), *part._forward_hooks.values(), *own]
    named = (FunctionType, MethodType, type)
    return [f"{(each if isinstance(each, named) else type(each)).__qualname__}" for each in code]


def _counts(name: str) -> bool:
    return name in _OF_ADAPTERS or not (name.startswith("_") or name in _WITHOUT_EFFECT)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else value
