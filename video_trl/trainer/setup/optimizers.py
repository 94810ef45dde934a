"""Optimizers by the name of their class, of any package that is installed."""

import ast
import copy
import importlib
import re
from typing import Any

import torch
from torch import nn
from transformers import Trainer


_PATH = re.compile(r"(?P<module>\w+(\.\w+)*)[.:](?P<name>\w+)")


def check_class_path(path: str) -> None:
    """
    Raise a `ValueError` if `optim_class` names no optimizer, or one whose weights are not those to save.

    Args:
        path (`str`): `package.Class` or `package.module:Class`.
    """
    _optimizer_class(path)


def optimizer_and_options(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """
    The optimizer of a configuration, as `transformers.Trainer.get_optimizer_cls_and_kwargs` returns it.

    Args:
        args: A `VideoConfig`.
        model (`torch.nn.Module`, *optional*): What is trained; some of transformers' optimizers look at it.

    Returns:
        `tuple`: Its class, and keyword arguments for it.

    Raises:
        ValueError: `optim_class` names no optimizer, or `optim_args` are not `name=value,name=value`.
    """
    if args.optim_class is None:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    return _optimizer_class(args.optim_class), {"lr": args.learning_rate, **_options(args.optim_args or "")}


def unread_options(args: Any) -> list[str]:
    """Names in `optim_args` that transformers' optimizer of `optim` does not look at: no other value changes it."""

    def made(text: str) -> Any:
        tried = copy.copy(args)
        tried.optim_args = text
        return Trainer.get_optimizer_cls_and_kwargs(tried)

    names = [pair.partition("=")[0].strip() for pair in (args.optim_args or "").split(",") if pair.strip()]
    return [name for name in names if args.optim_class is None and made(f"{name}=0") == made(f"{name}=1")]


def _optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"`optim_class` must be a class with its module, such as 'torch.optim.Muon', got {path!r}.")
    module, name = match["module"], match["name"]
    try:
        kind = vars(importlib.import_module(module)).get(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`optim_class={path!r}`: there is no module {error.name!r}. Install its package: pip install "
            f"{module.partition('.')[0]}."
        ) from error
    if kind is None:
        version = vars(importlib.import_module(module.partition(".")[0])).get("__version__", "that is installed")
        raise ValueError(
            f"`optim_class={path!r}`: {module} has no {name!r} in the version {version}. Check the name, or update it."
        )
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(f"`optim_class={path!r}` must be a class of optimizers, got {kind!r}.")
    if "schedulefree" in path.lower():
        raise ValueError(
            f"`optim_class={path!r}` is not supported: between steps the weights of schedule-free optimizers are not "
            "those to evaluate and save. Use another one with a schedule."
        )
    return kind


def _options(text: str) -> dict[str, Any]:
    """`name=value,name=value` with Python's constants as values."""
    try:
        (call,) = [node.value for node in ast.parse(f"f({text})").body if isinstance(node, ast.Expr)]
        assert isinstance(call, ast.Call) and not call.args
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(
            f"`optim_args` must be 'name=value,name=value', texts in quotes, got {text!r} ({error})."
        ) from error
