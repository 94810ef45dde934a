"""Options and trainer of a method, for the commands `train`, `encode` and `estimate`."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..load import SANDBOX, ScriptArguments, generation_defaults, load_judge, load_training_rows
from ..methods import Method, known_methods
from ..presets import preset_for
from .options import mapping
from .parser import UsageError, nearest, parse, read_yaml, required, say
from .sources import read_config


if TYPE_CHECKING:
    from ..data.columns import MapDataset


_SAMPLES = 4  # sample videos of the sandbox
_PATH = re.compile(r"[\w.]+:\w+")
# Options of transformers.TrainingArguments that stand in the short help, beside all of the package's own.
_COMMON = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "logging_steps", "save_steps", "eval_strategy",
    "eval_steps", "report_to", "push_to_hub", "hub_model_id", "resume_from_checkpoint",
)  # fmt: skip


@dataclass
class DataArguments(ScriptArguments):
    """What to train, on what, and what to measure on the way."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Settings of a published run, over which other options win: phygdpo-paper, phygdpo-official, "
            "regdpo-paper-t2v, regdpo-paper-i2v, videorepa-2b-paper, videorepa-2b-official, videorepa-5b-paper, "
            "videorepa-5b-official."
        },
    )
    eval_rows: int = field(default=0, metadata={"help": "Last rows of the dataset, held out for evaluation."})
    evaluator_judge: str | None = field(
        default=None,
        metadata={"help": "Also generate videos in each evaluation, and let this judge score them: eval_sa, eval_pc."},
    )
    evaluator_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of that judge, as a mapping in YAML or JSON."}
    )
    evaluator_prompts: str | None = field(
        default=None, metadata={"help": "File of prompts for it. Unset: the sandbox's held-out ones."}
    )
    evaluator_num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many of them."})
    evaluator_benchmark: str = field(
        default="custom",
        metadata={"help": "Rule for eval_joint, and prompts where none are given: 'custom', 'videophy', 'videophy2'."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when --metric_for_best_model, such as eval_pc, has not improved for so many evaluations."
        },
    )
    sample_every: int | None = field(
        default=None,
        metadata={"help": "Every so many steps, make the same videos again: OUTPUT_DIR/samples, trackers."},
    )
    sample_prompts: str | None = field(
        default=None, metadata={"help": "File of prompts for them. Unset: four of the sandbox's held-out ones."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print configuration, rows, tokens, memory and steps; start nothing."}
    )


def look_for_modules_here() -> None:
    """Let a `module:Class` be found in the folder where the command is started; of itself a script does not look."""
    # Last, so that a file there cannot stand in for a library.
    sys.path += [] if "" in sys.path else [""]


def method_named(verb: str, argv: Sequence[str], text: str) -> tuple[Method, list[str]]:
    """
    The method after `train`, `encode` or `estimate`, and what follows it; without one, the help.

    Raises:
        UsageError: If there is no such method, or if two distributions have one of this name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: video-trl {verb} METHOD [options]\n\n{_listing()}\n\n{text.strip()}\n\nOptions: METHOD --help")
        raise SystemExit(0)
    name, *rest = argv
    if _PATH.fullmatch(name):
        look_for_modules_here()
        return Method(name, name), rest
    methods = known_methods()
    by_path = {method.path: method for method in methods if method.name == name}
    if not by_path:
        names = list(dict.fromkeys(method.name for method in methods))
        raise UsageError(
            f"no method {name!r}{nearest(name, names)}; expected one of {', '.join(names)}, or module:Class."
        )
    if len(by_path) > 1:
        raise UsageError(f"there are several methods {name!r}: write one of {', '.join(by_path)} instead.")
    return next(iter(by_path.values())), rest


def _listing() -> str:
    methods = known_methods()
    width = max(len(method.name) for method in methods)
    lines = [f"  {method.name:{width}}  {method.summary or method.path}" for method in methods]
    return "\n".join([*lines, f"  {'':{width}}  or the trainer of your own: my_module:MyTrainer"])


def parse_training(verb: str, method: Method, argv: Sequence[str], text: str) -> tuple[DataArguments, Any]:
    """The data arguments and the method's configuration."""
    stand_in = config_of(method)
    foreign = next(kind for kind in stand_in.__mro__ if kind.__name__ == "TrainingArguments")
    own = {key for kind in stand_in.__mro__ if kind not in foreign.__mro__ for key in kind.__annotations__}
    brief = [*own, *_COMMON, *(item.name for item in fields(DataArguments))]
    defaults = preset_values(method.name, argv)
    # Help, and all that the parser refuses: before the seconds that it takes to import the configuration itself.
    parse(f"{verb} {method.name}", text, [DataArguments, stand_in], argv, brief=brief, defaults=defaults)
    config = method.load().config_class
    from transformers.utils import is_torch_bf16_gpu_available

    words = [*argv]
    told = "--use_cpu" in argv or file_values(argv).get("use_cpu") is not None
    without_gpu = "--dry_run" in argv and not told and not is_torch_bf16_gpu_available()
    if without_gpu:
        words.append("--use_cpu")  # bfloat16 of a GPU is described, and not used
    data, args = parse(f"{verb} {method.name}", text, [DataArguments, config], words, brief=brief, defaults=defaults)
    if without_gpu:
        args.use_cpu = False
    if data.dataset_name is None and data.model_name_or_path != SANDBOX and not data.dry_run:
        raise UsageError(
            f"--model_name_or_path {data.model_name_or_path} needs --dataset_name: only the sandbox brings its own "
            "data. Pass a repository id or a folder (docs/data/dataset_formats.md)."
        )
    if data.model_name_or_path != SANDBOX:
        if data.evaluator_judge is not None and data.evaluator_benchmark == "custom":
            required("evaluator_prompts", data.evaluator_prompts, "prompts.txt")
        if data.sample_every is not None:
            required("sample_prompts", data.sample_prompts, "prompts.txt")
    if data.evaluator_judge is not None and args.eval_strategy == "no":
        raise UsageError("--evaluator_judge works in evaluations: add --eval_strategy steps --eval_steps 100.")
    if data.early_stopping_patience is not None and (args.metric_for_best_model is None or args.eval_strategy == "no"):
        raise UsageError(
            "--early_stopping_patience needs a metric to watch: add --metric_for_best_model eval_pc "
            "--greater_is_better true --eval_strategy steps --eval_steps 100."
        )
    return data, args


def config_of(method: Method) -> type[Any]:
    """The configuration of a method as its source describes it; where that cannot be read, the class itself."""
    return read_config(method.path) or method.load().config_class


def preset_values(method: str, argv: Sequence[str]) -> dict[str, Any]:
    """
    Values of the preset that a command line, or the file of its `--config`, names; none without one.

    Raises:
        UsageError: If there is no such preset, or it is for another method.
    """
    name = given_options(argv).get("--preset") or file_values(argv).get("preset")
    if name is None:
        return {}
    try:
        return preset_for(name, method)
    except ValueError as error:
        raise UsageError(f"--preset: {error}") from error


def given_options(argv: Sequence[str]) -> dict[str, str]:
    """Words of a command line that follow an option, by that option; `--name=value` as two words."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return dict(zip(words, words[1:], strict=False))


def file_values(argv: Sequence[str]) -> dict[str, Any]:
    """What the file of `--config` says; nothing without one."""
    given = given_options(argv)
    return read_yaml(given["--config"]) if "--config" in given else {}


def check_training(trainer_class: type[Any], data: DataArguments, args: Any) -> None:
    """
    Look at options, output folder and dataset as a trainer does, before anything is loaded, made or encoded; for
    `train` and its `--dry_run` alike.

    Raises:
        ValueError: As the trainer would.
    """
    from ..data.columns import is_encoded
    from ..data.tables import load_rows
    from ..trainer.checkpoints.run_folder import RunFolder
    from ..trainer.checkpoints.weights import named_checkpoint
    from ..trainer.setup.idle_options import Passed, idle_in_run, tell_idle_options
    from ..trainer.setup.run_options import check_run_options

    check_run_options(args, evaluates=bool(data.eval_rows or data.evaluator_judge))
    RunFolder(Path(args.output_dir)).check(
        named_checkpoint(args.resume_from_checkpoint), overwrite=args.overwrite_output_dir
    )
    encoded = False
    if data.dataset_name is not None:
        dataset = load_rows(data.dataset_name, data.dataset_split, data.column)
        trainer_class.check_rows(dataset, args)
        encoded = is_encoded(dataset, trainer_class.row_type)
    if data.dry_run:  # otherwise the trainer says so, and knows more
        idle = idle_in_run(Passed(args.init_adapter is not None), encoded=encoded)
        tell_idle_options(args, args.options_without_effect() | idle)
    tell_idle_options(data, _idle_beside(data, args, trainer_class.row_type))


def _idle_beside(data: DataArguments, args: Any, row_type: str) -> dict[str, str]:
    """Options beside the configuration that have no effect, and why."""
    causes = (
        (row_type == "video", ("num_groups", "num_rejected"), "a row of the method is one video"),
        (row_type != "video", ("num_clips",), "a row of the method has several videos"),
        (data.dataset_name is not None, ("num_groups", "num_rejected", "num_clips"), "`dataset_name` names the rows"),
        (data.dataset_name is None, ("dataset_split", "column"), "the rows are the sandbox's"),
        (not args.logs_gaps, ("on_collapse",), "the method logs no gaps, which it watches"),
        (data.sample_every is None, ("sample_prompts",), "`sample_every` is not given"),
        (
            data.evaluator_judge is None,
            ("evaluator_options", "evaluator_prompts", "evaluator_num_prompts", "evaluator_benchmark"),
            "`evaluator_judge` is not given",
        ),
    )
    return {name: why for holds, names, why in causes if holds for name in names}


def make_trainer(trainer_class: type[Any], data: DataArguments, args: Any) -> Any:
    """A trainer, its data loaded or made, and encoded."""
    dataset = load_training_rows(data, args, trainer_class.row_type)
    held_out = None
    if data.eval_rows:
        if not 0 < data.eval_rows < len(dataset):
            raise UsageError(f"--eval_rows must lie between 1 and {len(dataset) - 1}, got {data.eval_rows}.")
        first = len(dataset) - data.eval_rows
        dataset, held_out = dataset.select(range(first)), dataset.select(range(first, len(dataset)))
    return trainer_class(
        data.model_name_or_path,
        args,
        dataset,
        held_out,
        callbacks=_callbacks(args, data),
        evaluator=_evaluator(data, args),
    )


def training_rows(
    trainer_class: type[Any], data: DataArguments, dataset: "MapDataset | None"
) -> tuple[int | None, Mapping[str, Any]]:
    """
    How many rows there are, and one of them: of the dataset that is named, or of the sandbox's, which are counted
    without being made. For another model without a dataset, `(None, {})`.
    """
    if dataset is not None:
        from ..data.columns import undecoded

        dataset = undecoded(dataset)
        return len(dataset), dataset[0]
    if data.model_name_or_path != SANDBOX:
        return None, {}
    from ..sandbox import simulate

    video = simulate(0).video  # all are of one size
    if trainer_class.row_type == "video":
        return data.num_clips, {"video": video}
    return data.num_groups, {"chosen": video, "rejected": [video] * data.num_rejected}


def _callbacks(args: Any, data: DataArguments) -> list[Any]:
    from transformers import EarlyStoppingCallback

    from ..evaluation.evaluate import evaluation_prompts
    from ..trainer.callbacks import LogVideosCallback
    from ..trainer.collapse_monitor import CollapseMonitor

    callbacks: list[Any] = [CollapseMonitor(data.on_collapse)] if args.logs_gaps else []
    if data.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(data.early_stopping_patience))
    if data.sample_every is not None:
        prompts = evaluation_prompts(data.sample_prompts, None if data.sample_prompts else _SAMPLES)
        texts = [prompt.generation_text or prompt.text for prompt in prompts]
        _, sampling = generation_defaults(data.model_name_or_path)
        callbacks.append(LogVideosCallback(texts, every_steps=data.sample_every, call_kwargs=sampling))
    return callbacks


def _evaluator(data: DataArguments, args: Any) -> Any:
    if data.evaluator_judge is None:
        return None
    from ..evaluation.evaluate import TrainingEvaluator, evaluation_prompts

    default_fps, call = generation_defaults(data.model_name_or_path)
    sizes = {name: value for name in ("num_frames", "height", "width") if (value := vars(args)[name]) is not None}
    told = {} if args.embedded_guidance is None else {"guidance_scale": args.embedded_guidance}
    return TrainingEvaluator(
        evaluation_prompts(data.evaluator_prompts, data.evaluator_num_prompts, data.evaluator_benchmark),
        load_judge(data.evaluator_judge, **mapping("evaluator_options", data.evaluator_options)),
        fps=args.fps or default_fps,
        call_kwargs=call | sizes | told,
        benchmark=data.evaluator_benchmark,
    )
