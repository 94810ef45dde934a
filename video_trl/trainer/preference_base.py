"""What the trainers whose loss compares videos with each other share: the two passes of a step. No loss in here."""

from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base_trainer import _BaseVideoTrainer
from .denoising import Denoising, SequentialErrors
from .memory import accelerator_memory, activation_bytes, choose_step_mode
from .preference_config import _PreferenceConfig
from .rows import datasets_in


class _PreferenceTrainer(_BaseVideoTrainer):
    """
    Plumbing of the preference trainers, on top of `_BaseVideoTrainer`.

    A `compute_loss` asks for `reference_error` and `policy_error` and makes its loss of them. Whatever the step mode
    is, that loss must depend on the weights through `policy_error` alone.
    """

    args: _PreferenceConfig
    uses_reference = True

    _sequential: SequentialErrors | None = None

    @cached_property
    def step_mode(self) -> Literal["concat", "sequential"]:
        """How the videos of a row go through the transformer; `"auto"` is settled here."""
        needed = self._weight_bytes() + self._activation_bytes()
        return choose_step_mode(self.args.step_mode, accelerator_memory(self.args.device), needed)

    def videos_in_step(self) -> int:
        """Number of videos that the loss of one row compares."""
        return 2

    def denoising(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Denoising:
        """Videos `(N, C, F, H, W)` with noise of that shape added as timesteps `(N,)` say, and their velocity."""
        process = self.adapter.noise_process
        noisy_latents = process.add_noise(latents, noise, timesteps)
        return Denoising(noisy_latents, timesteps, conditions, process.velocity(latents, noise, timesteps))

    def reference_error(self, denoising: Denoising) -> Tensor:
        """Velocity errors `(N,)` of the reference; no gradient."""
        with torch.no_grad(), self.reference_policy() as reference:
            return self._errors(denoising, reference)

    def policy_error(self, model: nn.Module, denoising: Denoising) -> Tensor:
        """Velocity errors `(N,)` of the policy. In training, call it once in `compute_loss`."""
        if self.step_mode == "concat" or not torch.is_grad_enabled():
            return self._errors(denoising, model)
        self._sequential = SequentialErrors(denoising, self.adapter, model, partial(self.accelerator.no_sync, model))
        return self._sequential.errors

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        sequential, self._sequential = self._sequential, None
        if sequential is not None:
            with self.compute_loss_context_manager():
                sequential.backward()
        return loss

    def _weight_bytes(self) -> int:
        """Weights, and of the trained ones gradients and the two moments of Adam, in float32."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        return weights + 12 * self.get_num_trainable_parameters()

    def _activation_bytes(self) -> int:
        """Of the largest micro-batch, if all its videos go through the transformer at once."""
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        return max(
            activation_bytes(
                self.model,
                self.adapter,
                shape,
                num_videos=self.videos_in_step() * self.args.per_device_train_batch_size,
                dtype=half if self.args.bf16 or self.args.fp16 else self.model.dtype,
                checkpointing=bool(self.args.gradient_checkpointing),
            )
            for shape in set(datasets_in(self.train_dataset, self.eval_dataset)[0].shapes)
        )

    def _errors(self, denoising: Denoising, transformer: nn.Module) -> Tensor:
        videos = [denoising] if self.step_mode == "concat" else denoising.one_by_one()
        return torch.cat([video.errors(self.adapter, transformer) for video in videos])
