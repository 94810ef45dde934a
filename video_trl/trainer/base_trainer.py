"""What `transformers.Trainer` cannot do for a video transformer. No loss, no method, no model family in here."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from ..data import check_columns
from ..data.columns import MapDataset
from .arguments import check_arguments
from .auxiliary import AUXILIARY, add_to_optimizer, attach_auxiliary, describe_auxiliary, give_own_learning_rate
from .base_config import _BaseVideoConfig
from .callbacks import LogVideosCallback
from .card import CARD_NAME, adapter_card, base_model_name, copy_published_files
from .checkpointing import (
    check_description,
    checkpoint_directory,
    describe_run,
    find_checkpoint,
    load_auxiliary,
    load_weights,
    save_auxiliary,
    save_weights,
    write_description,
    write_trainer_state,
)
from .finite import FiniteLossGuard
from .generation import generation
from .loaders import MICRO_BATCH, describe_order, make_loader
from .loading import find_adapter, load_model
from .lora import adapter_configs, attach_lora, check_adapters, disable_dropout, train_all_weights
from .metrics import MetricStore
from .noise import EVALUATION_STEP, NoiseDraw, draw_noise
from .reference import ModuleReference, Reference, check_ref_model, make_reference
from .rows import (
    IndexedDataset,
    datasets_in,
    for_each,
    generation_kwargs,
    prepare_rows,
    resolve_max_sequence_length,
    resolve_timestep_shift,
    video_fps,
)
from .shims import adapt_for_trainer


logger = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Measure a pipeline, usually by generating videos and judging them."""

    def __call__(self, pipeline: DiffusionPipeline, *, output_dir: str, step: int) -> Mapping[str, float]:
        """Return metrics by name; they are logged as `eval_<name>` and can select the best checkpoint."""


