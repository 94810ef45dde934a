"""Groups of options that several commands have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..load import SANDBOX, load_judge
from .parser import UsageError, required


if TYPE_CHECKING:
    from ..evaluation.runs.prompts import EvaluationPrompt
    from ..evaluation.runs.run import EvaluationRun
    from ..judges import VideoJudge

_CALL = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")


@dataclass
class RunArguments:
    """A model, what it is asked for, and where the run goes."""

    model_name_or_path: str = field(
        default=SANDBOX,
        metadata={"help": "Repository id or path of a pipeline in diffusers layout, or 'sandbox'."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Repository id or folder with pytorch_lora_weights.safetensors."}
    )
    adapter_alpha: str | None = field(
        default=None,
        metadata={"help": "Alpha that the adapter was trained with, for a file that does not say it; or 'rank'."},
    )
    adapter_scale: float = field(
        default=1.0, metadata={"help": "Factor of what the adapter adds to each output; 0 is the base model."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's repository."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "File of prompts (txt, csv, json, jsonl). Unset: the sandbox's held-out ones."},
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many prompts."})
    longer_prompts: str | None = field(
        default=None,
        metadata={
            "help": "What the model is given in place of the prompts, which judges and tables keep: a CSV file "
            "(prompt, generation_prompt), or 'upsampled' for VideoPhy-2's own."
        },
    )
    prompt_writer: str | None = field(
        default=None,
        metadata={"help": "Server's URL: a chat model that writes what --longer_prompts lacks, into that file."},
    )
    prompt_writer_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Its options, as a mapping in YAML or JSON: \'{"model": "..."}\'.'}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One video of each prompt for each of these noise seeds."}
    )
    output_dir: str = field(default="runs/base", metadata={"help": "Directory of the run; begun, it is finished."})
    name: str | None = field(
        default=None, metadata={"help": "How tables call the model. Unset: from model or adapter."}
    )
    training_seed: int | None = field(default=None, metadata={"help": "Seed of the training behind the adapter."})
    batch_size: int = field(default=1, metadata={"help": "Videos generated together."})
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16 or float16. Unset: bfloat16 on an accelerator."}
    )
    device: str | None = field(default=None, metadata={"help": "Unset: the accelerator, else the CPU."})
    fps: float | None = field(
        default=None,
        metadata={"help": "Frames per second that the model generates at. Unset: its family's (Wan 2.1 16, LTX 25)."},
    )
    num_frames: int | None = field(default=None, metadata={"help": "Frames. Unset: the pipeline's default."})
    height: int | None = field(default=None, metadata={"help": "Pixels. Unset: the pipeline's default."})
    width: int | None = field(default=None, metadata={"help": "Pixels. Unset: the pipeline's default."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Unset: the pipeline's default."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Unset: the pipeline's default."})
    negative_prompt: str | None = field(default=None, metadata={"help": "Unset: the pipeline's default."})

    def call_kwargs(self) -> dict[str, Any]:
        """What the pipeline's call is given beside the prompt."""
        return {name: value for name in _CALL if (value := self.__dict__[name]) is not None}

    def adapter_kwargs(self) -> dict[str, Any]:
        """The adapter and how strongly it acts, as `load_generator` takes them."""
        alpha = alpha_value(self.adapter_alpha)
        return {"adapter": self.adapter, "adapter_alpha": alpha, "adapter_scale": self.adapter_scale}

    def write_longer_prompts(self, benchmark: str = "custom") -> None:
        """
        Has the chat model write what the file lacks, where one is named.

        Raises:
            UsageError: If a file or the model's name is missing.
            ValueError: As [`~video_trl.evaluation.runs.longer_prompts.write_longer_prompts`].
        """
        if self.prompt_writer is None:
            return
        path = required("longer_prompts", self.longer_prompts, "longer.csv")
        from ..evaluation.evaluate import evaluation_prompts
        from ..evaluation.runs.longer_prompts import write_longer_prompts
        from ..evaluation.runs.run import shard
        from ..judges import ChatClient

        if shard()[1] > 1:
            raise UsageError(
                "--prompt_writer works in one process. Write the file first, then launch several with it."
            )

        options = mapping("prompt_writer_options", self.prompt_writer_options)
        try:
            client = ChatClient(self.prompt_writer, **options)
        except TypeError as error:
            raise UsageError(f"--prompt_writer_options: {error}") from error
        write_longer_prompts(evaluation_prompts(self.prompts, self.num_prompts, benchmark), client, path)

    def generate(self, prompts: "Sequence[EvaluationPrompt]") -> "EvaluationRun":
        """The videos of these prompts, as [`~video_trl.evaluation.runs.generate.generate_run`]."""
        from ..evaluation.runs.generate import generate_run, load_generator

        generator = load_generator(
            self.model_name_or_path,
            **self.adapter_kwargs(),
            revision=self.revision,
            fps=self.fps,
            call_kwargs=self.call_kwargs(),
            dtype=self.dtype,
            device=self.device,
        )
        return generate_run(
            self.output_dir,
            generator,
            prompts,
            seeds=self.seeds,
            name=self.shown_name(),
            training_seed=self.training_seed,
            batch_size=self.batch_size,
        )

    def shown_name(self) -> str:
        return self.name or (self.adapter or self.model_name_or_path).rstrip("/").rpartition("/")[2]


@dataclass
class JudgeArguments:
    """A judge, by the name that `load_judge` takes."""

    judge: str = field(
        default=SANDBOX,
        metadata={
            "help": "'sandbox', 'videocon-physics', 'videophy2', 'videoscore2', 'videoalign', 'qwen-vl:MODEL', a "
            "server's URL, 'phyground:URL', or a table with scores (.csv, .jsonl, .parquet)."
        },
    )
    judge_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Options of the judge, as a mapping in YAML or JSON: \'{"model": "..."}\'.'}
    )
    judge_cache: str | None = field(default=None, metadata={"help": "SQLite file that remembers scores."})

    def load(self) -> "VideoJudge":
        """
        Raises:
            UsageError: If the judge does not take the options.
            ValueError: If there is no such judge.
        """
        options = mapping("judge_options", self.judge_options)
        try:
            return load_judge(self.judge, cache=self.judge_cache, **options)
        except TypeError as error:
            raise UsageError(f"--judge_options: {error}") from error


def alpha_value(value: str | float | None) -> Any:
    """
    Alpha of an adapter: a number, or `"rank"`.

    Raises:
        UsageError: If it is neither.
    """
    try:
        return value if value in (None, "rank") else float(value)
    except ValueError as error:
        raise UsageError(f"--adapter_alpha is a number, or 'rank', got {value!r}.") from error


def mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """
    A mapping, from YAML or as JSON on the command line.

    Raises:
        UsageError: If it is neither.
    """
    try:
        content = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise UsageError(f"--{name} must be JSON, got {value!r} ({error}).") from error
    if not isinstance(content, Mapping | None):
        raise UsageError(f'--{name} must be a mapping, such as \'{{"model": "name"}}\', got {value!r}.')
    return dict(content or {})
