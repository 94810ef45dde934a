"""Call the user's evaluator during a run, with a pipeline that generates videos."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline

from ..step.metrics import OF_EVALUATIONS
from .sampling import Sampler


class Evaluator(Protocol):
    """Measure a pipeline, usually by generating videos and judging them."""

    def __call__(self, pipeline: DiffusionPipeline, *, output_dir: str, step: int) -> Mapping[str, float]:
        """Return metrics by name; they are logged as `eval_<name>` and can select the best checkpoint."""


class EvaluatorCalls:
    """
    Calls an evaluator, once in each evaluation.

    Args:
        evaluator ([`Evaluator`], *optional*): What measures; nothing is measured without one.
        sampler ([`Sampler`]): Lends the pipeline.
        output_dir (`str`): Folder of the run.
    """

    def __init__(self, evaluator: Evaluator | None, sampler: Sampler, output_dir: str) -> None:
        self._evaluator, self._sampler, self._output_dir = evaluator, sampler, output_dir
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is measured: an evaluation on several datasets is measured once, after them."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __call__(self, step: int, taken: Collection[str] = ()) -> dict[str, float]:
        """
        Call the evaluator on the main process, and tell the others what came out.

        Args:
            step (`int`): Optimizer steps done so far.
            taken (collection of `str`): Names of metrics that the trainer has measured in this evaluation.

        Returns:
            `dict[str, float]`: Its metrics, by the names that it gave them, the same on every process.

        Raises:
            RuntimeError: On the other processes, if the evaluator failed. The main process raises its own error;
                without this the others would wait for it until they time out.
            ValueError: If what it returned is not a mapping of names to numbers, or a name is the trainer's.
        """
        if self._evaluator is None or self._is_paused:
            return {}
        outcome: list[Any] = [{}, None]
        failure: Exception | None = None
        if PartialState().is_main_process:
            try:
                with self._sampler.generation() as pipeline:
                    found = self._evaluator(pipeline, output_dir=self._output_dir, step=step)
                outcome[0] = _numbers(found, OF_EVALUATIONS.union(taken))
            except Exception as error:
                failure, outcome[1] = error, f"{type(error).__name__}: {error}"
        metrics, message = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if message is not None:
            raise RuntimeError(f"The evaluator failed on the main process, which says why ({message}).")
        return metrics


def _numbers(metrics: Any, taken: Collection[str]) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"Expected `evaluator` to return a dict of metrics, such as {{'pc': 0.5}}, got {type(metrics).__name__}."
        )
    if clash := sorted({str(name) for name in metrics} & set(taken)):
        raise ValueError(
            f"`evaluator` returned {', '.join(map(repr, clash))}, which the trainer measures itself under that name: "
            f"one of the two would be lost. Return it as 'my_{clash[0]}'."
        )
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{name}: {type(value).__name__}" for name, value in metrics.items())
        raise ValueError(f"Expected numbers from `evaluator`, got {shown}.") from error
