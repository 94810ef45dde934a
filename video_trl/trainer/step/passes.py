"""
Forward and backward passes of a step: all videos at once, one forward a video, or one video's graph at a time.

A preference loss needs the errors of all videos of a pair or group at once, but its gradient is a sum over videos: the
gradient of each error times dL/d(error). So the errors are computed either with all graphs kept, from one forward over
all videos or one forward a video; or first, mostly without a graph, and the videos go forward and backward one by one
afterwards, weighed by that derivative. Loss and gradient are exact in all of them. In the last one the graph of one
video is all that is kept: also the exact loss of a group needs no more memory than fine-tuning.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, DistributedType
from diffusers import ModelMixin
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...losses.preference import velocity_error
from ...models import ModelFamily
from ..parallel.engines import engine_of, prepare_reference
from .denoising import Denoising
from .dropout import dropout_of
from .group import GroupParallel
from .safeguard import OutputSafeguard, ParameterSafeguard


logger = logging.getLogger(__name__)

StepMode = Literal["concat", "singles", "sequential"]


class Beside:
    """
    A further value of the first video of each group, from the very forward that gives its error.

    Args:
        around (`Callable`): Takes the model and a slice of the groups; a context manager around a forward of their
            videos, which gives a function for the values of these groups afterwards.

    Attributes:
        values (`torch.Tensor` of shape `(B,)`, *optional*): Of all groups, once the policy has run.
    """

    def __init__(self, around: Callable[[nn.Module, slice], AbstractContextManager[Callable[[], Tensor]]]) -> None:
        self.around = around
        self.values: Tensor | None = None


class Passes(Protocol):
    """What `compute_loss` asks for errors. Its loss must depend on the weights through those of the policy alone."""

    def reference(self, denoising: Denoising, indices: Iterable[int]) -> Tensor:
        """Velocity errors `(N,)` of the reference on the videos of the rows with these indices; no gradient."""

    def policy(self, model: nn.Module, denoising: Denoising, beside: Beside | None = None) -> Tensor:
        """
        Velocity errors `(N,)` of the policy, and `beside.values`. In training, to be called once in a `compute_loss`.
        """

    def backward(self) -> None:
        """Carry on to the weights what the backward pass of the loss has left to do. Called after every one."""


class ConcatPasses:
    """
    All videos of a step in one forward, or in a forward each; the graphs of all are kept until the backward pass.

    Args:
        family ([`ModelFamily`]): Of the transformer.
        reference ([`Reference`], *optional*): For the trainers that have one.
        group ([`GroupParallel`], *optional*): The processes that divide the videos among themselves.
        outputs ([`OutputSafeguard`], *optional*): Holds rejected videos back.
        one_by_one (`bool`, defaults to `False`): A forward for each video: what checkpointed activations are computed
            from again is then one video's at a time.
    """

    def __init__(
        self,
        family: ModelFamily,
        reference: "Reference | None" = None,
        group: GroupParallel | None = None,
        outputs: OutputSafeguard | None = None,
        *,
        one_by_one: bool = False,
    ) -> None:
        self._family, self._reference, self._group, self._outputs = family, reference, group, outputs
        self._one_by_one = one_by_one

    def reference(self, denoising: Denoising, indices: Iterable[int]) -> Tensor:
        assert self._reference is not None, "only trainers with `uses_reference` have one"
        # The pass of the policy, with another module: so that both round alike.
        with torch.no_grad(), self._reference() as module:
            return self.policy(module, denoising)

    def policy(self, model: nn.Module, denoising: Denoising, beside: Beside | None = None) -> Tensor:
        own = denoising if self._group is None else self._group.own(denoising)
        residuals: list[Tensor] | None = [] if self._outputs is not None and torch.is_grad_enabled() else None
        videos = own.one_by_one() if self._one_by_one else [own]
        errors = _policy_errors(self._family, model, videos, beside, residuals)
        errors = errors if self._group is None else self._group.gather(errors)
        _watch(self._outputs, errors, residuals, denoising.group_size, self._group)
        return errors

    def backward(self) -> None:
        """Nothing: the graph of the loss reaches the weights."""


class SequentialPasses:
    """
    One video at a time, so that one graph is alive.

    Args:
        family ([`ModelFamily`]): Of the transformer.
        reference ([`Reference`], *optional*): For the trainers that have one.
        accelerator (`Accelerator`): Of the trainer; knows how processes go through several backward passes in a step.
        group ([`GroupParallel`], *optional*): The processes that divide the videos among themselves.
        outputs ([`OutputSafeguard`], *optional*): Holds rejected videos back, by their predictions.
        gradients ([`ParameterSafeguard`], *optional*): Holds them back, by their gradients.
    """

    def __init__(
        self,
        family: ModelFamily,
        reference: "Reference | None",
        accelerator: Accelerator,
        group: GroupParallel | None = None,
        outputs: OutputSafeguard | None = None,
        gradients: ParameterSafeguard | None = None,
    ) -> None:
        self._family, self._reference, self._accelerator, self._group = family, reference, accelerator, group
        self._outputs, self._gradients = outputs, gradients
        self._waiting: SequentialErrors | None = None  # for the backward pass of the loss

    def reference(self, denoising: Denoising, indices: Iterable[int]) -> Tensor:
        assert self._reference is not None, "asked by no method without one"
        with torch.no_grad(), self._reference() as module:
            return self.policy(module, denoising)

    def policy(self, model: nn.Module, denoising: Denoising, beside: Beside | None = None) -> Tensor:
        own = denoising if self._group is None else self._group.own(denoising)
        residuals: list[Tensor] | None = None
        if torch.is_grad_enabled():
            residuals = None if self._outputs is None else []
            how = self._backward_passes(model) | {"residuals": residuals, "safeguard": self._gradients}
            self._waiting = SequentialErrors(own, self._family, model, beside=beside, **how)
            errors = self._waiting.errors
        else:
            errors = _policy_errors(self._family, model, own.one_by_one(), beside)
        errors = errors if self._group is None else self._group.gather(errors)
        _watch(self._outputs, errors, residuals, denoising.group_size, self._group)
        return errors

    def backward(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.backward()

    def _backward_passes(self, model: nn.Module) -> dict[str, Any]:
        """How the processes go through several backward passes in a step."""
        if self._accelerator.distributed_type != DistributedType.DEEPSPEED:
            return {"no_sync": partial(self._accelerator.no_sync, model)}
        steps = self._accelerator.deepspeed_engine_wrapped
        steps.expect_passes()
        return {"backward": steps.backward_pass}


def forward_errors(
    family: ModelFamily, model: nn.Module, denoising: Denoising, residuals: list[Tensor] | None = None
) -> Tensor:
    """
    Velocity errors `(N,)` of a transformer, from one forward, without the latent frames that are given: it predicts
    nothing there. Up to a factor, their gradient by the prediction is appended to `residuals`, float32.
    """
    with nullcontext() if denoising.streams is None else dropout_of(denoising.streams):
        prediction = family.predict(model, denoising.noisy_latents, denoising.timesteps, denoising.conditions)
    given = family.given_frames
    prediction, target = prediction[:, :, given:], denoising.target[:, :, given:]
    weights = None if denoising.weights is None else denoising.weights[:, :, given:]
    if residuals is not None:
        residual = prediction.detach().float() - target.float()
        residuals.append(residual if weights is None else weights * residual)
    return velocity_error(prediction, target, weights)


def _one_video(
    family: ModelFamily,
    model: nn.Module,
    video: Denoising,
    groups: slice | None,
    beside: Beside | None,
    residuals: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Errors of a video, or of all in one forward, and what stands beside those of these groups, where it is asked."""
    if beside is None or groups is None:
        return forward_errors(family, model, video, residuals), None
    with beside.around(model, groups) as values:
        errors = forward_errors(family, model, video, residuals)
    return errors, values()


