"""Evaluate a model in one call: generate videos, score them, count. Steps whose files exist are skipped."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ..files import Absence
from ..hub.published import Alpha
from ..judges import VideoJudge
from ..load import SANDBOX, heldout_prompts, load_judge
from .benchmarks.phyground import load_phyground
from .benchmarks.videophy import load_videophy
from .benchmarks.videophy2 import load_videophy2
from .runs.generate import VideoGenerator, generate_run, load_generator, wanted_by_family
from .runs.longer_prompts import read_longer_prompts, with_longer_prompts
from .runs.prompts import ALL, EvaluationPrompt, check_prompts, load_prompts
from .runs.run import SCORE_FOLDER, EvaluationRun, make_room, shard
from .runs.score import score_run, slug
from .runs.tables import RunTable, benchmark_named, tabulate


logger = logging.getLogger(__name__)

_LOADERS: dict[str, Callable[..., tuple[EvaluationPrompt, ...]]] = {
    "videophy": load_videophy,
    "videophy2": load_videophy2,
    "phyground": load_phyground,
}
UPSAMPLED = "upsampled"  # VideoPhy-2's own longer sentences
_POLL_SECONDS = 1.0
_REPORT_SECONDS = 60.0


def evaluate_model(
    run_dir: str | os.PathLike[str],
    *,
    model: str = SANDBOX,
    adapter: str | None = None,
    adapter_alpha: Alpha | None = None,
    adapter_scale: float = 1.0,
    prompts: str | os.PathLike[str] | Sequence[EvaluationPrompt | str] | None = None,
    num_prompts: int | None = None,
    longer_prompts: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (0,),
    judge: str | VideoJudge = SANDBOX,
    name: str | None = None,
    training_seed: int | None = None,
    benchmark: str = "custom",
    revision: str | None = None,
    fps: float | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int = 1,
) -> RunTable | None:
    """
    Evaluates a model: prompts x seeds -> videos -> scores -> table. With nothing but `run_dir` it evaluates the
    sandbox's base model on held-out sentences with the sandbox's exact judge.

    Stopped at any moment, it goes on where it was when called again with the same arguments. Under `torchrun` or
    `accelerate launch` the videos are shared among the processes.

    Args:
        run_dir (path): Directory of the run.
        model, adapter, adapter_alpha, adapter_scale, revision, fps, call_kwargs, dtype, device: As in
            [`load_generator`].
        prompts (path or list, *optional*): File for [`load_prompts`], or prompts; by default the sandbox's held-out.
        num_prompts (`int`, *optional*): Number of held-out sentences of the sandbox (20 by default), or the first so
            many of `prompts`.
        longer_prompts (`str` or path, *optional*): What the model, but not the judge, is given: a file for
            [`read_longer_prompts`], or `"upsampled"` for the ones that VideoPhy-2 has.
        seeds (list of `int`, *optional*, defaults to `(0,)`): One video of each prompt for each seed.
        judge (`str` or [`VideoJudge`], *optional*, defaults to `"sandbox"`): Name for `load_judge`, or a judge. The
            default one judges nothing but the sandbox's sentences.
        name (`str`, *optional*): How tables call the model; by default the adapter's or the model's name.
        training_seed (`int`, *optional*): Seed of the run that trained the adapter.
        benchmark (`str`, *optional*, defaults to `"custom"`): Rule that scores are counted by. With `"videophy"`,
            `"videophy2"` and `"phyground"` `prompts` is the benchmark's file, by default that of the Hub.
        batch_size (`int`, *optional*, defaults to `1`): Videos generated together.

    Returns:
        [`RunTable`], or `None` on all processes but the first.

    Raises:
        ValueError: If an argument is missing or wrong (before a model is loaded), or as in the three steps.
    """
    benchmark_named(benchmark)
    if model != SANDBOX and (judge == SANDBOX or prompts is None and benchmark not in _LOADERS):
        raise ValueError(f"Evaluating {model!r} needs `prompts` and `judge`: only the sandbox brings its own.")
    selection = evaluation_prompts(prompts, num_prompts, benchmark, longer_prompts)
    if isinstance(judge, str):
        judge = load_judge(judge)
    generator = load_generator(
        model, adapter=adapter, adapter_alpha=adapter_alpha, adapter_scale=adapter_scale, revision=revision, fps=fps,
        call_kwargs=call_kwargs, dtype=dtype, device=device,
    )  # fmt: skip
    run = generate_run(
        run_dir,
        generator,
        selection,
        seeds=seeds,
        name=name or (adapter or model).rstrip("/").rpartition("/")[2],
        training_seed=training_seed,
        benchmark=benchmark,
        batch_size=batch_size,
    )
    score_run(run.folder, judge)
    rank, num_ranks = shard()
    if rank != 0:
        return None
    if num_ranks > 1:
        _wait_for_scores(run, judge.name, num_ranks)
    return tabulate(run, judge=judge.name)


def evaluate_pipeline(
    run_dir: str | os.PathLike[str],
    generator: VideoGenerator,
    judge: VideoJudge,
    prompts: Sequence[EvaluationPrompt | str],
    *,
    seeds: Sequence[int] = (0,),
    name: str = "model",
    training_seed: int | None = None,
    batch_size: int = 16,
    resume: bool = False,
) -> RunTable:
    """
    Evaluates a pipeline in memory, in this process and from the start: a run that is in the directory is replaced, and
    stays under another name if there is anything else in the directory. The judge sees the frames as the pipeline
    makes them, so that compression has no part in its scores.

    Args:
        run_dir (path): Directory of the run.
        generator ([`VideoGenerator`]): The model.
        judge ([`VideoJudge`]): Any judge that fits beside the model.
        prompts (list of [`EvaluationPrompt`] or `str`), seeds (list of `int`): One video of each prompt for each seed.
        name (`str`), training_seed (`int`): As in [`generate_run`].
        batch_size (`int`, *optional*, defaults to `16`): Videos generated together.
        resume (`bool`, *optional*, defaults to `False`): Go on with the run that is in the directory instead.

    Returns:
        [`RunTable`]

    Raises:
        ValueError: As in [`generate_run`].
    """
    if not resume:
        make_room(run_dir)
    run = generate_run(
        run_dir,
        generator,
        prompts,
        seeds=seeds,
        name=name,
        training_seed=training_seed,
        batch_size=batch_size,
        judge=judge,
        rank=0,
        num_ranks=1,
    )
    return tabulate(run, judge=judge.name)


class TrainingEvaluator:
    """
    Generates and judges videos in the evaluations of a run: the `evaluator` argument of a trainer.

    ```python
    evaluator = TrainingEvaluator(sandbox_prompts(14), load_judge("sandbox"), fps=8, call_kwargs=sandbox.call_kwargs)
    trainer = VideoSFTTrainer("sandbox", args, dataset, eval_dataset, evaluator=evaluator)
    ```

    It returns the mean scores `sa` and `pc`, and the proportion `joint` of videos that pass both by the benchmark's
    rule (0.5 and above) with its Wilson interval, `joint_low` and `joint_high`, which the model card shows. They are
    logged as `eval_sa`, `eval_pc` and so on, and can choose the best checkpoint (`metric_for_best_model="eval_pc"`,
    `greater_is_better=True`). Each evaluation leaves a run in `<output_dir>/evaluation/step-<step>`, in place of one
    that an earlier run left there.

    Args:
        prompts (list of [`EvaluationPrompt`] or `str`): Never those of the final evaluation: they choose the weights.
        judge ([`VideoJudge`]): Any judge.
        fps (`float`, *optional*): Frames per second that the model generates at; by default its family's.
        seeds (list of `int`, *optional*, defaults to `(0,)`): One video of each prompt for each noise seed.
        call_kwargs (`dict`, *optional*): Size, frames, steps and guidance of the pipeline's call.
        batch_size (`int`, *optional*, defaults to `1`): Videos generated together.
        benchmark (`str`, *optional*, defaults to `"custom"`): Rule that `joint` is counted by, as in
            [`evaluate_model`]; its prompts come from `evaluation_prompts(None, number, benchmark)`.

    Raises:
        ValueError: If the benchmark is unknown, or the prompts are as `check_prompts` refuses them.
    """

    def __init__(
        self,
        prompts: Sequence[EvaluationPrompt | str],
        judge: VideoJudge,
        *,
        fps: float | None = None,
        seeds: Sequence[int] = (0,),
        call_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        benchmark: str = "custom",
    ) -> None:
        benchmark_named(benchmark)
        self.benchmark = benchmark
        self.prompts, self.judge, self.fps, self.seeds = check_prompts(prompts), judge, fps, tuple(seeds)
        self.call_kwargs, self.batch_size = dict(call_kwargs or {}), batch_size

    def __call__(self, pipeline: DiffusionPipeline, *, output_dir: str, step: int) -> dict[str, float]:
        fps, call = wanted_by_family(pipeline, self.fps)
        generator = VideoGenerator(
            pipeline, model=f"run in {output_dir}", fps=fps, call_kwargs={**call, **self.call_kwargs}
        )
        folder = os.path.join(output_dir, "evaluation", f"step-{step}")
        make_room(folder)
        # The trainer calls this on one process of the launch, so the others have no part of the work.
        run = generate_run(
            folder,
            generator,
            self.prompts,
            seeds=self.seeds,
            name=f"step {step}",
            benchmark=self.benchmark,
            batch_size=self.batch_size,
            rank=0,
            num_ranks=1,
        )
        score_run(run.folder, self.judge, rank=0, num_ranks=1)
        table = tabulate(run, judge=self.judge.name)
        joint = table.proportions[ALL]["joint"]
        return {**table.means[ALL], "joint": joint.value, "joint_low": joint.low, "joint_high": joint.high}


def sandbox_prompts(number: int = 20, seed: int = 0) -> tuple[EvaluationPrompt, ...]:
    """
    Held-out sentences of the sandbox, the base model's laws of motion in turn, each law being a group of the table.

    Raises:
        ValueError: If there are fewer sentences than asked for.
    """
    return tuple(EvaluationPrompt(text, category=law, groups=(law,)) for text, law in heldout_prompts(number, seed))


def evaluation_prompts(
    prompts: str | os.PathLike[str] | Sequence[EvaluationPrompt | str] | None = None,
    number: int | None = None,
    benchmark: str = "custom",
    longer: str | os.PathLike[str] | None = None,
) -> tuple[EvaluationPrompt, ...]:
    """
    The prompts that [`evaluate_model`] would take for these arguments (`number` is its `num_prompts`, `longer` its
    `longer_prompts`).

    Raises:
        ValueError: If a file cannot be read, a prompt repeats or has no longer one, or there are fewer than `number`.
    """
    if longer == UPSAMPLED and (benchmark != "videophy2" or not isinstance(prompts, str | os.PathLike | None)):
        raise ValueError(
            f"`longer_prompts={UPSAMPLED!r}` is a column of VideoPhy-2's table. For {benchmark!r} pass a CSV file."
        )
    selection = _short_prompts(prompts, number, benchmark, {"upsampled": True} if longer == UPSAMPLED else {})
    if longer is None or longer == UPSAMPLED:
        return selection
    return with_longer_prompts(selection, read_longer_prompts(longer))


def _short_prompts(
    prompts: str | os.PathLike[str] | Sequence[EvaluationPrompt | str] | None,
    number: int | None,
    benchmark: str,
    options: Mapping[str, Any],
) -> tuple[EvaluationPrompt, ...]:
    if prompts is None and benchmark not in _LOADERS:
        return sandbox_prompts(20 if number is None else number)
    if prompts is None:
        loaded_prompts = _LOADERS[benchmark](**options)
    elif isinstance(prompts, str | os.PathLike):
        loaded_prompts = _LOADERS.get(benchmark, load_prompts)(prompts, **options)
    else:
        loaded_prompts = check_prompts(prompts)
    if number is not None and not 1 <= number <= len(loaded_prompts):
        raise ValueError(
            f"`num_prompts` must lie between 1 and the {len(loaded_prompts)} prompts given, got {number}."
        )
    return loaded_prompts[:number]


def _wait_for_scores(run: EvaluationRun, judge: str, num_ranks: int) -> None:
    """Waits for the other processes of the launch, by their files: hours apart, they would time out at a barrier."""
    last = time.monotonic()
    absence = Absence(run.folder.resolve(), 0, num_ranks)
    while True:
        scored = {path.stem for path in (run.folder / SCORE_FOLDER / slug(judge)).glob("[0-9]*.json")}
        waiting = [position for position, case in enumerate(run.cases) if case.key not in scored]
        if not waiting:
            return
        absence.check(position % num_ranks for position in waiting)
        if time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            logger.info("Waiting for the other processes: %d of %d scores are missing.", len(waiting), len(run.cases))
        time.sleep(_POLL_SECONDS)
