"""Save and resume a run on every engine; checkpoints hold whole weights, also where training shards them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin
from torch import nn
from transformers import TrainerState
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..parallel.engines import Engine, full_optimizer_state, load_optimizer_state
from .run_folder import RunFolder
from .weights import (
    RUN_KEY,
    check_description,
    checkpoint_directory,
    gather,
    load_head,
    load_weights,
    save_head,
    save_weights,
    trained_weights,
    write_description,
    write_trainer_state,
)


class Checkpointer:
    """
    Writes what is trained into folders, and reads it back into the same modules.

    Args:
        transformer (`ModelMixin`): The policy. Its weights may be sharded later, in place.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        trained_head (`torch.nn.Module`, *optional*): The head that is trained with the transformer.
        engine (`str`): What shards weights and optimizer states, if anything does.
        base_model (`str`): Where the base weights are from.
        expert (`str`, *optional*): Which of a pipeline's several transformers is trained.
        folder ([`RunFolder`]): The output folder.
        description (`dict`): What a checkpoint must agree on with a trainer that resumes it; see `describe_run`.
        should_save (`bool`): Whether this process writes files. Every process must call the methods alike.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        *,
        adapter_name: str | None,
        trained_head: nn.Module | None,
        engine: Engine,
        base_model: str,
        expert: str | None,
        folder: RunFolder,
        description: dict[str, Any],
        should_save: bool,
    ) -> None:
        self.transformer, self.adapter_name, self.trained_head = transformer, adapter_name, trained_head
        self.engine, self.base_model, self.expert, self.description = engine, base_model, expert, description
        self.folder = folder
        self.should_save = should_save

    # ---- Resuming ----

    @contextmanager
    def opened(self, resume: str | bool | None, *, overwrite: bool) -> Iterator[Path | None]:
        """
        Open the output folder for a run, on the main process, and tell all where it starts; see [`RunFolder`].

        Args:
            resume (`str` or `bool`, *optional*): As of `train(resume_from_checkpoint=...)`.
            overwrite (`bool`): Whether what another run left there is deleted when a new one starts.

        Yields:
            `Path` or `None`: The checkpoint to start from.

        Raises:
            ValueError: The folder holds another run, or is in use; there is no whole checkpoint; or it is of another
                model, base or adapter. Every process raises it.
        """
        failure: Exception | None = None
        shared: list[Any] = [None, None, None]
        with ExitStack() as stack:
            if PartialState().is_main_process:
                try:
                    checkpoint = stack.enter_context(self.folder.opened(resume, overwrite=overwrite))
                    shared = [checkpoint and str(checkpoint), self.folder.lineage, None]
                except (ValueError, OSError) as error:
                    failure, shared = error, [None, None, str(error)]
            broadcast_object_list(shared)
            start, self.folder.lineage, message = shared
            if message is not None:
                raise failure or ValueError(message)
            if start is not None:
                check_description(Path(start), self.description)
            yield start and Path(start)

    def load(self, directory: Path) -> None:
        """Read the trained weights, those of the head included."""
        load_weights(self.transformer, directory, self.adapter_name)
        if self.trained_head is not None:
            load_head(self.trained_head, directory)

    def load_sharded(self, directory: Path, engine: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """
        Read weights and optimizer states into what FSDP2 or DeepSpeed has sharded.

        Args:
            directory (`Path`): The checkpoint.
            engine (`DeepSpeedEngine`): The policy as it is wrapped.
            optimizer, scheduler: Of the trainer, prepared.
        """
        if self.engine == "fsdp2":
            self.load(directory)
            states = [
                torch.load(directory / name, map_location="cpu", weights_only=True, mmap=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            ]
            load_optimizer_state(optimizer, states[0])
            scheduler.load_state_dict(states[1])
        else:  # weights and optimizer in one; frozen weights are not in the file
            deepspeed_load_checkpoint(engine, str(directory), load_module_strict=False)
            if self.trained_head is not None:  # which is not in the file of the weights either
                load_head(self.trained_head, directory)

    # ---- Saving ----

    def save(self, directory: Path) -> None:
        """Write the trained weights, whole, and the description of the run."""
        weights = gather(trained_weights(self.transformer, self.adapter_name), keep=self.should_save)
        if self.should_save:
            directory.mkdir(parents=True, exist_ok=True)
            write_description(directory, self.description | {RUN_KEY: self.folder.run})
            save_weights(self.transformer, directory, self.adapter_name, self.base_model, weights, self.expert)

    def save_sharded_optimizer(
        self, directory: str, engine: Any, optimizer: torch.optim.Optimizer, scheduler: Any
    ) -> None:
        """Write optimizer states that are sharded, without the weights that are frozen, or saved already."""
        if self.engine == "fsdp2":
            # As one process would write it: a run can be resumed on any number of processes, with FSDP2 or without.
            state = full_optimizer_state(optimizer)
            if self.should_save:
                torch.save(state, os.path.join(directory, OPTIMIZER_NAME))
        else:
            engine.save_checkpoint(directory, exclude_frozen_parameters=True)
        if self.should_save:
            torch.save(scheduler.state_dict(), os.path.join(directory, SCHEDULER_NAME))

    @contextmanager
    def checkpoint(
        self, final: Path, accelerator: Accelerator, state: TrainerState, exportable: Sequence[Any]
    ) -> Iterator[str]:
        """
        A folder to write a checkpoint into. On leaving, the rest of it is written and the folder gets its name.

        Args:
            final (`Path`): `<output_dir>/checkpoint-<step>`.
            accelerator (`Accelerator`): Lets the processes wait for each other.
            state (`TrainerState`): Of the trainer.
            exportable (`Sequence`): Callbacks and the control, whose states go into `state`.

        Yields:
            `str`: The folder. If writing fails it is removed, and nothing is published.
        """
        with checkpoint_directory(final, accelerator, should_save=self.should_save) as partial:
            yield str(partial)
            if self.trained_head is not None:
                weights = gather(self.trained_head.state_dict(keep_vars=True), keep=self.should_save)
                if self.should_save:
                    save_head(weights, partial)
            if self.should_save:
                write_trainer_state(state, exportable, partial, final)
