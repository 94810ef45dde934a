"""What the trainers whose loss compares videos with each other share: the two passes of a step. No loss in here."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from .base_trainer import VideoTrainer
from .parallel.engines import SHARDED
from .planning.estimate import Placement, accelerator_memory, fitting_step_mode
from .preference_config import PreferenceConfig
from .setup.attention_and_compile import SamePathCheck
from .setup.rows import encoded_cache_dir
from .step.group import VideoShare
from .step.noise import to_device
from .step.passes import Denoising, SequentialErrors
from .step.reference import AdapterReference
from .step.reference_bank import ReferenceBank, bank_path, bank_step, fill, load_bank, save_bank


logger = logging.getLogger(__name__)

# Arguments that decide which noise a row sees, which of its videos are compared, and how the numbers are computed.
_BANK_ARGUMENTS = (
    "seed",
    "precompute_ref_errors",
    "shared_noise",
    "loss_type",
    "timestep_sampling",
    "timestep_logit_mean",
    "timestep_logit_std",
    "per_device_train_batch_size",
    "bf16",
    "fp16",
    "quantization",
    "attention_backend",
    "compile_blocks",
    "context_parallel_size",
    "context_parallel_method",
    "group_parallel_size",
)


class PreferenceTrainer(VideoTrainer):
    """
    Plumbing of the preference trainers, on top of `VideoTrainer`.

    A `compute_loss` asks for `reference_error` and `policy_error` and makes its loss of them. Whatever the step mode
    is, that loss must depend on the weights through `policy_error` alone.
    """

    args: PreferenceConfig
    uses_reference = True

    _sequential: SequentialErrors | None = None
    _bank: ReferenceBank | None = None
    _bank_number: int | None = None  # of the noise for which the bank is being filled
    _errors_for_bank: Tensor

    @cached_property
    def step_mode(self) -> Literal["concat", "sequential"]:
        """How the videos of a row go through the transformer; `"auto"` is settled here."""
        if self.args.step_mode != "auto":
            return self.args.step_mode
        if self.engine in SHARDED and self.args.largest_batch > 1:  # where "sequential" is refused
            return "concat"
        mode = fitting_step_mode(self.workload(), super().placement(), accelerator_memory(self.args.device))
        logger.info("`step_mode='auto'` is '%s'.", mode)
        return mode

    @cached_property
    def video_share(self) -> VideoShare | None:
        """Which videos of a row are this process's, where several processes share them."""
        size, videos = self.args.group_parallel_size, self.videos_in_step()
        if size == 1:
            return None
        assert self.mesh is not None
        if videos % size:
            raise ValueError(
                f"`group_parallel_size={size}` must divide the {videos} videos that the loss of a row compares. Use "
                f"one of {[degree for degree in range(1, videos + 1) if videos % degree == 0]}."
            )
        return VideoShare(self.mesh["group"])

    @classmethod
    def videos_per_row(cls, args: Any, num_rejected: int) -> int:
        return 2

    def placement(self) -> Placement:
        return replace(super().placement(), step_mode=self.step_mode)

    def denoising(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Denoising:
        """Videos `(N, C, F, H, W)` with noise of that shape added as timesteps `(N,)` say, and their velocity."""
        process = self.family.noise_process
        noisy_latents = process.add_noise(latents, noise, timesteps)
        return Denoising(noisy_latents, timesteps, conditions, process.velocity(latents, noise, timesteps))

    def reference_error(self, denoising: Denoising, indices: Iterable[int]) -> Tensor:
        """Velocity errors `(N,)` of the reference on the videos of the rows with these indices; no gradient."""
        if self._bank is not None and self.model.training:
            if self._in_first_step and self._same_path.is_due:
                # A bank may have been filled in other batches or on another machine: its last bits promise nothing.
                self._same_path.see_reference(self._reference_errors(denoising))
            errors = self._bank.look_up(self.state.global_step, [int(index) for index in indices])
            return to_device(self.args.device, errors)[0]
        errors = self._reference_errors(denoising)
        if self._in_first_step:
            self._same_path.see_reference(errors)
        if self._bank_number is not None:
            self._errors_for_bank = errors
        return errors

    def _reference_errors(self, denoising: Denoising) -> Tensor:
        with torch.no_grad(), self.reference_policy() as reference:
            return self._errors(denoising, reference)

    @property
    def _in_first_step(self) -> bool:
        """Whether this is a pass of the first step of a training, and none for the bank."""
        return self.model.training and self.state.global_step == 0 and self._bank_number is None

    @cached_property
    def _same_path(self) -> SamePathCheck:
        weights = self._description["base_weights"], self._description["reference_weights"]
        same = isinstance(self.reference, AdapterReference) or weights[0] == weights[1]
        names = ("attention_backend", "compile_blocks", "quantization")
        return SamePathCheck({name: self.args.__dict__[name] for name in names if same and self.args.__dict__[name]})

    def policy_error(self, model: nn.Module, denoising: Denoising) -> Tensor:
        """Velocity errors `(N,)` of the policy. In training, call it once in `compute_loss`."""
        errors = self._policy_error(model, denoising)
        if self._in_first_step:
            self._same_path.see_policy(errors)
        return errors

    def _policy_error(self, model: nn.Module, denoising: Denoising) -> Tensor:
        if self._bank_number is not None:  # nobody asks for the loss
            return self._errors_for_bank
        if self.step_mode == "concat" or not torch.is_grad_enabled():
            return self._errors(denoising, model)
        own = denoising if self.video_share is None else self.video_share.own(denoising)
        self._sequential = SequentialErrors(own, self.family, model, **self._backward_passes(model))
        errors = self._sequential.errors
        return errors if self.video_share is None else self.video_share.gather(errors)

    def _backward_passes(self, model: nn.Module) -> dict[str, Any]:
        """How the processes go through several backward passes in a step."""
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return {"no_sync": partial(self.accelerator.no_sync, model)}
        steps = self.accelerator.deepspeed_engine_wrapped
        steps.expect_passes()
        return {"backward": steps.backward_pass}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.args.precompute_ref_errors is not None and self._bank is None:
            self._bank = ReferenceBank(self.args.seed, self._errors_of_bank(self.args.precompute_ref_errors))
        if self._bank is not None and self.reference is not None:
            self.reference.set_aside()  # until an evaluation
        loss = super().training_step(model, inputs, num_items_in_batch)
        sequential, self._sequential = self._sequential, None
        if sequential is not None:
            with self.compute_loss_context_manager():
                sequential.backward()
        return loss

    def noise_steps(self, indices: Sequence[int]) -> list[int]:
        if self._bank_number is not None:
            return [bank_step(self._bank_number)] * len(indices)
        if self._bank is not None and self.model.training:
            return [bank_step(self._bank.number(self.state.global_step, index)) for index in indices]
        return super().noise_steps(indices)

    def _errors_of_bank(self, size: int) -> list[Tensor]:
        """Errors of the reference for a bank of this size, from the cache or computed. Every process calls this."""
        path = bank_path(Path(encoded_cache_dir(self.args)), self.train_dataset, self._bank_settings())
        if self.accelerator.reduce(torch.tensor(float(path.is_file()), device=self.args.device), "mean") == 1:
            logger.info("Errors of the reference are taken from %s.", path)
            return load_bank(path)
        counted, self._counted = self._counted, False
        try:
            errors = fill(
                self.train_dataset,
                size,
                self.args.per_device_train_batch_size,
                self._errors_for,
                rank=self.args.data_parallel_rank,
                num_ranks=self.args.data_parallel_size,
            )
        finally:
            self._counted, self._bank_number = counted, None
        if self.is_world_process_zero():
            save_bank(path, errors)
        return errors

    def _errors_for(self, indices: list[int], number: int) -> Tensor:
        """Errors `(N,)` of the reference on the videos that the loss compares, with a noise of the bank."""
        self._bank_number = number
        collated = self.data_collator([self.train_dataset[index] for index in indices])
        inputs = self._prepare_inputs({**collated, "index": indices})
        with torch.no_grad(), self.accelerator.autocast():
            self.compute_loss(self.model, inputs)
        return self._errors_for_bank

    def _bank_settings(self) -> dict[str, Any]:
        """All that the errors of a bank depend on, but for the rows."""
        scheduler = None if self.pipeline is None else dict(self.pipeline.scheduler.config)
        weights = {name: self._description[name] for name in ("transformer", "base_weights", "reference_weights")}
        arguments = self.args.to_dict()
        return {
            **weights,
            **{name: arguments[name] for name in _BANK_ARGUMENTS if name in arguments},
            "timestep_shift": self.timestep_shift,
            "max_sequence_length": self.max_sequence_length,
            "scheduler": scheduler,
            "step_mode": self.step_mode,
        }

    def _errors(self, denoising: Denoising, transformer: nn.Module) -> Tensor:
        own = denoising if self.video_share is None else self.video_share.own(denoising)
        videos = [own] if self.step_mode == "concat" else own.one_by_one()
        errors = torch.cat([video.errors(self.family, transformer) for video in videos])
        return errors if self.video_share is None else self.video_share.gather(errors)
