"""Choose attention kernels and compile blocks, the same for policy and reference."""

import shutil
from collections.abc import Sequence
from types import FunctionType

import torch
from accelerate.utils import is_torch_version
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from torch import Tensor, nn

from ...models.attention.joint import JointAttentionProcessor


# Attention kernels that quantise their inputs are made for sampling and have no backward pass.
_WITHOUT_BACKWARD = ("sage",)
# A block is compiled once for each form of its inputs: batch sizes, shapes, with and without gradients or adapter.
_COMPILES_RIGHT = "2.13"  # with which it was compared
_COMPILED_FORMS = 64


def attention_backends() -> tuple[str, ...]:
    """Names of diffusers' attention back ends that can train, installed or not."""
    names = sorted(name.value for name in AttentionBackendName)
    return tuple(name for name in names if not name.lstrip("_").startswith(_WITHOUT_BACKWARD))


def check_attention_backend(name: str) -> None:
    """Raise a `ValueError` if there is no attention back end of that name, or its library is not installed."""
    if name not in attention_backends():
        raise ValueError(
            f"`attention_backend` must be one of {', '.join(map(repr, attention_backends()))}, got {name!r}. Those of "
            "diffusers that are missing here have no backward pass."
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"`attention_backend={name!r}` cannot be used here: {error} Or leave it unset for torch's own attention."
        ) from error


def probe_attention_backend(name: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """
    Run a back end on a few numbers and compare output and gradients with torch's own attention.

    Args:
        name (`str`): A back end that `check_attention_backend` has accepted.
        head_dim (`int`): Width of the transformer's attention heads.
        device (`torch.device`), dtype (`torch.dtype`): Those of the run.

    Raises:
        ValueError: If it does not run on this device, has no backward pass, or gives other numbers.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 64, 2, head_dim, generator=generator).to(device, dtype) for _ in range(3)]
    tested: list[Tensor] = []
    expected: list[Tensor] = []
    for backend, results in ((name, tested), ("native", expected)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        try:
            output = dispatch_attention_fn(*leaves, backend=AttentionBackendName(backend))
            results += [output.detach(), *torch.autograd.grad(output.square().mean(), leaves)]
        except Exception as error:  # kernels of other libraries fail in any way they like
            raise ValueError(
                f"`attention_backend={name!r}` does not run forward and backward on {device} in {dtype} with heads of "
                f"{head_dim} channels: {error}. Use another one, or leave it unset for torch's own attention."
            ) from error
    difference = max(
        float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(tested, expected, strict=True)
    )
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        raise ValueError(
            f"`attention_backend={name!r}`: output or gradients differ from torch's own attention by {difference:.2g} "
            f"of the largest, expected at most {tolerance:g}. Use another one, or leave it unset."
        )


def set_attention_backend(transformer: ModelMixin, name: str) -> None:
    """Let every attention of a transformer run on the back end; nothing else in the process is affected."""
    for module in transformer.modules():
        if isinstance(module, Attention) and type(module.processor) is CogVideoXAttnProcessor2_0:
            module.set_processor(JointAttentionProcessor())
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(name)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)  # diffusers makes it the default of all models


def check_acceleration(
    transformer: ModelMixin,
    device: torch.device,
    *,
    attention_backend: str | None,
    compiles: bool,
    half: torch.dtype | None,
) -> None:
    """
    Raise a `ValueError` if the options do not work for this transformer on this device.

    Args:
        transformer (`ModelMixin`): The policy.
        device (`torch.device`): Where it is trained.
        attention_backend (`str`, *optional*): Attention kernel by its name.
        compiles (`bool`): Whether its blocks are to be compiled.
        half (`torch.dtype`, *optional*): Of mixed precision; without it, attention runs in the transformer's dtype.
    """
    if attention_backend is not None:
        head_dim = transformer.config.attention_head_dim
        probe_attention_backend(attention_backend, head_dim, device, half or transformer.dtype)
    if compiles:
        check_compile(device)


def check_compile(device: torch.device) -> None:
    """Raise a `ValueError` if blocks cannot be compiled for a device, or might not compute what they do uncompiled."""
    if is_torch_version("<", _COMPILES_RIGHT):
        raise ValueError(
            f"`compile_blocks` needs torch {_COMPILES_RIGHT} or newer, this is {torch.__version__}: gradients of "
            "compiled blocks were wrong with 2.6, and versions between were not tried. Update torch, or leave it off."
        )
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError(
            "`compile_blocks` needs a C++ compiler on the CPU, and none is found. Install g++, or leave it off."
        )


def compile_blocks(blocks: Sequence[nn.Module], *, enabled: bool) -> None:
    """
    Compile every block of a transformer by itself, with `torch.compile`; or undo what an earlier trainer has compiled.

    Policy and reference share the compiled code of their common module, where the adapter is on in one form and off
    in another; a separate reference needs a call of its own. What engines and context parallelism do around a block's
    forward pass, by hooks that come later, is not compiled.
    """
    if enabled:
        # `recompile_limit` since torch 2.7, where the older name stands for it.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _COMPILED_FORMS)
    for block in blocks:
        if is_compiled(block):
            del block.forward
        if enabled:
            # A part that falls back to eager would round otherwise, so there may be none.
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def is_compiled(block: nn.Module) -> bool:
    """Whether [`compile_blocks`] has compiled a block."""
    forward = vars(block).get("forward")
    return isinstance(forward, FunctionType) and "_torchdynamo_orig_callable" in vars(forward)
