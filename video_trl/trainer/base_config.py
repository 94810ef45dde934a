"""The arguments of every trainer."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from typing_extensions import Self

from ..data.buckets import AspectBucket
from ..diffusion import NoiseProcess, TimestepSampling
from ..files import without_secrets
from ..models.attention.ring import check_ring_backend
from .parallel.engines import Engine, check_deepspeed_installed
from .parallel.processes import check_restarts
from .setup.activation_checkpointing import check_policy
from .setup.attention_and_compile import check_attention_backend
from .setup.optimizers import check_class_path
from .setup.quantization import Quantization, check_optimizer, check_quantised_engine, check_quantization
from .setup.single_file import check_transformer_file
from .step.timestep_draws import TimestepDraw


ContextParallelMethod = Literal["ulysses", "ring"]

# Options of `TrainingArguments` that would be ignored, or would break an exactness promise, with a video transformer:
# field -> (the only accepted value, why).
_UNSUPPORTED = {
    "remove_unused_columns": (False, "the collators read every column by name"),
    "neftune_noise_alpha": (None, "a video transformer has no token embedding to perturb"),
    "label_smoothing_factor": (0.0, "the losses take no class labels"),
    "bf16_full_eval": (False, "it would cast the float32 adapter, which is being trained, to bfloat16"),
    "fp16_full_eval": (False, "it would cast the float32 adapter, which is being trained, to float16"),
    "torch_compile": (False, "policy and reference must run the same kernels, or small reward gaps drown in rounding"),
    "train_sampling_strategy": ("random", "the rows of a step are of one shape, in an order drawn from `data_seed`"),
    "dataloader_drop_last": (False, "every row counts exactly once in an epoch"),
    "dataloader_in_order": (True, "the micro-batches of a step belong together, on all processes"),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGUSR1 always let a run save a checkpoint, on every engine"),
    "auto_find_batch_size": (False, "a batch size that changes during training cannot be resumed exactly"),
}


# Options of `TrainingArguments` about tokens, labels, predictions and optimizers that no video trainer has.
_WITHOUT_TOKENS = (
    "average_tokens_across_devices", "batch_eval_metrics", "do_predict", "do_train", "eval_accumulation_steps",
    "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "include_num_input_tokens_seen",
    "label_names", "length_column_name", "liger_kernel_config", "optim_target_modules", "prediction_loss_only",
    "use_cache", "use_liger_kernel",
)  # fmt: skip
_OF_SEVERAL_PROCESSES = (
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout",
)  # fmt: skip
_OF_TRACKIO = ("project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id")

_POSITIVE_OR_UNSET = (
    "num_frames", "fps", "height", "width", "max_sequence_length", "timestep_shift", "embedded_guidance",
    "eval_steps", "save_total_limit",
)  # fmt: skip
_POSITIVE = (
    "lora_rank", "lora_alpha", "encode_batch_size", "timestep_logit_std", "context_parallel_size",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "save_steps", "logging_steps",
)  # fmt: skip

# One name may be given without a list; the command line makes a list of it, which is all its parser knows.
if TYPE_CHECKING:
    LoraTargets = list[str] | str | None
else:
    LoraTargets = list[str] | None

# A bare `--bf16` on the command line means true, also where "not given" is told apart from false.
_FLAG: dict[str, Any] = {"nargs": "?", "const": True}


@dataclass
class VideoConfig(TrainingArguments):
    """
    Arguments that all video trainers share; everything else is inherited from [`~transformers.TrainingArguments`].

    Defaults that differ from `TrainingArguments`: `logging_steps=10`, the first step logged too, batch sizes of 1 per
    device, `bf16` and `activation_checkpointing` on when a GPU that supports them is used,
    `remove_unused_columns=False`, `ddp_find_unused_parameters=False`,
    `logging_nan_inf_filter=False` (a non-finite loss always stops the run, whatever this says), and
    `data_seed=seed` (the order of the samples does not depend on the state of a global generator).
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # What callbacks, which get the configuration and not the trainer, ask about the method.
    reference_is_base = False  # with an adapter that training continues; an option of the methods with a reference
    logs_gaps = False  # the trainer logs `win_gap` and `lose_gap`; a field `beta` scales them
    regulariser_field: ClassVar[str | None] = None  # coefficient of a term that holds the chosen error down

    # Defaults of TrainingArguments that are replaced
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Rows (videos, pairs, groups) per device and micro-batch in training."}
    )
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Rows (videos, pairs, groups) per device in evaluation."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every this many steps; a number in [0, 1) is a proportion of all steps."}
    )
    logging_first_step: bool | None = field(
        default=None,
        metadata={
            "help": "Log the first step too, whose loss the preference methods know in advance. Unset: with "
            "`logging_strategy='steps'`.",
            **_FLAG,
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16. Unset: on when a GPU that supports it is used, off on CPU.",
            **_FLAG,
        },
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Checkpoint activations, and compute them again in the backward pass: a quarter more time for a "
            "tenth of the memory, same numbers. Unset: on when a GPU is used, off on CPU.",
            **_FLAG,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "None are taken: see `checkpointing_policy`."}
    )
    # transformers has the two names above since 5.23, and goes by this one before.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of `activation_checkpointing`.", **_FLAG}
    )
    checkpointing_policy: str = field(
        default="full",
        metadata={
            "help": "What activation checkpointing computes a second time. 'full': whole blocks. 'offload': the same, "
            "with their inputs in the host's memory meanwhile. 'attention': blocks without their "
            "self-attention, whose output is stored."
        },
    )
    offload_weights: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen weights of the blocks under the adapter in the host's memory, and copy a block "
            "at a time to the device: the same numbers, for small GPUs. Needs `activation_checkpointing`."
        },
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel, by diffusers' name: 'flash' (the package flash-attn), '_native_cudnn', "
            "'_native_flash', ... Unset: the one that torch chooses."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "Compile the blocks of the transformer, each by itself. The first steps take minutes; training "
            "stops in the first one if policy and reference do not agree to the last bit."
        },
    )
    quantization: Quantization | None = field(
        default=None,
        metadata={
            "help": "Keep the frozen blocks under the adapter in few bits when the model is named by a string: 'nf4' "
            "(4 bits, bitsandbytes), 'int8' or 'fp8' (torchao)."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No effect here: training always stops at a non-finite loss, on or off."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay off: the collators read every column by name."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Passed to DistributedDataParallel. Every trained parameter takes part in every step."},
    )

    data_seed: int | None = field(default=None, metadata={"help": "Seed of the order of samples. Unset: `seed`."})
    dataloader_pin_memory: bool = field(
        default=True, metadata={"help": "Pin the memory of batches; has an effect only where there is a GPU."}
    )

    # Parameters that control the output folder
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete checkpoints, weights and samples of another run in `output_dir` when a new run starts "
            "there, which is refused otherwise."
        },
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `DiffusionPipeline.from_pretrained` (revision, variant, token, ...), used "
            "when the model is given as a repository id or path."
        },
    )
    transformer_file: str | None = field(
        default=None,
        metadata={
            "help": "One file with the weights of the transformer, in place of those of the named pipeline: "
            ".safetensors as ComfyUI or the original code have them, or .gguf, frozen under an adapter."
        },
    )
    use_peft: bool = field(
        default=True,
        metadata={
            "help": "Train a LoRA adapter, the frozen weights underneath being the reference. Off: all weights."
        },
    )
    expert: str | None = field(
        default=None,
        metadata={
            "help": "Which transformer to train of a pipeline that has one for high and one for low noise "
            "(Wan2.2-A14B): 'high_noise' or 'low_noise'. The other one is not loaded; timesteps are those of this one."
        },
    )
    lora_rank: int = field(default=48, metadata={"help": "Rank of the default LoRA adapter; 48 is PhyGDPO's."})
    lora_alpha: int = field(
        default=48, metadata={"help": "Scale of the default LoRA adapter; its output is multiplied by alpha / rank."}
    )
    lora_target_modules: LoraTargets = field(
        default=None,
        metadata={
            "help": "Layers of the default LoRA adapter. 'attention', if unset: query, key, value and output of every "
            "self-attention (PhyGDPO's LoRA-SR). 'attention+ffn': the feed-forward networks too. 'all-linear': every "
            "linear layer of the blocks, cross-attention too. Or names of layers, such as 'attn1.to_q' 'attn2.to_q'."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale the default LoRA adapter by alpha / sqrt(rank) instead (rsLoRA), for high ranks."},
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "Also train the length of each row of the adapted weights (DoRA): a little slower, and its norms "
            "take memory that estimates do not count."
        },
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability with which each input of the trained adapter, the default one or `init_adapter`, is "
            "set to 0 in a training step. Never in the reference, in evaluations or in sample videos."
        },
    )
    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to start from, when the model is named by a string: a folder or file that diffusers "
            "loads, or a repository id. Its rank and layers stay; preference methods compare with a frozen copy of it."
        },
    )

    # Parameters that control the optimizer
    optim_class: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer by its class, instead of `optim`: 'prodigyopt.Prodigy', 'torch.optim.Muon', of any "
            "installed package. It gets `learning_rate` (Prodigy wants 1), and `optim_args` such as "
            "'d_coef=0.5,betas=(0.9, 0.99)'; weights decay by `weight_decay`."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Average the trained weights over the steps with this decay, at most, such as 0.99 or 0.999 "
            "(EMA). Evaluations and sample videos are of the average, which is saved beside the weights, in the "
            "folder `ema`. 0: off."
        },
    )

    # Parameters that control several processes
    context_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share the tokens of each video. Must divide the number of processes, and of "
            "attention heads (with 'ulysses') or tokens (with 'ring'); the processes that remain share the rows."
        },
    )
    context_parallel_method: ContextParallelMethod = field(
        default="ulysses",
        metadata={
            "help": "How they share them. 'ulysses': in attention each has a part of the heads. 'ring': each has the "
            "queries of its tokens, and keys and values go round; needs an `attention_backend` that can do it."
        },
    )

    # Parameters that control the noise
    timestep_sampling: TimestepSampling = field(
        default="uniform",
        metadata={
            "help": "Distribution of the noise level. 'uniform' on [0, 1]; 'logit_normal': sigmoid of a normal draw; "
            "'shifted': uniform, then bent towards more noise as the sampler bends it."
        },
    )
    embedded_guidance: float | None = field(
        default=None,
        metadata={
            "help": "Guidance scale that a transformer is told which was distilled to guide itself (HunyuanVideo). "
            "Unset: 6. Sample with what it was trained with."
        },
    )
    timestep_shift: float | None = field(
        default=None,
        metadata={"help": "Shift of 'shifted' timestep sampling. Unset: the flow shift of the pipeline's scheduler."},
    )
    timestep_logit_mean: float = field(
        default=0.0, metadata={"help": "Mean of the normal draw of 'logit_normal' timestep sampling."}
    )
    timestep_logit_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of the normal draw of 'logit_normal' timestep sampling."}
    )
    timestep_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest timestep, on the model's scale of 0 (the video) to 1000 (noise): the "
            "distribution of `timestep_sampling` restricted to it, in evaluation too. Unset: all."
        },
    )

    timestep_draw: TimestepDraw = field(
        default="independent",
        metadata={
            "help": "How the rows of a training step draw from that distribution, which is the same in all cases. "
            "'independent': each for itself. 'stratified': each from another part of it, and of small steps eight "
            "rows in a row, so that the gradient varies less. 'antithetic': two mirror each other."
        },
    )

    # Parameters that control the data
    num_frames: int | None = field(
        default=None, metadata={"help": "Frames per video after decoding. Unset: as many as the file has."}
    )
    fps: float | None = field(default=None, metadata={"help": "Frames per second after decoding. Unset: the file's."})
    height: int | None = field(default=None, metadata={"help": "Height in pixels after decoding. Unset: the file's."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels after decoding. Unset: the file's."})
    resolution_buckets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Train at several sizes: '<height>x<width>' in pixels each, instead of `height` and `width`. All "
            "videos of a row are brought to the size whose aspect ratio is nearest to its chosen (or only) one."
        },
    )
    resolution_max_crop: float = field(
        default=0.3,
        metadata={
            "help": "Largest proportion of the picture that the nearest of `resolution_buckets` may cut off; a video "
            "that would lose more is treated as a bad one (`on_bad_video`)."
        },
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompt length in tokens. Unset: that of the pipeline's call (512 for Wan), but no more than the "
            "tokenizer's maximum."
        },
    )
    encode_batch_size: int = field(
        default=8, metadata={"help": "Videos or prompts encoded at once when raw data is encoded before training."}
    )
    latents_dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "What latents are stored in when raw data is encoded. 'bfloat16' takes half of the disk and of "
            "the reading, and rounds the videos, for policy and reference alike; what is made of them in a step is "
            "float32 either way."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the encoded data, found again by fingerprint. Unset: `$HF_HOME/video_trl/encoded`."
        },
    )
    on_bad_video: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "What to do with a video that cannot be decoded: 'raise' stops and names it, 'skip' drops its row "
            "and names it in a warning."
        },
    )

    def __post_init__(self) -> None:
        uses_gpu = not self.use_cpu and is_torch_bf16_gpu_available()
        if self.bf16 is None:
            self.bf16 = uses_gpu and not self.fp16
        if self.activation_checkpointing is None:
            given = self.gradient_checkpointing
            self.activation_checkpointing = uses_gpu if given is None else given
        self.gradient_checkpointing = self.activation_checkpointing
        if self.data_seed is None:
            self.data_seed = self.seed
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.logging_nan_inf_filter = False  # it would wait for the device in every step, to look at a loss
        self._check_base_values()
        check_deepspeed_installed(self)
        check_restarts()
        super().__post_init__()
        if self.logging_first_step is None:
            self.logging_first_step = self.logging_strategy == "steps"
        # Checked last: `TrainingArguments` resolves aliases and strings, and prepares the device.
        check_optimizer(self.optim.value)
        if self.optim_class is not None:
            check_class_path(self.optim_class)
        for name, (accepted, reason) in _UNSUPPORTED.items():
            value = self.__dict__.get(name, accepted)  # older versions of transformers have not all of them
            if value != accepted:
                raise ValueError(f"`{name}={value!r}` is not supported: {reason}. Leave it at {accepted!r}.")
        for name, accepted in (("split_batches", False), ("dispatch_batches", None), ("even_batches", True)):
            value = self.accelerator_config.__dict__[name]
            if value != accepted:
                raise ValueError(
                    f"`{name}={value!r}` in `accelerator_config` is not supported: batches are divided among the "
                    f"processes so that every row counts exactly once. Leave it at {accepted!r}."
                )
        self._check_offloading()
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if self.__dict__[name]:
                raise ValueError(
                    f"`{name}={self.__dict__[name]!r}` is not supported: blocks are checkpointed one by one, "
                    "non-reentrantly, by diffusers. Leave it unset."
                )

    @property
    def device(self) -> torch.device:
        """Of this process. transformers 5.5 loads no optimizer state onto a CPU with an index, such as gloo's."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def processes_per_row(self) -> int:
        """Processes that work on a row together."""
        return self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Number of parts into which the rows of a step are divided."""
        return self.world_size // self.processes_per_row

    @property
    def data_parallel_rank(self) -> int:
        """Which of these parts this process works on."""
        return self.process_index // self.processes_per_row

    def describe_processes_per_row(self) -> str:
        """The options that `processes_per_row` is the product of."""
        return f"`context_parallel_size={self.context_parallel_size}`"

    def with_evaluations(self, *, due: bool) -> Self:
        """
        The configuration of a trainer. A method may let it evaluate where nothing is said; `due`: there are rows, and
        no evaluator, which may take long and is asked for by name.
        """
        return self

    def check_noise_process(self, process: NoiseProcess) -> None:
        """Raise a `ValueError` if an option is not for models that are trained with this process."""

    def new_adapter(self) -> dict[str, Any]:
        """How the default adapter is made: keyword arguments of `attach_lora`."""
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "dropout": self.lora_dropout,
        }

    def check_dropout(self, probability: float) -> None:
        """Raise a `ValueError` if inputs of an adapter cannot be dropped with this probability."""
        if not 0 <= probability < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {probability}. 0 drops nothing.")
        for holds, option, why in (
            (self.compile_blocks, "compile_blocks", "each video has a generator of its own, which no graph holds"),
            (self.context_parallel_size > 1, "context_parallel_size", "processes that share a video would each draw"),
        ):
            if holds and probability:
                raise ValueError(
                    f"`lora_dropout={probability}` with `{option}={self.__dict__[option]}` is not supported: {why}. "
                    "Leave one of the two out."
                )

    def check_engine(self, engine: Engine) -> None:
        """Raise a `ValueError` if the engine cannot go along with how a step is to be computed."""
        check_quantised_engine(self.quantization, engine)
        if self.offload_weights and engine != "ddp":
            raise ValueError(
                f"`offload_weights` is supported with every process holding the adapter (engine 'ddp'), got the "
                f"engine {engine!r}, which divides weights itself. Leave one of them out."
            )
        if self.ema_decay and engine != "ddp":
            raise ValueError(
                f"`ema_decay={self.ema_decay}` is supported with every process holding the weights (engine 'ddp'), "
                f"got the engine '{engine}'. Drop one of the two."
            )
        if engine != "zero3":
            return
        if self.compile_blocks:
            raise ValueError(
                "`compile_blocks` is not supported with the engine 'zero3': DeepSpeed fetches the weights of each "
                "layer inside of the blocks, which are compiled as a whole. Shard by FSDP2, which fetches a block at "
                "a time (`fsdp2.yaml`), or leave `compile_blocks` off."
            )
        if self.gradient_checkpointing and self.checkpointing_policy == "attention":
            raise ValueError(
                "`checkpointing_policy='attention'` is not supported with the engine 'zero3': DeepSpeed fetches "
                "weights inside checkpointed blocks, and not by the same operations the second time. Use 'full' or "
                "'offload', or shard by FSDP2 (`fsdp2.yaml`)."
            )

    def options_without_effect(self) -> dict[str, str]:
        """Options that change nothing beside the values of others, and why; given or not. Subclasses add theirs."""
        optimizer, schedule = self.optim.value, self.lr_scheduler_type.value
        has_betas = any(kind in optimizer for kind in ("adam", "ademamix", "lion"))
        has_epsilon = any(kind in optimizer for kind in ("adam", "ademamix"))
        engine = {} if self.deepspeed_plugin is None else self.deepspeed_plugin.deepspeed_config
        reads_more = optimizer in ("sgd", "adagrad", "rmsprop") or "ademamix" in optimizer
        causes = (
            ("optimizer" in engine, ("optim", "optim_args"), "DeepSpeed's configuration has an `optimizer`"),
            (
                "scheduler" in engine,
                ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
                "DeepSpeed's configuration has a `scheduler`",
            ),
            (not has_betas, ("adam_beta1", "adam_beta2"), f"`optim={optimizer!r}` has no betas"),
            (not has_epsilon, ("adam_epsilon",), f"`optim={optimizer!r}` has none"),
            (not reads_more and self.optim_class is None, ("optim_args",), f"`optim={optimizer!r}` reads none"),
            (self.timestep_sampling != "shifted", ("timestep_shift",), "`timestep_sampling` is not 'shifted'"),
            (
                self.timestep_sampling != "logit_normal",
                ("timestep_logit_mean", "timestep_logit_std"),
                "`timestep_sampling` is not 'logit_normal'",
            ),
            (not self.resolution_buckets, ("resolution_max_crop",), "there are no `resolution_buckets`"),
            (not self.gradient_checkpointing, ("checkpointing_policy",), "`activation_checkpointing` is off"),
            (self.context_parallel_size == 1, ("context_parallel_method",), "`context_parallel_size` is 1"),
            (
                not self.use_peft,
                ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "lora_dropout"),
                "`use_peft` is off",
            ),
            (
                self.optim_class is not None,
                ("optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
                "`optim_class` is given",
            ),
            (
                schedule in ("constant", "reduce_lr_on_plateau", "greedy"),
                ("warmup_steps",),
                f"`lr_scheduler_type={schedule!r}` has no warm-up",
            ),
            (
                schedule in ("constant", "constant_with_warmup"),
                ("lr_scheduler_kwargs",),
                f"`lr_scheduler_type={schedule!r}` takes none",
            ),
            (self.max_steps > 0, ("num_train_epochs",), "`max_steps` says when the run ends"),
            (
                not (
                    self.load_best_model_at_end or self.save_strategy == "best" or schedule == "reduce_lr_on_plateau"
                ),
                ("metric_for_best_model", "greater_is_better"),
                "nothing looks for the best weights",
            ),
            (self.eval_strategy == "epoch", ("eval_steps",), "`eval_strategy` is not 'steps'"),
            (
                self.eval_strategy == "no",
                ("eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
                "`eval_strategy` is 'no'",
            ),
            (self.world_size == 1, _OF_SEVERAL_PROCESSES, "there is one process"),
            (not self.report_to, ("run_name",), "`report_to` names no tracker"),
            ("trackio" not in self.report_to, _OF_TRACKIO, "`report_to` does not name 'trackio'"),
            (not self.push_to_hub, ("hub_strategy", "hub_always_push"), "`push_to_hub` is off"),
            (True, _WITHOUT_TOKENS, "nothing in a video trainer reads it"),
            (self.save_strategy != "steps", ("save_steps",), "`save_strategy` is not 'steps'"),
            (self.save_strategy == "no", ("save_total_limit", "save_only_model"), "`save_strategy` is 'no'"),
            (self.logging_strategy != "steps", ("logging_steps",), "`logging_strategy` is not 'steps'"),
        )
        return {name: why for holds, names, why in causes if holds for name in names}

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, which hides its own tokens: this is what files, logs and trackers get."""
        values: dict[str, Any] = without_secrets(super().to_dict())
        return values

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass would write one that shows every token.
        cls.__repr__ = VideoConfig.__str__  # type: ignore[assignment, method-assign]

    def buckets(self) -> tuple[AspectBucket, ...]:
        """The sizes in `resolution_buckets`."""
        return tuple(map(AspectBucket.parse, self.resolution_buckets or ()))

    def _check_base_values(self) -> None:
        for name in _POSITIVE:
            check_positive(self, name)
        for name in _POSITIVE_OR_UNSET:
            if self.__dict__[name] is not None:
                check_positive(self, name)
        if not math.isfinite(self.timestep_logit_mean):
            raise ValueError(f"`timestep_logit_mean` must be finite, got {self.timestep_logit_mean}.")
        if (self.height is None) != (self.width is None):
            raise ValueError(
                f"`height` and `width` must be set together, got height={self.height} and width={self.width}. Set "
                "both, or neither to keep the size of the files."
            )
        if self.buckets() and self.height is not None:
            raise ValueError(
                f"`resolution_buckets={self.resolution_buckets}` and height={self.height}, width={self.width} exclude "
                "each other. Set one of the two."
            )
        if not 0 <= self.resolution_max_crop <= 1:
            raise ValueError(f"`resolution_max_crop` must be in [0, 1], got {self.resolution_max_crop}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}. 0 switches the average off.")
        self.check_dropout(self.lora_dropout)
        check_choice(self, "timestep_sampling", get_args(TimestepSampling))
        check_choice(self, "timestep_draw", get_args(TimestepDraw))
        self._check_timestep_range()
        check_choice(self, "on_bad_video", ("raise", "skip"))
        check_choice(self, "latents_dtype", ("float32", "bfloat16"))
        check_policy(self.checkpointing_policy)
        check_choice(self, "context_parallel_method", get_args(ContextParallelMethod))
        if self.context_parallel_size > 1 and self.context_parallel_method == "ring":
            check_ring_backend(self.attention_backend)
        if self.attention_backend is not None:
            check_attention_backend(self.attention_backend)
        if self.transformer_file is not None:
            check_transformer_file(self.transformer_file, use_peft=self.use_peft, quantization=self.quantization)
        if self.quantization is not None:
            check_choice(self, "quantization", get_args(Quantization))
            check_quantization(self.quantization, use_peft=self.use_peft)
        if self.compile_blocks and self.buckets():
            raise ValueError(
                "`compile_blocks` with `resolution_buckets` would compile anew for every size. Leave one of them out."
            )
        if self.compile_blocks and self.checkpointing_policy != "full":
            raise ValueError(
                f"`compile_blocks` with `checkpointing_policy={self.checkpointing_policy!r}` is not supported: it "
                "decides within a block, which is compiled as a whole. Use 'full'."
            )

    def _check_offloading(self) -> None:
        if not self.offload_weights:
            return
        quantised = self.quantization is not None or (self.transformer_file or "").endswith(".gguf")
        for holds, why in (
            (not self.use_peft, "`use_peft=False`, which trains the weights themselves. Train an adapter"),
            (quantised, "quantised weights, which are small already. Leave one of the two out"),
            (self.compile_blocks, "`compile_blocks`, which would take weights that are not there. Leave it off"),
            (
                not self.gradient_checkpointing,
                "`activation_checkpointing=False`: without it the backward pass needs all weights at once. Set it",
            ),
        ):
            if holds:
                raise ValueError(f"`offload_weights` does not go together with {why}.")

    def _check_timestep_range(self) -> None:
        if self.timestep_range is None:
            return
        if len(self.timestep_range) != 2 or not 0 <= self.timestep_range[0] < self.timestep_range[1] < math.inf:
            raise ValueError(
                "`timestep_range` must be two timesteps, low < high, such as (750, 995), neither negative; got "
                f"{self.timestep_range}. Leave it unset for all of them."
            )
        self.timestep_range = [float(end) for end in self.timestep_range]


def check_positive(config: VideoConfig, name: str) -> None:
    """Raise a `ValueError` if the option of that name is not a positive, finite number."""
    value = config.__dict__[name]
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


def check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` if the option of that name is none of the choices."""
    value = config.__dict__[name]
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
