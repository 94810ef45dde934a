"""What `transformers.Trainer` cannot do for a video transformer. No loss, no method, no model family in here."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import DistributedType
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data import check_columns
from ..data.columns import MapDataset
from .base_config import VideoConfig
from .callbacks import LogVideosCallback
from .checkpoints.weights import describe_run
from .parallel.engines import SHARDED, check_set_up, offloads_weights, requested_engine, whole_weights
from .parallel.mesh import (
    check_context_parallel_method,
    check_context_parallelism,
    enable_context_parallelism,
    make_mesh,
)
from .parallel.processes import leave_at_exit
from .planning.estimate import Placement, ReferencePass, Workload, accelerator_memory, advise
from .publishing.evaluator import Evaluator, log_evaluator, run_evaluator
from .publishing.progress import ProgressReport
from .publishing.run_card import ModelCardCallback, base_model_name
from .publishing.uploader import _SharingTrainer
from .repa.head import AUXILIARY, add_to_optimizer, attach_auxiliary, describe_auxiliary, give_own_learning_rate
from .setup.adapt import adapt_for_trainer
from .setup.arguments import check_arguments, check_generation
from .setup.attention_and_compile import check_acceleration, compile_blocks, set_attention_backend
from .setup.loaders import MICRO_BATCH, describe_order, make_loader
from .setup.lora import adapter_configs, attach_lora, check_adapters, disable_dropout, train_all_weights
from .setup.models import find_family, load_model
from .setup.quantization import keep_weights_quantised
from .setup.rows import (
    IndexedDataset,
    datasets_in,
    for_each,
    generation_kwargs,
    prepare_rows,
    resolve_max_sequence_length,
    resolve_timestep_shift,
    video_fps,
)
from .step.metrics import MetricStore
from .step.nan_guard import FiniteLossGuard
from .step.noise import EVALUATION_STEP, NoiseDraw, draw_noise, to_device
from .step.reference import ModuleReference, Reference, check_ref_model, make_reference


logger = logging.getLogger(__name__)


class VideoTrainer(_SharingTrainer):
    """
    Plumbing of all video trainers: model and data preparation, noise streams, the reference, metrics, checkpoints.

    A subclass names its configuration, row type and collator, and writes out a complete `compute_loss`, whose outputs
    include the `losses` `(B,)` of the samples.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`):
            `"sandbox"`, a repository id or path of a pipeline in diffusers layout, a pipeline, or a bare transformer
            (then the datasets must be encoded already). Its transformer is trained in place: `trainer.model` is
            `pipeline.transformer`.
        args (`VideoConfig`, *optional*):
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
            Called once in every evaluation, on the main process, with the pipeline. With one, evaluation needs no
            `eval_dataset`.

    Raises:
        ValueError: If an argument does not fit; always before anything is encoded or trained.
    """

    # What a method says of itself; command line, dry run, estimate and model card ask for it here.
    method_name: ClassVar[str]  # ends the name of the default output folder
    tag: ClassVar[str]  # among the tags of the model card
    summary: ClassVar[str]  # completes "trained by ..." on the model card; markdown
    citation: ClassVar[str | None] = None  # BibTeX
    config_class: ClassVar[type[VideoConfig]]
    row_type: ClassVar[str]  # of the dataset: "video", "preference" or "group"
    collator_class: ClassVar[type]
    uses_reference: ClassVar[bool]
    aligns_with_teacher: ClassVar[bool] = False  # a relation loss on hidden states takes memory of its own
    workload_options: ClassVar[tuple[str, ...]] = ()  # options of the configuration that `videos_per_row` reads

    loss_is_scaled_for_ga = False  # `compute_loss` returns a mean over the micro-batch; Trainer divides it

    def __init__(
        self,
        model: str | os.PathLike[str] | DiffusionPipeline | ModelMixin,
        args: VideoConfig | None = None,
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
        self.engine = requested_engine(args)
        check_generation(self.engine, args, evaluator, callbacks)
        for dataset in datasets_in(train_dataset, eval_dataset):
            self.check_dataset(dataset)
        self.begin_sharing(datasets_in(train_dataset, eval_dataset)[0])

        # Everything that can be refused is refused here; the transformer is not touched before the data are ready.
        with whole_weights():
            self.pipeline, transformer = load_model(model, args)
        self.family = find_family(self.pipeline, transformer)
        self.base_model = base_model_name(model, transformer)
        prompt_length = self.family.prompt_length(transformer)
        self.max_sequence_length = resolve_max_sequence_length(args, self.pipeline, prompt_length)
        self.timestep_shift = resolve_timestep_shift(args, self.pipeline)
        self.evaluator = evaluator
        if evaluator is not None and self.pipeline is None:
            raise ValueError("`evaluator` needs a pipeline to generate with; pass one as `model`, not a transformer.")
        check_adapters(transformer, args, peft_config)
        check_context_parallel_method(transformer, self.family, args)
        check_acceleration(transformer, args)
        check_ref_model(transformer, ref_model)

        prepare = partial(self.prepare_dataset, transformer=transformer)
        with whole_weights():
            prepared_train, prepared_eval = for_each(prepare, train_dataset), for_each(prepare, eval_dataset)
        shapes = {shape for rows in datasets_in(prepared_train, prepared_eval) for shape in rows.shapes}
        check_context_parallelism(transformer, self.family, shapes, args)

        adapt_for_trainer(transformer, args.checkpointing_policy)
        self._prepare_weights(transformer, ref_model, peft_config)
        separate = self.reference.transformer if isinstance(self.reference, ModuleReference) else None
        self._description = describe_run(transformer, self.adapter_name, args.seed, separate)
        self._description["order"] = None if prepared_train is None else describe_order(prepared_train, args)
        self.auxiliary = self.make_auxiliary(transformer)
        if self.auxiliary is not None:
            attach_auxiliary(transformer, self.auxiliary)
            self._description[AUXILIARY] = describe_auxiliary(self.auxiliary)
        self._prepare_passes(transformer, separate)
        self._metrics = {"train": MetricStore(), "eval": MetricStore()}
        self._counted = True  # whether the rows at hand count, or stand in for rows that a step lacks
        super().__init__(
            model=transformer,
            args=args,
            data_collator=data_collator or self.collator_class(self.family, self.max_sequence_length),
            train_dataset=prepared_train,
            # Without rows an evaluation is the evaluator's; Trainer takes no dataset for a mistake.
            eval_dataset={} if prepared_eval is None and evaluator is not None else prepared_eval,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.accelerator.num_processes > 1:
            leave_at_exit()
        check_set_up(self.engine, self.accelerator)
        if self.auxiliary is not None and self.optimizer is not None:
            add_to_optimizer(self.optimizer, self.auxiliary, self.auxiliary_learning_rate())
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        self._guard = FiniteLossGuard(self.accelerator, lambda row: {"prompt": self.train_dataset[row].get("prompt")})
        self.add_callback(self._guard)
        self.add_callback(self._card)
        self.callback_handler.callbacks.insert(0, ProgressReport(self.accelerator))  # the others show what it adds
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
            self.adapter_name = attach_lora(transformer, self.args, peft_config, self.family)
        else:
            train_all_weights(transformer)
        disable_dropout(transformer)
        self.reference: Reference | None = None
        if self.uses_reference:
            self.reference = make_reference(
                transformer, ref_model, adapter_name=self.adapter_name, continues_adapter=continues_adapter
            )

    def _prepare_passes(self, transformer: ModelMixin, separate: ModelMixin | None) -> None:
        """Decide on which processes and with which kernels policy and reference compute."""
        self.mesh = make_mesh(self.args)
        for module in (transformer, separate):
            if module is not None:
                keep_weights_quantised(module)
                # Compiled first, so that the hooks by which tokens are shared stay outside; kernels are chosen last,
                # because sharing tokens exchanges what computes attention.
                compile_blocks(list(self.family.blocks(module)), enabled=self.args.compile_blocks)
                if self.args.context_parallel_size > 1:
                    assert self.mesh is not None
                    enable_context_parallelism(module, self.family, self.mesh)
                if self.args.attention_backend is not None:
                    set_attention_backend(module, self.args.attention_backend)

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
            family=self.family,
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
        return cls.make_auxiliary is not VideoTrainer.make_auxiliary

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
        self, indices: Iterable[int], latents_shape: Sequence[int], *, num_noises: int = 1, num_choices: int = 1
    ) -> NoiseDraw:
        """
        Random numbers of a batch, a function of (seed, step, sample index) only.

        Args:
            indices (`Iterable[int]`): Positions of the B samples in their dataset; a tensor must be on the CPU.
            latents_shape (`Sequence[int]`): Shape `(C, F, H, W)` of the latents of one video.
            num_noises (`int`, defaults to `1`): Independent noises per sample.
            num_choices (`int`, defaults to `1`): Number of options that `choice` selects from.

        Returns:
            [`NoiseDraw`]: Choice and noise on the trainer's device, u on the CPU, where timesteps are made of it.
        """
        numbers = [int(index) for index in indices]
        steps = self.noise_steps(numbers)
        drawn = draw_noise(
            self.args.seed, steps, numbers, latents_shape, num_noises=num_noises, num_choices=num_choices
        )
        return NoiseDraw(drawn.u, *to_device(self.args.device, drawn.choice, drawn.noise))

    def noise_steps(self, indices: Sequence[int]) -> list[int]:
        """The step under which each sample draws: the optimizer's in training, always the same one in evaluation."""
        return [self.state.global_step if self.model.training else EVALUATION_STEP] * len(indices)

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Timesteps `(B,)` on the model's scale and the trainer's device, by the configured law, from u `(B,)`."""
        timesteps = self.family.noise_process.sample_timesteps(
            u,
            scheme=self.args.timestep_sampling,
            shift=self.timestep_shift,
            logit_mean=self.args.timestep_logit_mean,
            logit_std=self.args.timestep_logit_std,
        )
        return to_device(self.args.device, timesteps)[0]

    def conditions(self, inputs: Mapping[str, Tensor], repeats: int = 1) -> dict[str, Tensor]:
        """What the transformer is conditioned on, each sample's `repeats` times in a row: `(B * repeats, ...)`."""
        return {name: inputs[name].repeat_interleave(repeats, dim=0) for name in self.family.condition_columns}

    def reference_policy(self) -> AbstractContextManager[nn.Module]:
        """Context in which the module it yields predicts as the reference does; enter it under `torch.no_grad()`."""
        assert self.reference is not None, "only trainers with `uses_reference` have one"
        return self.reference()

    def record(self, name: str, values: Tensor) -> None:
        """Add per-sample values, of any shape with the batch first, to the metric `name` of the next log."""
        self._metrics["train" if self.model.training else "eval"].record(name, values if self._counted else values[:0])

    # ---- Training and evaluation ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`; where memory runs out, what would fit is logged before the error goes on."""
        try:
            return super().train(*args, **kwargs)
        except torch.OutOfMemoryError:
            logger.error("%s", advise(self.workload(), self.placement(), accelerator_memory(self.args.device)))
            raise

    @classmethod
    def videos_per_row(cls, args: Any, num_rejected: int) -> int:
        """
        Number of videos that the loss of one row looks at: what dry run, estimate and trainer plan memory with.

        Args:
            args: A configuration, or any object with the options of it that `workload_options` names.
            num_rejected (`int`): Rejected videos of the row; 0 for a row of the video type.
        """
        return 1

    def videos_in_step(self) -> int:
        """Number of videos that the loss of one row looks at, by the first row."""
        row = datasets_in(self.train_dataset, self.eval_dataset)[0][0]
        return self.videos_per_row(self.args, len(row.get("rejected_latents", ())))

    def workload(self) -> Workload:
        """What is trained, as the planner describes it; of several sizes of videos, the largest."""
        largest = max(datasets_in(self.train_dataset, self.eval_dataset)[0].shapes, key=math.prod)
        copied = isinstance(self.reference, ModuleReference)
        reference: ReferencePass = "none" if self.reference is None else "copy" if copied else "adapter"
        sharing = self.args.processes_per_row // self.args.context_parallel_size
        workload = Workload.of(self.model, largest, self.videos_in_step() // sharing, self.args, reference)
        return replace(workload, prompt_tokens=self.max_sequence_length)

    def placement(self) -> Placement:
        """Where and how it is trained, as the planner describes it."""
        policy = self.args.checkpointing_policy if self.args.gradient_checkpointing else None
        return Placement(
            num_gpus=self.args.world_size,
            engine="zero3-offload" if offloads_weights(self.accelerator) else self.engine,
            context_parallel=self.args.context_parallel_size,
            checkpointing_policy=policy,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one shape, shuffled; see [`~video_trl.data.buckets.BucketBatchSampler`]."""
        return make_loader(self.train_dataset, self.data_collator, self.args, training=True)

    def get_eval_dataloader(self, eval_dataset: IndexedDataset | str | None = None) -> DataLoader:
        """Batches of one shape of the dataset, or of `self.eval_dataset` or the one of that name in it."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return make_loader(rows, self.data_collator, self.args, training=False)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the loader put them on the device; Trainer would round all numbers, scores too, for DeepSpeed in bf16."""
        return inputs

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        batch = inputs.pop(MICRO_BATCH)
        self._counted = batch.counted
        if not batch.counted and not self.accelerator.sync_gradients and self.engine not in SHARDED:
            return torch.zeros((), device=self.args.device)  # no other process waits for this one
        # Trainer divides the loss by this number, which it takes for that of equal micro-batches.
        self.current_gradient_accumulation_steps = batch.divisor(self.args.data_parallel_size)
        self._guard.watch_samples(inputs["index"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # there it was looked at before the update
            self._guard.watch_loss(loss)
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
        self._guard.check(self.args, self.state)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = self._metrics["eval"].pop(self.accelerator) | run_evaluator(self)
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
        if self.engine != "ddp" and self.model_wrapped is self.model and self.optimizer is None:
            raise ValueError(
                f"The engine '{self.engine}' evaluates in the course of a training or after it. To evaluate only, "
                "launch without it."
            )
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict | IndexedDataset):
            self.check_dataset(eval_dataset)
            eval_dataset = self.prepare_dataset(eval_dataset, self.model)
        if not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        evaluator, self.evaluator = self.evaluator, None  # once for all datasets, not with each of them
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.evaluator = evaluator
        return metrics | log_evaluator(self, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._guard.check(self.args, self.state)
        # Only the logs of training steps carry "loss"; the metrics of evaluation are in `logs` already.
        if "loss" in logs:
            logs = {**logs, **self._metrics["train"].pop(self.accelerator)}
        super().log(logs, start_time)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        super().add_callback(callback)
        if isinstance(callback, LogVideosCallback | ModelCardCallback):
            callback.set_trainer(self)

    # ---- Generating ----

    def generation_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that make videos of the size, and with the prompt padding, of the data."""
        rows = datasets_in(self.train_dataset, self.eval_dataset)[0]
        return generation_kwargs(rows, self.pipeline, self.max_sequence_length)

    def video_fps(self) -> float:
        """Frames per second of the training videos; 16 where that is not known."""
        return video_fps(datasets_in(self.train_dataset, self.eval_dataset)[0], self.args)
