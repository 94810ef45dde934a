"""How trainers save and resume, on every engine: what shards the weights in training, checkpoints hold whole ones."""

import logging
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..base_config import VideoConfig
from ..parallel.engines import DeepSpeedSteps, Engine, configure_fsdp, full_optimizer_state, load_optimizer_state
from ..step.nan_guard import FiniteLossGuard
from .weights import (
    check_description,
    checkpoint_directory,
    find_checkpoint,
    gather,
    load_auxiliary,
    load_weights,
    save_auxiliary,
    save_weights,
    trained_weights,
    write_description,
    write_trainer_state,
)


logger = logging.getLogger(__name__)


class _SavingTrainer(Trainer):
    """
    `transformers.Trainer` with checkpoints of this package. The constructor of the subclass sets the attributes.

    Attributes:
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        auxiliary (`torch.nn.Module`, *optional*): What is trained beside the transformer.
        base_model (`str`): Where the base weights are from.
        engine (`str`): What shards weights and optimizer states, if anything does.
    """

    args: VideoConfig
    adapter_name: str | None
    auxiliary: nn.Module | None
    base_model: str
    engine: Engine
    _description: dict[str, Any]
    _guard: FiniteLossGuard

    @abstractmethod
    def _write_card(self, directory: Path) -> None:
        """Write the model card into a folder, if there is an adapter to describe."""

    # ---- Starting, anew or from a checkpoint ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`; a `ValueError` if there is nothing to train on or to resume from."""
        if self.train_dataset is None:
            raise ValueError("Expected a `train_dataset` to train on, got an `eval_dataset` only. Pass both.")
        checkpoint = find_checkpoint(resume_from_checkpoint, Path(self.args.output_dir))
        if checkpoint is not None:
            check_description(Path(checkpoint), self._description)
        return super().train(checkpoint, *args, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """As in `transformers.Trainer`, which would load from FSDP and DeepSpeed what is not in our checkpoints."""
        if self.engine == "ddp":
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.engine == "fsdp2":
            configure_fsdp(self.accelerator, self.model)
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.engine != "fsdp2":
            self.accelerator.deepspeed_engine_wrapped = DeepSpeedSteps(
                model, self._guard, lambda: self._guard.check_losses(self.args, self.state)
            )
        if resume_from_checkpoint is not None:
            self._resume_sharded(resume_from_checkpoint)
        return model, loader

    def _resume_sharded(self, checkpoint: str) -> None:
        if self.engine == "fsdp2":
            self._load_weights(Path(checkpoint))
            states = [
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True, mmap=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            ]
            load_optimizer_state(self.optimizer, states[0])
            self.lr_scheduler.load_state_dict(states[1])
        else:  # weights and optimizer in one; frozen weights are not in the file
            deepspeed_load_checkpoint(self.model_wrapped, checkpoint, load_module_strict=False)
            if self.auxiliary is not None:  # which is not in the file of the weights either
                load_auxiliary(self.auxiliary, Path(checkpoint))
            self._load_optimizer_and_scheduler(checkpoint)
        self._load_scaler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("Loading the best weights, from %s.", self.state.best_model_checkpoint)
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, directory: Path) -> None:
        load_weights(self.model, directory, self.adapter_name)
        if self.auxiliary is not None:
            load_auxiliary(self.auxiliary, directory)

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, whole, into a folder; all processes must call this."""
        weights = gather(trained_weights(self.model, self.adapter_name), keep=self.args.should_save)
        self._save(output_dir, weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, directory, self.adapter_name, self.base_model, state_dict)
        write_description(directory, self._description)
        (directory / "training_args.json").write_text(self.args.to_json_string())
        self._write_card(directory)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `transformers.Trainer`, but under a temporary name until the checkpoint is complete."""
        self._guard.check(self.args, self.state)
        self.store_flos()
        run_directory = Path(self._get_output_dir(trial=trial))
        final = run_directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_directory(final, self.accelerator, should_save=self.args.should_save) as partial:
            self.save_model(str(partial), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            if self.auxiliary is not None:
                weights = gather(self.auxiliary.state_dict(keep_vars=True), keep=self.args.should_save)
                if self.args.should_save:
                    save_auxiliary(weights, partial)
            if self.args.should_save:
                exportable = [*self.callback_handler.callbacks, self.control]
                write_trainer_state(self.state, exportable, partial, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_directory),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in `transformers.Trainer`, but without a second copy of the weights that are frozen, or saved already."""
        if self.engine == "ddp":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.engine == "fsdp2":
            # As one process would write it: a run can be resumed on any number of processes, with FSDP2 or without.
            state = full_optimizer_state(self.optimizer)
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
        else:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
