"""Base class of all trainers: prepares model and data, runs steps, saves and resumes. It has no loss."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import DistributedType
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import CommitInfo
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, PredictionOutput, TrainOutput

from ..data import check_columns
from ..data.columns import MapDataset, is_encoded
from ..files import write_atomically
from ..hub import Measurement
from ..models import lora_targets
from ..models.base import weights_dtype
from .base_config import VideoConfig
from .checkpoints.checkpointer import Checkpointer
from .checkpoints.run_folder import RunFolder
from .checkpoints.settings import ARGUMENTS_NAME, METHOD, check_optimizer_state, check_resumable, check_settings
from .checkpoints.signals import StopOnSignal
from .checkpoints.weight_average import WeightAverage
from .checkpoints.weights import describe_run, named_checkpoint, trained_weights
from .parallel.engines import (
    SHARDED,
    DeepSpeedSteps,
    check_set_up,
    configure_fsdp,
    is_deepspeed,
    offloads_weights,
    whole_weights,
)
from .parallel.mesh import check_context_parallel_method, enable_context_parallelism, make_mesh
from .parallel.processes import leave_at_exit
from .planning.estimate import Placement, ReferencePass, Workload, accelerator_memory, advise
from .publishing.evaluator import Evaluator, EvaluatorCalls
from .publishing.printed_log import LogLine, with_progress
from .publishing.run_card import ModelCardCallback, RunFacts, TrainingData, base_model_name
from .publishing.sampling import Sampler, SamplingCallback, tensorboard_writer
from .publishing.uploader import Uploader
from .repa.head import HEAD, add_to_optimizer, attach_head, describe_head, give_own_learning_rate
from .setup.adapt import adapt_for_trainer
from .setup.arguments import check_arguments, check_generation, check_generators
from .setup.attention_and_compile import check_acceleration, compile_blocks, set_attention_backend
from .setup.idle_options import Passed, idle_in_run, tell_idle_options
from .setup.loaders import BATCH_WEIGHT, describe_order, make_loader
from .setup.lora import adapter_configs, attach_lora, check_adapters, disable_dropout, train_all_weights
from .setup.models import find_family, load_model, resolve_timestep_range
from .setup.offloaded_weights import offload_weights
from .setup.optimizers import optimizer_and_options
from .setup.quantization import keep_weights_quantised
from .setup.reference import check_ref_model, make_reference, reference_transformer
from .setup.rows import (
    IndexedDataset,
    check_timesteps,
    datasets_in,
    for_each,
    prepare_rows,
    resolve_max_sequence_length,
    shift_for_sizes,
)
from .setup.startup_proof import GradientProof, check_given_optimizer, check_optimizer, check_trained
from .step.denoising import EVALUATION_STEP, DenoisingStep
from .step.dropout import has_dropout
from .step.metrics import Metrics
from .step.micro_batch import micro_batch
from .step.nan_guard import FiniteLossGuard
from .step.passes import ConcatPasses, ModuleReference, Passes, Reference


logger = logging.getLogger(__name__)


class VideoTrainer(Trainer):
    """
    The base of all video trainers. It prepares model and data and holds the parts of a run.

    A subclass names its configuration, row type and collator, and writes out a complete `compute_loss` with the help
    of `step`, `passes` and `record`. Its outputs include the `losses` `(B,)` of the samples.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`):
            `"sandbox"`, a repository id or path of a pipeline in diffusers layout, a pipeline, or a bare transformer
            (then the datasets must be encoded already). Its transformer is trained in place: `trainer.model` is
            `pipeline.transformer`, or the one that the option `expert` chooses.
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

    Attributes:
        pipeline (`DiffusionPipeline`, *optional*): The pipeline; none for a bare transformer.
        family ([`ModelFamily`]): What differs between families of models.
        expert ([`~video_trl.models.Expert`], *optional*): Which one is trained of a pipeline's several transformers.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        reference ([`Reference`], *optional*): Context manager factory: `with trainer.reference() as module`.
        step ([`DenoisingStep`]): Draws timesteps and noise, makes noisy latents and their target.
        passes ([`Passes`]): Run reference and policy.
        metrics ([`Metrics`]): What has been recorded since the last log.
        checkpointer ([`Checkpointer`]): Saves and resumes.
        average ([`WeightAverage`]): The moving average of the trained weights, if there is one.
        uploader ([`Uploader`]): Sends to the Hub.
        sampler ([`Sampler`]): Lends the pipeline to whoever generates.

    Raises:
        ValueError: If an argument does not fit; always before anything is encoded or trained.
    """

    args: VideoConfig
    control: TrainerControl

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
    workload_options: ClassVar[tuple[str, ...]] = ()  # read by `videos_per_row`, `has_reference`
    printed_metrics: ClassVar[tuple[str, ...]] = ()  # the few that a line has room for, beside the loss

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
        args, self.engine = check_arguments(
            type(self), model, args, train_dataset, eval_dataset, ref_model, peft_config, optimizers, evaluator
        )
        self.args = args = args.with_evaluations(due=eval_dataset is not None and evaluator is None)
        check_generation(self.engine, args, evaluator, callbacks)
        datasets = datasets_in(train_dataset, eval_dataset)
        for dataset in datasets:
            self.check_dataset(dataset)
        self.uploader = Uploader(
            args, announce=lambda: self.callback_handler.on_push_begin(self.args, self.state, self.control)
        )
        if args.push_to_hub:
            self.uploader.open()
        data = TrainingData(datasets[0])  # for the card, before the rows are encoded

        # Everything that can be refused is refused here; the transformer is not touched before the data are ready.
        with whole_weights():
            self.pipeline, transformer, self.expert = load_model(model, args)
        self.family = find_family(self.pipeline, transformer, args.embedded_guidance)
        self.max_sequence_length = resolve_max_sequence_length(args, self.pipeline, self.family, transformer)
        self.timestep_range = resolve_timestep_range(args, self.expert)
        check_timesteps(args, self.pipeline, self.family, self.timestep_range)
        check_generators(self.pipeline, evaluator, callbacks)
        check_adapters(transformer, self.family, peft_config, args)
        check_given_optimizer(transformer, optimizers[0], use_peft=args.use_peft)
        check_context_parallel_method(transformer, self.family, args)
        check_acceleration(
            transformer,
            args.device,
            attention_backend=args.attention_backend,
            compiles=args.compile_blocks,
            half=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )
        reference = reference_transformer(ref_model, self.expert)
        check_ref_model(transformer, reference, use_peft=args.use_peft)
        passed = Passed(bool(adapter_configs(transformer)), peft_config, reference, *optimizers)
        tell_idle_options(args, args.options_without_effect() | self.idle_options(datasets, passed))
        prepare = partial(self.prepare_dataset, transformer=transformer)
        with whole_weights():
            prepared_train, prepared_eval = for_each(prepare, train_dataset), for_each(prepare, eval_dataset)
        rows = datasets_in(prepared_train, prepared_eval)
        shapes = {shape for each in rows for shape in each.shapes}
        self.timestep_shift = shift_for_sizes(args, self.pipeline, self.family, transformer, shapes)

        order = None if prepared_train is None else describe_order(prepared_train, args)
        description = self._prepare_transformer(transformer, reference, peft_config, order)
        self._make_parts(transformer, rows[0], evaluator, base_model_name(model, transformer), description, data)
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
        check_set_up(self.engine, self.accelerator)
        if self.trained_head is not None and self.optimizer is not None:
            add_to_optimizer(self.optimizer, self.trained_head, self.head_learning_rate())
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        self.passes = self.make_passes()
        self._add_callbacks()

    # ---- Preparation ----

    def _prepare_transformer(
        self,
        transformer: ModelMixin,
        ref_model: ModelMixin | None,
        peft_config: PeftConfig | None,
        order: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """
        Decide what is trained, what the reference is, and on which processes and kernels both compute. Returns what a
        checkpoint must agree on with a trainer that resumes it; `order` is a part of it.
        """
        args, family = self.args, self.family
        idle = family.idle_weights(transformer)
        adapt_for_trainer(transformer, args.checkpointing_policy)
        set_seed(args.seed)  # the weights of a new adapter are random
        self.continues_adapter = bool(adapter_configs(transformer))
        self.adapter_name: str | None = None
        if args.use_peft:
            targets = lora_targets(family, transformer, args.lora_target_modules)
            self.adapter_name = attach_lora(transformer, peft_config, targets, **args.new_adapter())
        else:
            train_all_weights(transformer, idle)
        disable_dropout(transformer)
        self.reference: Reference | None = None
        if self.has_reference(args):
            keeps = self.continues_adapter and not args.reference_is_base
            self.reference = make_reference(transformer, ref_model, self.adapter_name, keeps_adapter=keeps)
        separate = self.reference.transformer if isinstance(self.reference, ModuleReference) else None
        saved = trained_weights(transformer, self.adapter_name)
        check_trained(transformer, [weight for name, weight in saved.items() if name not in idle])
        description = describe_run(transformer, self.adapter_name, args.seed, separate) | {"order": order}
        description[METHOD] = self.method_name
        self.trained_head = self.make_head(transformer)
        if self.trained_head is not None:
            attach_head(transformer, self.trained_head)
            description[HEAD] = describe_head(self.trained_head)
        if args.world_size > 1:
            leave_at_exit(self)
        self.mesh = make_mesh(args)
        for module in filter(None, (transformer, separate)):
            keep_weights_quantised(module)
            # Compiled first, so that the hooks by which tokens are shared stay outside; kernels are chosen last,
            # because sharing tokens exchanges what computes attention.
            compile_blocks(list(family.blocks(module)), enabled=args.compile_blocks)
            if args.context_parallel_size > 1:
                assert self.mesh is not None
                enable_context_parallelism(module, family, self.mesh)
            if args.attention_backend is not None:
                set_attention_backend(module, args.attention_backend)
            if args.offload_weights:
                offload_weights(module, list(family.blocks(module)), args.device)
        return description

    def _make_parts(
        self,
        transformer: ModelMixin,
        rows: IndexedDataset,
        evaluator: Evaluator | None,
        base_model: str,
        description: dict[str, Any],
        data: TrainingData,
    ) -> None:
        """Make the parts that need no accelerator."""
        args = self.args
        self.metrics = Metrics()
        self.step = DenoisingStep(
            self.family,
            seed=args.seed,
            device=args.device,
            now=lambda: self.state.global_step if self.model.training else EVALUATION_STEP,
            sampling=args.timestep_sampling,
            shift=self.timestep_shift,
            logit_mean=args.timestep_logit_mean,
            logit_std=args.timestep_logit_std,
            timestep_range=self.timestep_range,
            timestep_draw=args.timestep_draw,
            drops=has_dropout(transformer),
        )
        self.checkpointer = Checkpointer(
            transformer,
            adapter_name=self.adapter_name,
            trained_head=self.trained_head,
            engine=self.engine,
            base_model=base_model,
            expert=None if self.expert is None else self.expert.name,
            folder=RunFolder(Path(args.output_dir)),
            description=description,
            should_save=args.should_save,
        )
        self.average = WeightAverage(transformer, self.adapter_name, args.ema_decay)
        self.sampler = Sampler(
            self.pipeline,
            self.family,
            rows,
            device=args.device,
            max_sequence_length=self.max_sequence_length,
            fps=args.fps,
            averaged=self.average.shown,
            tensorboard=lambda: tensorboard_writer(self.callback_handler.callbacks),
        )
        self._signals = StopOnSignal(args.world_size)
        self._measure = EvaluatorCalls(evaluator, self.sampler, args.output_dir)
        all_weights = type(transformer).__name__ if self.adapter_name is None else None
        pipeline_class = self.family.pipeline_classes[0]
        facts = RunFacts(
            self.tag, self.summary, self.citation, base_model, pipeline_class, all_weights, data, self.expert
        )
        self._card = ModelCardCallback(args, facts, self.sampler, self.uploader)

    def make_passes(self) -> Passes:
        """The passes of a step; all videos of a batch at once unless a subclass says otherwise."""
        return ConcatPasses(self.family, self.reference)

    def _add_callbacks(self) -> None:
        """Add the callbacks that belong to every run, and hand the sampler to those that generate."""
        self._guard = FiniteLossGuard(self.accelerator, lambda row: {"prompt": self.train_dataset[row].get("prompt")})
        self.callback_handler.callbacks.insert(0, self.average)  # before what saves, evaluates or shows it
        for callback in (self._guard, GradientProof(), self._card, self._signals):
            self.add_callback(callback)
        line = LogLine(self.metrics, self.printed_metrics)
        self.callback_handler.callbacks = with_progress(self.callback_handler.callbacks, line, self.accelerator)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SamplingCallback):
                callback.use(self.sampler)

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        """Raise a `ValueError` if a dataset, raw or encoded, cannot feed trainers of this class. Reads no pixels."""
        check_columns(dataset, cls.row_type)

    def check_dataset(self, dataset: MapDataset) -> None:
        """Raise a `ValueError` if a dataset, raw or encoded, cannot feed this trainer. Reads no pixels."""
        self.check_rows(dataset, self.args)

    def idle_options(self, datasets: Sequence[MapDataset], passed: Passed) -> dict[str, str]:
        """Options that this run, with these datasets, leaves without effect, and why; see [`idle_in_run`]."""
        return idle_in_run(passed, encoded=all(is_encoded(dataset, self.row_type) for dataset in datasets))

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        """Encode a raw dataset, or take an encoded one as it is, check its latents and number its rows."""
        return self.encode(dataset, transformer)

    def encode(
        self, dataset: MapDataset, transformer: ModelMixin, before_encoding: Callable[[np.ndarray], None] | None = None
    ) -> IndexedDataset:
        """For all trainers. `before_encoding` is shown one video of each size, uint8 `(T, H, W, 3)`, beforehand."""
        return prepare_rows(
            dataset,
            self.row_type,
            self.args,
            pipeline=self.pipeline,
            transformer=transformer,
            family=self.family,
            max_sequence_length=self.max_sequence_length,
            before_encoding=before_encoding,
        )

    def make_head(self, transformer: ModelMixin) -> nn.Module | None:
        """
        Make a head: a module that is trained with the transformer and not needed afterwards. None here.

        A subclass calls it from within the transformer's forward (a forward hook on a block): only then does it take
        part in distributed training. It becomes `trained_head` of the transformer, in float32, without dropout.
        Checkpoints hold it as `head.safetensors`; adapters, saved transformers and published files do not. The norm of
        its gradient and of the transformer's is clipped together.

        Args:
            transformer (`ModelMixin`): The policy, in the form in which it is trained. The global generators are
                seeded, so that the new weights are a function of `args.seed`.
        """
        return None

    @classmethod
    def has_reference(cls, args: Any) -> bool:
        """Whether a run with this configuration has a frozen model to compare with."""
        return cls.uses_reference

    @classmethod
    def has_head(cls, args: Any) -> bool:
        """Whether trainers of this class with this configuration have a head."""
        return cls.make_head is not VideoTrainer.make_head

    def head_learning_rate(self) -> float | None:
        """Initial learning rate of the head, scheduled like the other; none: `args.learning_rate`."""
        return None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        given, optimizer, rate = self.optimizer, super().create_optimizer(model), self.head_learning_rate()
        if given is None and self.trained_head is not None and rate is not None:
            give_own_learning_rate(optimizer, self.trained_head, rate)
        if not is_deepspeed(optimizer):  # which keeps flat copies of the weights
            check_optimizer(self.model if model is None else model, optimizer)
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return optimizer

    get_optimizer_cls_and_kwargs = staticmethod(optimizer_and_options)

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Add per-sample values, of any shape with the batch first, to the metrics of these names in the next log."""
        store = self.metrics.train if self.model.training else self.metrics.eval
        store.record(metrics, counted=self.metrics.counted)

    # ---- Training and evaluation ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As in `transformers.Trainer`. Where memory runs out, what would fit is logged before the error goes on.
        A run that has done all its steps, resumed, does nothing. SIGTERM and SIGUSR1 let it save a checkpoint and end.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Folder of a checkpoint; `True` for the newest one of
                the run in `output_dir`; `"auto"` for that one if there is any, else a new run. Or as configured.

        Raises:
            ValueError: There is nothing to train on or to resume from; `output_dir` holds another run, or another
                process trains into it; or the checkpoint is damaged, incomplete or of another model.
            TrainingInterrupted: A signal came, and the checkpoint is saved. Uncaught it ends the program with code 75.
        """
        if self.train_dataset is None:
            raise ValueError("Expected a `train_dataset` to train on, got an `eval_dataset` only. Pass both.")
        resume = resume_from_checkpoint or named_checkpoint(self.args.resume_from_checkpoint)
        opened = self.checkpointer.opened(resume, overwrite=self.args.overwrite_output_dir)
        with opened as checkpoint, self._signals.caught():
            if checkpoint is not None:
                check_resumable(checkpoint, self.engine)
                check_settings(checkpoint, self.args, self.method_name)
                self._card.restore(checkpoint)
            try:
                return super().train(checkpoint and str(checkpoint), *args, **kwargs)
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
        videos = self.videos_in_step() * self.args.context_parallel_size // self.args.processes_per_row  # of a process
        workload = Workload.of(self.model, largest, videos, self.args, reference)
        frozen = weights_dtype(self.model)  # of an object it need not be the one that the trainer would load
        return replace(workload, prompt_tokens=self.max_sequence_length, frozen_dtype=frozen)

    def placement(self) -> Placement:
        """Where and how it is trained, as the planner describes it."""
        return Placement(
            num_gpus=self.args.world_size,
            engine="zero3-offload" if offloads_weights(self.accelerator) else self.engine,
            context_parallel=self.args.context_parallel_size,
            checkpointing_policy=self.args.checkpointing_policy if self.args.gradient_checkpointing else None,
            offload_weights=self.args.offload_weights,
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
        weight = inputs.pop(BATCH_WEIGHT)
        self.metrics.counted = weight.counted
        if not weight.counted and not self.accelerator.sync_gradients and self.engine not in SHARDED:
            return torch.zeros((), device=self.args.device)  # no other process waits for this one
        # Trainer divides the loss by this number, which it takes for that of equal micro-batches.
        self.current_gradient_accumulation_steps = weight.divisor
        self._guard.watch_samples(inputs["index"])
        with micro_batch(self.step, weight.rows, model, self.model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # there it was looked at before the update
            self._guard.watch_loss(loss)
        with self.compute_loss_context_manager():
            self.passes.backward()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        """As in `transformers.Trainer`, without a look at frozen weights, which have no gradients."""
        if self.engine != "ddp":  # others exchange the weights
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of a batch, with the noise that evaluation always uses. There are no predictions to return."""
        self.metrics.counted = inputs.pop(BATCH_WEIGHT).counted
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # Trainer's own mean is over batches, which differ in size.
        self.metrics.eval.add({"loss": outputs["losses"]}, counted=self.metrics.counted)
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
        with self.average.shown():
            loop = super().evaluation_loop
            output = loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self.metrics.eval.pop(self.accelerator)
        metrics |= self._measure(self.state.global_step, taken=metrics)
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
                f"The engine '{self.engine}' evaluates during a run or after it. To evaluate only, launch without it."
            )
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict | IndexedDataset):
            self.check_dataset(eval_dataset)
            eval_dataset = self.prepare_dataset(eval_dataset, self.model)
        if not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self._measure.paused():  # once for all datasets, not with each of them
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        now = self._measure(self.state.global_step)
        measured = {f"{metric_key_prefix}_{name}": value for name, value in now.items()}
        if measured:  # logged as an evaluation of its own
            self.log(dict(measured))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
        return metrics | measured

    def predict(
        self, test_dataset: MapDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Loss and metrics on a dataset, raw or encoded, under `metrics`. There are no predictions beside them."""
        if not isinstance(test_dataset, IndexedDataset):
            self.check_dataset(test_dataset)
            test_dataset = self.prepare_dataset(test_dataset, self.model)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def get_test_dataloader(self, test_dataset: IndexedDataset) -> DataLoader:
        """Batches of one shape of the dataset."""
        return make_loader(test_dataset, self.data_collator, self.args, training=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._guard.check(self.args, self.state)
        # Only the logs of training steps carry "loss"; the metrics of evaluation are in `logs` already.
        super().log(logs | self.metrics.train.pop(self.accelerator) if "loss" in logs else logs, start_time)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        super().add_callback(callback)
        if isinstance(callback, SamplingCallback):
            callback.use(self.sampler)

    # ---- Checkpoints ----

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
            directory = Path(resume_from_checkpoint)
            self.checkpointer.load_sharded(directory, self.model_wrapped, self.optimizer, self.lr_scheduler)
            if self.engine != "fsdp2":
                self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return model, loader

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.engine == "ddp":
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
            check_optimizer_state(state, self.optimizer, Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _run_epoch(self, **arguments: Any) -> None:
        """As in `transformers.Trainer`, which takes a step before it sees that a resumed run has done all of them."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        arguments["train_dataloader"].batch_sampler.set_epoch(arguments["epoch"])  # transformers 5.5: not when resumed
        super()._run_epoch(**arguments)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`, which would delete the newest checkpoint where the best one alone may stay."""
        if self._signals.stopped_by is not None:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise self._signals.interruption(self.state.global_step)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.checkpointer.load(Path(resume_from_checkpoint))
        self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("Loading the best weights, from %s.", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, whole, and the card into a folder; all processes must call this."""
        directory = Path(output_dir or self.args.output_dir)
        self.checkpointer.save(directory)
        self.average.save(self.checkpointer, directory)
        if self.args.should_save:
            write_atomically(directory / ARGUMENTS_NAME, self.args.to_json_string())
            self._card.write(directory, self.state)
        if self.args.push_to_hub and not _internal_call:
            with self.uploader.forgiving():
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `transformers.Trainer`, but under a temporary name until the checkpoint is complete."""
        self._guard.check(self.args, self.state)
        self.store_flos()
        run_directory = Path(self._get_output_dir(trial=trial))
        final = run_directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        exportable = [*self.callback_handler.callbacks, self.control]
        with self.checkpointer.checkpoint(final, self.accelerator, self.state, exportable) as partial_directory:
            self.save_model(partial_directory, _internal_call=True)
            if not self.args.save_only_model or self._signals.stopped_by is not None:
                self._save_optimizer_and_scheduler(partial_directory)
                self._save_scaler(partial_directory)
                self._save_rng_state(partial_directory)
        if self.args.push_to_hub:
            self.uploader.upload_checkpoint(final, self.state.global_step)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            self.checkpointer.folder.rotate(run_directory, limit, best)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in `transformers.Trainer`, but without a second copy of the weights that are frozen, or saved already."""
        if self.engine == "ddp":
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            self.checkpointer.save_sharded_optimizer(output_dir, self.model_wrapped, self.optimizer, self.lr_scheduler)

    # ---- The Hub ----

    @property
    def hub_model_id(self) -> str | None:
        """The repository, once there is one."""
        return self.uploader.repository

    @hub_model_id.setter
    def hub_model_id(self, value: str | None) -> None:
        pass  # Trainer's constructor sets it to none; the uploader may have made the repository before

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `transformers.Trainer`, but once, and a Hub that is away is tried again later."""
        self.uploader.open(token, private)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        license: str | None = None,
        evaluation: Sequence[Measurement] | None = None,
    ) -> None:
        """
        Write the model card into `output_dir`. [`~transformers.Trainer.push_to_hub`] hands its keyword arguments here.

        Args:
            model_name (`str`, *optional*): Title of the card while the repository is not known.
            dataset_name (`str`, *optional*): What was trained on; by default the repository that a dataset came from.
            license (`str`, *optional*): Licence identifier, such as `"apache-2.0"`; by default that of the base model.
            evaluation (list of [`~video_trl.hub.Measurement`], *optional*): Results; by default the last evaluation's.
        """
        if self.is_world_process_zero():
            names = {"model_name": model_name, "dataset_name": dataset_name}
            self._card.write(Path(self.args.output_dir), self.state, license=license, evaluation=evaluation, **names)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Upload weights, model card, sample videos and TensorBoard's curves. Nothing else of `output_dir` is sent.

        Args:
            commit_message (`str`, defaults to `"End of training"`): Message of the commit.
            blocking (`bool`, defaults to `True`): Whether to wait for the end.
            token (`str`, *optional*): Access token; by default that of the arguments, or the one logged in with.
            revision (`str`, *optional*): Branch; by default that of the arguments.
            private (`bool`, *optional*): Visibility of a new repository.
            **kwargs: Passed on to `create_model_card`.

        Returns:
            `CommitInfo`, or a `Future` of one where not `blocking`; `None` on all processes but the first.

        Raises:
            HubUploadError: If the Hub refuses or cannot be reached. Everything is in `output_dir` then, and the
                message says how to upload it later.
        """
        self.uploader.announce()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        how: dict[str, Any] = {"token": token, "revision": revision, "private": private}
        return self.uploader.upload(self.state.global_step, commit_message or "Model save", blocking=blocking, **how)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.uploader.upload_checkpoint(Path(checkpoint_folder), self.state.global_step)

    def _finish_current_push(self) -> None:
        self.uploader.finish()
