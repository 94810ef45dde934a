"""Measure the model in the evaluations of its training, by generating with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline

from .sampling import generation


if TYPE_CHECKING:
    from ..base_trainer import VideoTrainer


class Evaluator(Protocol):
    """Measure a pipeline, usually by generating videos and judging them."""

    def __call__(self, pipeline: DiffusionPipeline, *, output_dir: str, step: int) -> Mapping[str, float]:
        """Return metrics by name; they are logged as `eval_<name>` and can select the best checkpoint."""


def run_evaluator(trainer: "VideoTrainer") -> dict[str, float]:
    """
    Call the trainer's evaluator on the main process, and tell the others what came out; nothing if it has none.

    Returns:
        `dict[str, float]`: Its metrics, by the names that it gave them, the same on every process.

    Raises:
        RuntimeError: On the other processes, if the evaluator failed. The main process raises its own error; without
            this the others would wait for it until they time out.
        ValueError: If what it returned is not a mapping of names to numbers.
    """
    if trainer.evaluator is None:
        return {}
    assert trainer.pipeline is not None, "checked when the trainer was made"
    outcome: list[Any] = [{}, None]
    failure: Exception | None = None
    if trainer.is_world_process_zero():
        try:
            with generation(trainer.pipeline, trainer.args.device) as pipeline:
                step = trainer.state.global_step
                outcome[0] = _numbers(trainer.evaluator(pipeline, output_dir=trainer.args.output_dir, step=step))
        except Exception as error:
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    metrics, message = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"The evaluator failed on the main process, which says why ({message}).")
    return metrics


def log_evaluator(trainer: "VideoTrainer", prefix: str) -> dict[str, float]:
    """
    Run the evaluator as an evaluation of its own: beside several datasets, whose metrics are logged one by one, or
    where there are no rows to evaluate on.

    Returns:
        `dict[str, float]`: Metrics as they were logged, with `prefix`.
    """
    metrics = {f"{prefix}_{name}": value for name, value in run_evaluator(trainer).items()}
    if metrics:
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"Expected `evaluator` to return a dict of metrics, such as {{'pc': 0.5}}, got {type(metrics).__name__}."
        )
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{name}: {type(value).__name__}" for name, value in metrics.items())
        raise ValueError(f"Expected numbers from `evaluator`, got {shown}.") from error