def _group_of(number: int, group_size: int) -> slice | None:
    """The group whose first video has this number, if there is one."""
    return slice(number // group_size, number // group_size + 1) if number % group_size == 0 else None


def _policy_errors(
    family: ModelFamily,
    model: nn.Module,
    videos: Sequence[Denoising],
    beside: Beside | None,
    residuals: list[Tensor] | None = None,
) -> Tensor:
    """Errors `(N,)` of videos by themselves, or of a single `Denoising` with all of them, and `beside.values`."""
    errors, values = [], []
    for number, video in enumerate(videos):
        groups = slice(None) if len(videos) == 1 else _group_of(number, video.group_size)
        error, value = _one_video(family, model, video, groups, beside, residuals)
        errors.append(error)
        values += [] if value is None else [value]
    if beside is not None:
        beside.values = torch.cat(values)
    return torch.cat(errors)


def _watch(
    safeguard: OutputSafeguard | None,
    errors: Tensor,
    residuals: list[Tensor] | None,
    group_size: int,
    group: GroupParallel | None,
) -> None:
    """Let a safeguard hold back the rejected ones of the videos with these errors, where residuals were kept."""
    if safeguard is None or residuals is None:
        return
    together = torch.cat(residuals)
    safeguard.watch(errors, together if group is None else group.gather(together), group_size)


@contextmanager
def _without_graph() -> Iterator[None]:
    """As `torch.no_grad`; in torch 2.6 autocast keeps the weights that it casts there, without a graph, for later."""
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


class SequentialErrors:
    """
    Errors of N videos with one graph alive at a time.

    `errors` are what the loss is made of; after its backward pass, which ends there, `backward` carries it on to the
    weights. The graph of one video is kept from the first pass, so that N videos cost 2N - 1 forwards, not 2N: the
    last one's, or with a safeguard the first one's, whose gradient it needs before the others'.

    Args:
        denoising ([`Denoising`]): The videos.
        family ([`ModelFamily`]): Of the transformer's family.
        model (`torch.nn.Module`): The policy, as it is wrapped for training.
        no_sync (`Callable`): Makes a context in which processes do not average gradients yet.
        backward (`Callable`, *optional*): Adds the gradients of a scalar, and gets whether it is the last of the
            step; the scalar's own backward pass if not given.
        residuals (`list`, *optional*): Gets what the errors are made of, see `forward_errors`.
        safeguard ([`ParameterSafeguard`], *optional*): Adds up the gradients.
        beside ([`Beside`], *optional*): A further value of each group; gets its values as a leaf of the graph.

    Attributes:
        errors (`torch.Tensor` of shape `(N,)`): A leaf of the graph, float32.
    """

    def __init__(
        self,
        denoising: Denoising,
        family: ModelFamily,
        model: nn.Module,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
        backward: Callable[[Tensor, bool], None] = lambda value, final: value.backward(),
        residuals: list[Tensor] | None = None,
        safeguard: ParameterSafeguard | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._family, self._model, self._no_sync, self._backward = family, model, no_sync, backward
        self._safeguard, self._beside, self._group_size = safeguard, beside, denoising.group_size
        self._videos = denoising.one_by_one()
        self._kept = len(self._videos) - 1 if safeguard is None else 0
        self._kept_graph: tuple[Tensor, Tensor | None] | None = None
        errors: list[Tensor] = []
        values: list[Tensor] = []
        for number, video in enumerate(self._videos):
            is_kept = number == self._kept
            context = self._local(final=len(self._videos) == 1) if is_kept else _without_graph()
            with context:
                groups = _group_of(number, self._group_size)
                error, value = _one_video(family, model, video, groups, beside, residuals)
            if is_kept:
                self._kept_graph = error, value
            errors.append(error.detach())
            values += [] if value is None else [value.detach()]
        self.errors = torch.cat(errors).requires_grad_()
        if beside is not None:
            beside.values = torch.cat(values).requires_grad_()

    def backward(self) -> None:
        """Add the gradients of the weights, video by video, given the gradient of `errors`."""
        coefficients = self.errors.grad
        assert coefficients is not None, "the backward pass of the loss comes first"
        if self._safeguard is not None:
            self._safeguard.add_gradients(coefficients, self._group_size, self._add_gradient)
            return
        # The graph that is alive goes first, and makes room.
        *others, last = range(len(self._videos))
        # A head that only chosen videos use must be used in the final pass, in which processes average gradients.
        order = [last, *(others if self._beside is None else reversed(others))]
        for number in order:
            self._add_gradient(number, final=number == order[-1])

    def _add_gradient(self, number: int, final: bool = False) -> None:
        """Add the weighted gradient of one video's error to those of the weights."""
        assert self.errors.grad is not None
        with self._local(final=final):
            graph, self._kept_graph = (self._kept_graph if number == self._kept else None), None
            if graph is None:
                groups = _group_of(number, self._group_size)
                graph = _one_video(self._family, self._model, self._videos[number], groups, self._beside)
            error, value = graph
            total = (self.errors.grad[number : number + 1] * error).sum()
            if value is not None:
                total = total + self._coefficient(number) * value.sum()
            self._backward(total, final)

    def _coefficient(self, number: int) -> Tensor:
        """Derivative of the loss by what stands beside the video with this number."""
        assert self._beside is not None and self._beside.values is not None
        assert self._beside.values.grad is not None, "the loss must depend on it, were it with a coefficient of 0"
        return self._beside.values.grad[number // self._group_size]

    def _local(self, *, final: bool) -> AbstractContextManager[None]:
        """Processes average their gradients in the final backward pass alone, and there only if the trainer does."""
        return nullcontext() if final else self._no_sync()


class CheckedPasses:
    """
    Passes that are compared in the first step of a run, where policy and reference are still the same model.

    Args:
        passes ([`Passes`]): The passes.
        check ([`SamePathCheck`]): Compares their errors.
        now (`Callable`): Optimizer steps done so far, or `EVALUATION_STEP`.
    """

    def __init__(self, passes: Passes, check: "SamePathCheck", now: Callable[[], int]) -> None:
        self._passes, self._check, self._now = passes, check, now

    @property
    def is_due(self) -> bool:
        """Whether this is a first step, and the two have yet to be compared."""
        return self._check.is_due and self._now() == 0

    def reference(self, denoising: Denoising, indices: Iterable[int]) -> Tensor:
        errors = self._passes.reference(denoising, indices)
        if self.is_due:
            self._check.see_reference(errors)
        return errors

    def policy(self, model: nn.Module, denoising: Denoising, beside: Beside | None = None) -> Tensor:
        errors = self._passes.policy(model, denoising, beside)
        if self.is_due:
            self._check.see_policy(errors)
        return errors

    def backward(self) -> None:
        self._passes.backward()


class SamePathCheck:
    """
    Whether policy and reference give the same numbers while they are the same model: looked at once, in a first step.

    A preference loss is made of small differences between the two, multiplied by beta. If the kernels of their passes
    round differently, in whatever precision, that is a difference before anything is learned, so none is allowed.

    Args:
        options (`dict`): The options that might cause one, by name. With any, the first step is always looked at.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._reference_error: Tensor | None = None
        self._done = not any(options.values())
        self._must_agree = not self._done

    @property
    def is_due(self) -> bool:
        """Whether the two have yet to be compared."""
        return not self._done

    def look(self, *, must_agree: bool) -> None:
        """Compare in the next first step; a difference stops the run, or is reported where another model is meant."""
        self._done, self._must_agree = False, must_agree or any(self._options.values())

    def see_reference(self, error: Tensor) -> None:
        """The errors `(N,)` of the reference, to compare the next ones of the policy with."""
        self._reference_error = error

    def see_policy(self, error: Tensor) -> None:
        """
        The errors `(N,)` of the policy on the same videos, before its first update.

        Raises:
            ValueError: If they differ from the reference's in a bit, and must not.
        """
        if self._done or self._reference_error is None:
            return
        self._done = True
        ours, theirs = error.detach().cpu(), self._reference_error.cpu()
        if torch.equal(ours, theirs):
            return
        worst = int((ours - theirs).abs().argmax())
        numbers = f"{ours[worst]:.9g} and {theirs[worst]:.9g} (policy, reference)"
        if not self._must_agree:
            logger.warning(
                "Policy and reference differ before the first step, their errors on a video being %s. That is right "
                "for a `ref_model` that is another model than the one that is trained, and for `lora_dropout` on an "
                "adapter that goes on, and a mistake otherwise.",
                numbers,
            )
            return
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        cause = (
            "Leave the option off, or use another back end."
            if options
            else "Look for what acts in one of the two passes only: hooks, patched modules, kernels that do not give "
            "the same numbers twice, weights that changed since the trainer was made."
        )
        with_options = f"with {options} " if options else ""
        raise ValueError(
            f"Policy and reference are the same model before the first step, and {with_options}their errors differ: "
            f"{numbers}. The difference would be multiplied by beta and learned from. {cause}"
        )


# ---- The reference ----


class Reference(Protocol):
    """A context manager factory: inside `with reference() as module`, `module` predicts as the reference does."""

    def __call__(self) -> AbstractContextManager[nn.Module]: ...

    def prepare(self, accelerator: Accelerator) -> None:
        """Place the reference on the device of the policy, with the same mixed precision."""

    def set_aside(self) -> None:
        """Make room on the device until the reference is used again, which brings it back by itself."""


class AdapterReference:
    """
    The policy's own base weights, its adapter switched off or exchanged for a frozen one: no memory for a copy.

    Policy and reference run through the same module and the same kernels, so that they agree to the last bit while
    the adapter has not been trained.

    Args:
        transformer (`ModelMixin`): Transformer with the trained adapter, not wrapped for distributed training.
        reference_adapter (`str`, *optional*): Name of the adapter that is the reference; none: the bare base.
    """

    def __init__(self, transformer: ModelMixin, reference_adapter: str | None = None) -> None:
        self._transformer = transformer
        self._reference_adapter = reference_adapter
        self._layers: list[BaseTunerLayer] = []
        self._adapters: dict[str, PeftConfig] = {}  # that the transformer had when the layers were looked for

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        # PEFT's own switches flip `requires_grad` too, which FSDP2 and the optimizer must not see, not even for a
        # moment: so only the flags that a layer's forward reads are set, and set back.
        adapters = dict(self._transformer.peft_config)
        if adapters != self._adapters:  # only where one comes or goes, a look through all modules finds others
            self._adapters = adapters
            self._layers = [module for module in self._transformer.modules() if isinstance(module, BaseTunerLayer)]
        layers = self._layers
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = self._reference_adapter is None
                if self._reference_adapter is not None:
                    layer._active_adapter = [self._reference_adapter]
            yield self._transformer
        finally:
            for layer, (disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active

    def prepare(self, accelerator: Accelerator) -> None:
        """Nothing to do: the reference is part of the policy."""

    def set_aside(self) -> None:
        """Nothing to do, for the same reason."""


class ModuleReference:
    """
    A second transformer, frozen.

    Args:
        transformer (`ModelMixin`): The reference; set to evaluation mode, its gradients switched off.
    """

    def __init__(self, transformer: ModelMixin) -> None:
        self.transformer = transformer.requires_grad_(False).eval()
        self._prepared: nn.Module | None = None
        self._accelerator: Accelerator | None = None
        self._is_aside = False

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        assert self._accelerator is not None and self._prepared is not None, "the trainer calls prepare"
        if self._is_aside:
            self.transformer.to(self._accelerator.device)
            self._is_aside = False
        with self._accelerator.autocast():  # the policy's forward has it built in
            yield self._prepared

    def prepare(self, accelerator: Accelerator) -> None:
        # Not `accelerator.prepare_model`: the accelerator would then take the policy to be prepared already.
        self._prepared = prepare_reference(self.transformer, accelerator, engine_of(accelerator))
        self._accelerator = accelerator

    def set_aside(self) -> None:
        assert self._accelerator is not None, "the trainer calls prepare"
        if not self._is_aside and engine_of(self._accelerator) == "ddp":  # engines that shard it hold it themselves
            self.transformer.to("cpu")
            self._is_aside = True
