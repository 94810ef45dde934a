"""Base class of the trainers whose loss compares videos: step modes, reference, cached errors. It has no loss."""

import logging
import math
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.columns import MapDataset, num_rejected
from .base_trainer import VideoTrainer
from .parallel.engines import SHARDED
from .planning.estimate import Placement, accelerator_memory, fitting_step_mode
from .preference_config import PreferenceConfig
from .setup.loaders import one_batch
from .setup.rows import IndexedDataset, encoded_cache_dir
from .setup.scored_rows import check_rejected_scores, keep_low_scores
from .setup.weighted_rows import check_loss_weights, check_signs
from .step.group import GroupParallel
from .step.passes import (
    AdapterReference,
    CheckedPasses,
    ConcatPasses,
    Passes,
    SamePathCheck,
    SequentialPasses,
    StepMode,
)
from .step.reference_errors import CachedPasses, cache_path, compute_errors
from .step.safeguard import OutputSafeguard, ParameterSafeguard


logger = logging.getLogger(__name__)


class PreferenceTrainer(VideoTrainer):
    """
    The base of the preference trainers, on top of [`VideoTrainer`].

    A `compute_loss` asks for `self.passes.reference(...)` and `self.passes.policy(...)`, errors `(N,)` of the N videos
    side by side, and makes its loss of them. Whatever the step mode is, that loss must depend on the weights through
    the errors of the policy alone.
    """

    args: PreferenceConfig
    uses_reference = True
    printed_metrics = ("win_gap", "rewards/accuracies")

    @cached_property
    def step_mode(self) -> StepMode:
        """How the videos of a row go through the transformer; `"auto"` is settled here."""
        if self.args.step_mode != "auto":
            return self.args.step_mode
        if self.args.safeguard == "parameter":
            return "sequential"
        if self.engine in SHARDED and self.args.largest_batch > 1:  # where "sequential" is refused
            return "concat"
        work, memory = self.workload(), accelerator_memory(self.args.device)
        tokens = math.prod(self.family.token_grid(self.model, work.latents_shape))
        mode = fitting_step_mode(work, super().placement(), memory, tokens)
        logger.info("`step_mode='auto'` is '%s'.", mode)
        return mode

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        super().check_rows(dataset, args)
        check_signs(dataset, pulls_on_errors=args.pulls_on_errors)
        if args.rejected_score_below is not None:
            check_rejected_scores(dataset, args.rejected_score_below)
        videos, size = cls.videos_per_row(args, num_rejected(dataset)), args.group_parallel_size
        if videos % size:
            raise ValueError(
                f"`group_parallel_size={size}` must divide the {videos} videos that the loss of a row compares. Use "
                f"one of {[degree for degree in range(1, videos + 1) if videos % degree == 0]}."
            )

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        return self.keep_compared(super().prepare_dataset(dataset, transformer))

    def keep_compared(self, rows: IndexedDataset) -> IndexedDataset:
        """The rows, checked, with a rejected video that is compared with, see `rejected_score_below`."""
        check_loss_weights(rows, given_frames=self.family.given_frames)
        below = self.args.rejected_score_below
        return rows if below is None else keep_low_scores(rows, below)

    @classmethod
    def videos_per_row(cls, args: Any, num_rejected: int) -> int:
        return 2

    def placement(self) -> Placement:
        return replace(super().placement(), step_mode=self.step_mode)

    def make_passes(self) -> Passes:
        """All videos at once or one by one, shared by processes or not, checked in the first step, cached."""
        now, group = self.step.now, self._group()
        passes: Passes
        mu, kind = self.args.safeguard_mu, self.args.safeguard
        outputs = OutputSafeguard(mu, self.record) if kind == "output" else None
        if self.step_mode != "sequential":
            one_by_one = self.step_mode == "singles"
            passes = ConcatPasses(self.family, self.reference, group, outputs, one_by_one=one_by_one)
        else:
            trained = [weight for weight in self.model.parameters() if weight.requires_grad]
            gradients = ParameterSafeguard(trained, mu, self.record) if kind == "parameter" else None
            passes = SequentialPasses(self.family, self.reference, self.accelerator, group, outputs, gradients)
        self._norms = _norms(self.model)
        self._check, self._is_same = self._same_path_check()
        checked = CheckedPasses(passes, self._check, now)
        if self.args.precompute_ref_errors is None:
            return checked
        assert self.reference is not None, "`precompute_ref_errors` is refused without one"
        seed, device = self.args.seed, self.args.device
        # A cache is there to do without the reference: it is asked in the first step only where that is in doubt.
        doubted = checked if self._check.is_due else None
        cached = CachedPasses(passes, doubted, self.reference, seed=seed, device=device, now=now)
        self.step.noise_steps = cached.noise_steps  # rows see the noises whose errors are known
        return cached

    def _group(self) -> GroupParallel | None:
        """Which videos of a row are this process's, where several processes share them."""
        if self.args.group_parallel_size == 1:
            return None
        assert self.mesh is not None
        return GroupParallel(self.mesh["group"])

    def _same_path_check(self) -> tuple[SamePathCheck, bool]:
        """What might let the paths of policy and reference differ, and whether the two are the same model at first."""
        description = self.checkpointer.description
        same = description["base_weights"] == description["reference_weights"]
        same = same or isinstance(self.reference, AdapterReference)
        # Of an adapter that is 0 at first, what it drops makes no difference.
        same = same and not (self.continues_adapter and (self.args.reference_is_base or self.step.drops))
        names = ("attention_backend", "compile_blocks", "quantization")
        options = {name: self.args.__dict__[name] for name in names if same and self.args.__dict__[name]}
        return SamePathCheck(options), same

    # ---- Cached errors of the reference ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        # Not where someone has changed the weights since, or trains for a second time: they may start from any others.
        untouched = torch.equal(_norms(self.model), self._norms)
        if not self._is_same or untouched:
            self._check.look(must_agree=self._is_same)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if isinstance(self.passes, CachedPasses) and self.passes.errors is None:
            path = cache_path(Path(encoded_cache_dir(self.args)), self.train_dataset, self._cache_settings())
            with self.metrics.uncounted():
                self.passes.fill(path, self._compute_reference_errors, self.accelerator)
        return prepared

    def _compute_reference_errors(self) -> list[Tensor]:
        assert self.args.precompute_ref_errors is not None
        return compute_errors(
            self.train_dataset,
            self.args.precompute_ref_errors,
            self.args.per_device_train_batch_size,
            self._errors_of_reference,
            rank=self.args.data_parallel_rank,
            num_ranks=self.args.data_parallel_size,
        )

    def _errors_of_reference(self, indices: list[int], number: int) -> Tensor:
        """Errors `(N,)` of the reference on the videos that the loss compares, with one of the K noises."""
        assert isinstance(self.passes, CachedPasses)
        inputs = one_batch(self.train_dataset, indices, self.data_collator, self.args.device)
        with self.accelerator.autocast():
            return self.passes.measure(number, partial(self.compute_loss, self.model, inputs))

    def _cache_settings(self) -> dict[str, Any]:
        """All that the errors depend on, but for the rows."""
        scheduler = None if self.pipeline is None else dict(self.pipeline.scheduler.config)
        names = ("transformer", "config", "base_weights", "reference_weights")
        arguments = self.args.to_dict()
        options = (*self.args.reference_error_options, *self.workload_options)
        return {
            **{name: self.checkpointer.description[name] for name in names},
            # The scale of an adapter that goes on, and is the reference as it was; its weights are among the frozen.
            "adapter": self.checkpointer.description["adapter"] if self.continues_adapter else None,
            "family": repr(self.family),  # its form, and what the transformer is told beside a row
            **{name: arguments[name] for name in options},
            "timestep_shift": self.timestep_shift,
            "timestep_range": self.timestep_range,
            "max_sequence_length": self.max_sequence_length,
            "scheduler": scheduler,
            "step_mode": self.step_mode,
        }


def _norms(model: nn.Module) -> Tensor:
    """The norm of every trained weight, on the CPU: what tells, at no cost of memory, that one has changed."""
    weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    return torch.stack(torch._foreach_norm(weights)).float().cpu()