class _BaseVideoTrainer(Trainer):
    """
    Plumbing of all video trainers: model and data preparation, noise streams, the reference, metrics, checkpoints.

    A subclass names its configuration, row type and collator, and writes out a complete `compute_loss`, whose outputs
    include the `losses` `(B,)` of the samples.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`):
            `"sandbox"`, a repository id or path of a pipeline in diffusers layout, a pipeline, or a bare transformer
            (then the datasets must be encoded already). Its transformer is trained in place: `trainer.model` is
            `pipeline.transformer`.
        args (`_BaseVideoConfig`, *optional*):
            Arguments; the trainer's own config class with its defaults.
        train_dataset (`datasets.Dataset`, `EncodedDataset` or list of dicts, *optional*):
            Rows, raw or encoded. Raw ones are encoded here, once, and cached.
        eval_dataset (like `train_dataset`, or a dict of such, *optional*):
            Rows to evaluate on.
        ref_model (`ModelMixin` or `DiffusionPipeline`, *optional*):
            Reference, for the trainers that have one; see `make_reference` for what stands in for it.
        peft_config (`peft.LoraConfig`, *optional*):
            Adapter to train instead of the default one.
        data_collator (`Callable`, *optional*):
            Replaces the trainer's collator; must hand on `"index"`.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks, as for `transformers.Trainer`.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler, as for `transformers.Trainer`.
        evaluator ([`Evaluator`], *optional*):
            Called in every evaluation, on the main process, with the pipeline.

    Raises:
        ValueError: If an argument does not fit; always before anything is encoded or trained.
    """

    _name: ClassVar[str]
    _tag: ClassVar[str]
    _method: ClassVar[str]
    _citation: ClassVar[str | None] = None
    config_class: ClassVar[type[_BaseVideoConfig]]
    row_type: ClassVar[str]
    collator_class: ClassVar[type]
    uses_reference: ClassVar[bool]

    loss_is_scaled_for_ga = False  # `compute_loss` returns a mean over the micro-batch; Trainer divides it

    def __init__(
        self,
        model: str | os.PathLike[str] | DiffusionPipeline | ModelMixin,
        args: _BaseVideoConfig | None = None,
        train_dataset: MapDataset | None = None,
        eval_dataset: MapDataset | dict[str, MapDataset] | None = None,
        *,
        ref_model: ModelMixin | DiffusionPipeline | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        evaluator: Evaluator | None = None,
    ) -> None:
        args = check_arguments(
            type(self), model, args, train_dataset, eval_dataset, ref_model, peft_config, optimizers
        )
        self.args = args
        for dataset in datasets_in(train_dataset, eval_dataset):
            self.check_dataset(dataset)

        # Everything that can be refused is refused here; the transformer is not touched before the data are ready.
        self.pipeline, transformer = load_model(model, args)
        self.adapter = find_adapter(self.pipeline, transformer)
        self.base_model = base_model_name(model, transformer)
        self.max_sequence_length = resolve_max_sequence_length(
            args, self.pipeline, self.adapter.prompt_length(transformer)
        )
        self.timestep_shift = resolve_timestep_shift(args, self.pipeline)
        self.evaluator = evaluator
        if evaluator is not None and self.pipeline is None:
            raise ValueError("`evaluator` needs a pipeline to generate with; pass one as `model`, not a transformer.")
        check_adapters(transformer, args, peft_config)
        check_ref_model(transformer, ref_model)

        prepare = partial(self.prepare_dataset, transformer=transformer)
        prepared_train, prepared_eval = for_each(prepare, train_dataset), for_each(prepare, eval_dataset)

        adapt_for_trainer(transformer)
        self._prepare_weights(transformer, ref_model, peft_config)
        separate = self.reference.transformer if isinstance(self.reference, ModuleReference) else None
        self._description = describe_run(transformer, self.adapter_name, args.seed, separate)
        self._description["order"] = None if prepared_train is None else describe_order(prepared_train, args)
        self.auxiliary = self.make_auxiliary(transformer)
        if self.auxiliary is not None:
            attach_auxiliary(transformer, self.auxiliary)
            self._description[AUXILIARY] = describe_auxiliary(self.auxiliary)
        self._metrics = {"train": MetricStore(), "eval": MetricStore()}
        self._counted = True  # whether the rows at hand count, or stand in for rows that a step lacks
        super().__init__(
            model=transformer,
            args=args,
            data_collator=data_collator or self.collator_class(self.adapter, self.max_sequence_length),
            train_dataset=prepared_train,
            eval_dataset=prepared_eval,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.auxiliary is not None and self.optimizer is not None:
            add_to_optimizer(self.optimizer, self.auxiliary, self.auxiliary_learning_rate())
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        self._guard = FiniteLossGuard(self.accelerator, self._describe_sample)
        self.add_callback(self._guard)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LogVideosCallback):
                callback.set_trainer(self)

    # ---- Preparation ----

    def _prepare_weights(
        self,
        transformer: ModelMixin,
        ref_model: ModelMixin | DiffusionPipeline | None,
        peft_config: PeftConfig | None,
    ) -> None:
        """Decide what is trained and what the reference is."""
        set_seed(self.args.seed)  # the weights of a new adapter are random
        continues_adapter = bool(adapter_configs(transformer))
        self.adapter_name: str | None = None
        if self.args.use_peft:
            self.adapter_name = attach_lora(transformer, self.args, peft_config, self.adapter)
        else:
            train_all_weights(transformer)
        disable_dropout(transformer)
        self.reference: Reference | None = None
        if self.uses_reference:
            self.reference = make_reference(
                transformer, ref_model, adapter_name=self.adapter_name, continues_adapter=continues_adapter
            )

    def check_dataset(self, dataset: MapDataset) -> None:
        """Raise a `ValueError` if a dataset, raw or encoded, cannot feed this trainer. Reads no pixels."""
        check_columns(dataset, self.row_type)

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        """Encode a raw dataset, or take an encoded one as it is, check its latents and number its rows."""
        return prepare_rows(
            dataset,
            self.row_type,
            self.args,
            pipeline=self.pipeline,
            transformer=transformer,
            adapter=self.adapter,
            max_sequence_length=self.max_sequence_length,
        )

    def make_auxiliary(self, transformer: ModelMixin) -> nn.Module | None:
        """
        A module to train beside the transformer and to throw away afterwards, such as a projection head; none here.

        A subclass calls it from within the transformer's forward (a forward hook on a block): only then does it take
        part in distributed training. It becomes the submodule `auxiliary` of the transformer, in float32 and without
        dropout. Checkpoints hold it, as `auxiliary.safetensors`; adapters, saved transformers and published files
        do not. Gradient norms are clipped together.

        Args:
            transformer (`ModelMixin`): The policy, in the form in which it is trained. The global generators are
                seeded, so that the new weights are a function of `args.seed`.
        """
        return None

    @classmethod
    def has_auxiliary(cls) -> bool:
        """Whether trainers of this class have an auxiliary module."""
        return cls.make_auxiliary is not _BaseVideoTrainer.make_auxiliary

    def auxiliary_learning_rate(self) -> float | None:
        """Initial learning rate of the auxiliary module, scheduled like the other; none: `args.learning_rate`."""
        return None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        given = self.optimizer is not None
        optimizer, rate = super().create_optimizer(model), self.auxiliary_learning_rate()
        if not given and self.auxiliary is not None and rate is not None:
            give_own_learning_rate(optimizer, self.auxiliary, rate)
        return optimizer

    # ---- Building blocks of compute_loss ----

    def draw(
        self, indices: Tensor, latents_shape: Sequence[int], *, num_noises: int = 1, num_choices: int = 1
    ) -> NoiseDraw:
        """
        Random numbers of a batch, a function of (seed, step, sample index) only.

        Args:
            indices (`torch.Tensor` of shape `(B,)`): The samples' positions in their dataset.
            latents_shape (`Sequence[int]`): Shape `(C, F, H, W)` of the latents of one video.
            num_noises (`int`, defaults to `1`): Independent noises per sample.
            num_choices (`int`, defaults to `1`): Number of options that `choice` selects from.

        Returns:
            [`NoiseDraw`]: On the device of `indices`.
        """
        step = self.state.global_step if self.model.training else EVALUATION_STEP
        drawn = draw_noise(
            self.args.seed, step, indices.tolist(), latents_shape, num_noises=num_noises, num_choices=num_choices
        )
        return NoiseDraw(*(tensor.to(indices.device) for tensor in (drawn.u, drawn.choice, drawn.noise)))

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Timesteps `(B,)` float32 on the model's scale, by the configured law, from uniform numbers `(B,)`."""
        return self.adapter.noise_process.sample_timesteps(
            u,
            scheme=self.args.timestep_sampling,
            shift=self.timestep_shift,
            logit_mean=self.args.timestep_logit_mean,
            logit_std=self.args.timestep_logit_std,
        )

    def conditions(self, inputs: Mapping[str, Tensor], repeats: int = 1) -> dict[str, Tensor]:
        """What the transformer is conditioned on, each sample's `repeats` times in a row: `(B * repeats, ...)`."""
        return {name: inputs[name].repeat_interleave(repeats, dim=0) for name in self.adapter.condition_columns}

    def reference_policy(self) -> AbstractContextManager[nn.Module]:
        """Context in which the module it yields predicts as the reference does; enter it under `torch.no_grad()`."""
        assert self.reference is not None, "only trainers with `uses_reference` have one"
        return self.reference()

    def record(self, name: str, values: Tensor) -> None:
        """Add per-sample values, of any shape with the batch first, to the metric `name` of the next log."""
        self._metrics["train" if self.model.training else "eval"].record(name, values if self._counted else values[:0])

    # ---- Training and evaluation ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`; a `ValueError` if there is nothing to train on or to resume from."""
        if self.train_dataset is None:
            raise ValueError("Expected a `train_dataset` to train on, got an `eval_dataset` only. Pass both.")
        checkpoint = find_checkpoint(resume_from_checkpoint, Path(self.args.output_dir))
        return super().train(checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one shape, shuffled; see [`~video_trl.data.buckets.BucketBatchSampler`]."""
        return make_loader(self.train_dataset, self.data_collator, self.args, training=True)

    def get_eval_dataloader(self, eval_dataset: IndexedDataset | str | None = None) -> DataLoader:
        """Batches of one shape of the dataset, or of `self.eval_dataset` or the one of that name in it."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return make_loader(rows, self.data_collator, self.args, training=False)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        batch = inputs.pop(MICRO_BATCH)
        self._counted = batch.counted
        if not batch.counted and not self.accelerator.sync_gradients:  # no other process waits for these gradients
            return torch.zeros((), device=self.args.device)
        # Trainer divides the loss by this number, which it takes for that of equal micro-batches.
        self.current_gradient_accumulation_steps = batch.divisor(self.args.world_size)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.watch(loss, inputs["index"])
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of a batch, with the noise that evaluation always uses. There are no predictions to return."""
        self._counted = inputs.pop(MICRO_BATCH).counted
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # Trainer's own mean is over batches, which differ in size.
        self.record("loss", outputs["losses"])
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = self._metrics["eval"].pop(self.accelerator)
        if self.evaluator is not None:
            metrics.update(self._run_evaluator(self.evaluator))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def evaluate(
        self,
        eval_dataset: MapDataset | dict[str, MapDataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics on a dataset, raw or encoded; on the trainer's own `eval_dataset` if none is given."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("Expected an `eval_dataset` to evaluate on, got none, here or when the trainer was made.")
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict | IndexedDataset):
            self.check_dataset(eval_dataset)
            eval_dataset = self.prepare_dataset(eval_dataset, self.model)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _run_evaluator(self, evaluator: Evaluator) -> dict[str, float]:
        assert self.pipeline is not None
        result: list[dict[str, float]] = [{}]
        if self.is_world_process_zero():
            with generation(self.pipeline, self.args.device) as pipeline:
                result = [dict(evaluator(pipeline, output_dir=self.args.output_dir, step=self.state.global_step))]
        return broadcast_object_list(result)[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only the logs of training steps carry "loss"; the metrics of evaluation are in `logs` already.
        if "loss" in logs:
            logs = {**logs, **self._metrics["train"].pop(self.accelerator)}
        super().log(logs, start_time)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        super().add_callback(callback)
        if isinstance(callback, LogVideosCallback):
            callback.set_trainer(self)

    def _describe_sample(self, index: int) -> dict[str, Any]:
        return {"prompt": self.train_dataset[index].get("prompt")}

    # ---- Saving and resuming ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, directory, self.adapter_name, self.base_model)
        write_description(directory, self._description)
        (directory / "training_args.json").write_text(self.args.to_json_string())
        self._write_card(directory)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `transformers.Trainer`, but under a temporary name until the checkpoint is complete."""
        self.store_flos()
        run_directory = Path(self._get_output_dir(trial=trial))
        final = run_directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_directory(final, self.accelerator, should_save=self.args.should_save) as partial:
            self.save_model(str(partial), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            if self.args.should_save:
                if self.auxiliary is not None:
                    save_auxiliary(self.auxiliary, partial)
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        check_description(directory, self._description)
        self._load_weights(directory)

    def _load_best_model(self) -> None:
        logger.info("Loading the best weights, from %s.", self.state.best_model_checkpoint)
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, directory: Path) -> None:
        load_weights(self.model, directory, self.adapter_name)
        if self.auxiliary is not None:
            load_auxiliary(self.auxiliary, directory)

    # ---- Sharing ----

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, license: str | None = None
    ) -> None:
        """
        Write the model card into `output_dir`. [`~transformers.Trainer.push_to_hub`] hands its keyword arguments here.

        Args:
            model_name (`str`, *optional*): Title of the card while the repository is not known.
            dataset_name (`str`, *optional*): What the adapter was trained on, such as a repository id.
            license (`str`, *optional*): Licence identifier of the adapter, such as `"apache-2.0"`.
        """
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), model_name, dataset_name=dataset_name, license=license)

    def generation_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that make videos of the size, and with the prompt padding, of the data."""
        rows = datasets_in(self.train_dataset, self.eval_dataset)[0]
        return generation_kwargs(rows, self.pipeline, self.max_sequence_length)

    def video_fps(self) -> float:
        """Frames per second of the training videos; 16 where that is not known."""
        return video_fps(datasets_in(self.train_dataset, self.eval_dataset)[0], self.args)

    def _write_card(self, directory: Path, model_name: str | None = None, **details: str | None) -> None:
        if self.adapter_name is None:  # the card describes how to load an adapter
            return
        rows = datasets_in(self.train_dataset, self.eval_dataset)[0]
        card = adapter_card(
            self.args,
            repo_id=self.hub_model_id or self.args.hub_model_id or model_name or self.args.output_dir,
            base_model=self.base_model,
            method=(self._tag, self._method, self._citation),
            prompt=rows[0].get("prompt"),
            pipeline_class=self.adapter.pipeline_classes[0],
            call_kwargs=self.generation_kwargs(),
            fps=self.video_fps(),
            progress={"optimizer steps": self.state.global_step, "processes": self.args.world_size},
            **details,
        )
        (directory / CARD_NAME).write_text(card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files of transformers' models only, and would upload nothing of ours.
        if self.is_world_process_zero():
            copy_published_files(Path(checkpoint_folder), Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)
