"""Write model cards: front matter for the Hub, text and evaluation results for readers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup

from ..files import unmarked, without_secrets, write_atomically
from ..load import SANDBOX
from .lora import AVERAGE_FOLDER, LORA_FILE_NAME


CARD_NAME = "README.md"
_PACKAGES = ("video-trl", "torch", "diffusers", "transformers", "peft", "accelerate", "datasets")
# At the start of a line, where no prompt of a card stands.
_EVALUATION = re.compile(r"^<!-- evaluation -->.*?<!-- end of evaluation -->$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Measurement:
    """
    One number of an evaluation.

    Attributes:
        metric (`str`): Name, such as `"pc"` or `"joint"`.
        value (`float`): The number.
        low (`float`, *optional*), high (`float`, *optional*): Ends of its interval.
        level (`float`, *optional*): Confidence level of the interval, such as 0.95.
        dataset (`str`, *optional*): What was measured on, such as `"VideoPhy-2"`.
        num_items (`int`, *optional*): Videos that were measured.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    level: float | None = None
    dataset: str = "held-out prompts"
    num_items: int | None = None

    def row(self) -> dict[str, Any]:
        """The number as a row of a table."""
        has_interval = self.low is not None and self.high is not None
        interval = f"[{self.low:.3f}, {self.high:.3f}]" if has_interval else ""
        if has_interval and self.level is not None:
            interval += f" ({100 * self.level:g} %)"
        videos = "" if self.num_items is None else self.num_items
        return {"on": self.dataset, "metric": self.metric, "value": self.value, "interval": interval, "videos": videos}


@dataclass(frozen=True)
class DatasetFacts:
    """
    What a card says about the training data.

    Attributes:
        name (`str`, *optional*): Repository id, or words.
        revision (`str`, *optional*): Commit of the repository.
        counts (`dict[str, int]`): How many rows and videos there are.
        samples (list of `dict`): A few rows: `prompt`, and under `videos` paths in the repository by column.
    """

    name: str | None = None
    revision: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()


def model_card(
    *,
    repo_id: str,
    base_model: str,
    method: str,
    method_name: str,
    prompt: str,
    fps: float,
    pipeline_class: str = "WanPipeline",
    transformer_class: str | None = None,
    averaged: bool = False,
    expert: tuple[str, str] | None = None,
    dtype: str = "bfloat16",
    revision: str | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    loss_parameters: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    evaluation: Sequence[Measurement | Mapping[str, Any]] = (),
    videos: Sequence[tuple[str, str]] = (),
    dataset: str | DatasetFacts | None = None,
    resources_used: Mapping[str, Any] | None = None,
    citation: str | None = None,
    license: Mapping[str, str] | str | None = None,
) -> str:
    """
    The README of an adapter or of a trained transformer: front matter for the Hub, and a snippet that runs as it is.

    Args:
        repo_id (`str`): Where the weights will be found: a repository id or a folder.
        base_model (`str`): Repository id or path of the base model, or `"sandbox"`.
        method (`str`): Tag of the method, e.g. `"group-dpo"`.
        method_name (`str`): The method in words, with a link where there is one.
        prompt (`str`): Prompt of the snippet.
        fps (`float`): Frames per second of the snippet's video.
        pipeline_class (`str`, defaults to `"WanPipeline"`): Class in diffusers of the base model's pipeline.
        transformer_class (`str`, *optional*): Class of a transformer that was trained whole; unset for an adapter.
        averaged (`bool`, defaults to `False`): Whether numbers and samples are of the averaged weights in `ema`.
        expert (`tuple[str, str]`, *optional*): Name and component of one of several transformers.
        dtype (`str`), revision (`str`, *optional*), call_kwargs (`dict`, *optional*): Of the base model and its call.
        loss_parameters, hyperparameters (`dict`, *optional*): Settings of the method itself, and others.
        log (list of `dict`, *optional*): Rows of the training log; columns are the keys of the first one.
        evaluation (list of [`Measurement`] or `dict`, *optional*): Table; the former are the `model-index` as well.
        videos (list of (`str`, `str`), *optional*): Prompt and path in the repository of generated videos.
        dataset (`str` or [`DatasetFacts`], *optional*): What was trained on.
        resources_used (`dict`, *optional*), citation (`str`, *optional*): Hardware, time and energy; BibTeX.
        license (`str` or `dict`, *optional*): Identifier, or the entries `license`, `license_name`, `license_link`.

    Returns:
        `str`: The README.
    """
    facts = dataset if isinstance(dataset, DatasetFacts) else DatasetFacts(name=dataset)
    task = "image-to-video" if _takes_image(pipeline_class) else "text-to-video"
    front_matter = ModelCardData(
        datasets=[facts.name] if facts.name and is_repo_id(facts.name) else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["video-trl", method, task, "diffusers", "lora" if transformer_class is None else "full-finetune"],
        widget=[{"text": text, "output": {"url": path}} for text, path in videos] or None,
        **_parentage(base_model, transformer_class is None, license),
        **_model_index(repo_id, [row for row in evaluation if isinstance(row, Measurement)], task),
    )
    call = {"prompt": prompt, **(call_kwargs or {})}
    where = transformer_class, averaged, expert
    return render(
        "model_card.md", title=Path(repo_id).name, adapter=transformer_class is None, averaged=averaged,
        revision=revision, method_name=method_name, dataset=facts, videos=videos, citation=citation,
        front_matter=f"---\n{front_matter.to_yaml()}\n---",
        base_model_link=_link(base_model, expert),
        snippet=_snippet(repo_id, base_model, pipeline_class, *where, dtype, revision, call, fps),
        evaluation=evaluation_section(evaluation),
        loss_parameters=settings_table(loss_parameters),
        hyperparameters=settings_table(hyperparameters),
        log=table(log),
        resources=settings_table(resources_used),
        versions=table([{"package": name, "version": _version(name)} for name in _PACKAGES]),
    )  # fmt: skip


def add_evaluation(card: str | Path, measurements: Sequence[Measurement]) -> None:
    """
    Put numbers into a card: its `model-index` and its section "Evaluation", in place of those that it has.

    Args:
        card (`str` or `Path`): The `README.md`, as [`model_card`] wrote it.
        measurements (list of [`Measurement`]): The numbers.

    Raises:
        ValueError: If the file is no card of this package.
    """
    path = Path(card)
    parsed = ModelCard(path.read_text(encoding="utf-8"))
    if not is_model_card(parsed.text):
        raise ValueError(f"{path} has no section for evaluations; expected a card that video_trl wrote.")
    entries = parsed.data.to_dict()
    entries.pop("model-index", None)
    index = _model_index(
        entries.pop("model_name", None) or str(path.resolve().parent), measurements, entries.get("pipeline_tag")
    )
    front_matter = ModelCardData(**entries, **index)
    section = evaluation_section(measurements)
    text = _EVALUATION.sub(lambda _: section, parsed.text)
    write_atomically(path, f"---\n{front_matter.to_yaml()}\n---\n{text}")


def is_model_card(text: str) -> bool:
    """Whether a README is one that [`model_card`] wrote."""
    return _EVALUATION.search(text) is not None


def evaluation_section(evaluation: Sequence[Measurement | Mapping[str, Any]]) -> str:
    """The section between its marks; nothing but the marks for no numbers."""
    rows = [row.row() if isinstance(row, Measurement) else row for row in evaluation]
    note = "Measured on what was held out of training, with the same seeds for every row."
    content = f"\n## Evaluation\n\n{table(rows)}\n\n{note}\n" if rows else ""
    return f"<!-- evaluation -->{content}<!-- end of evaluation -->"


def is_repo_id(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, and not a folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, its columns being the keys of the first row; empty for no rows."""
    if not rows:
        return ""
    names = list(rows[0])
    content = [[cell(row.get(name, "")) for name in names] for row in rows]
    lines = [[cell(name) for name in names], ["---"] * len(names), *content]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(settings: Mapping[str, Any] | None) -> str:
    """A table of names and values."""
    shown = without_secrets(dict(settings or {}))
    return table([{"setting": name, "value": value} for name, value in shown.items()])


def cell(value: Any) -> str:
    """A value as the cell of a table: one line, floats to four digits; a text is shown as it is, `Markup` is used."""
    if isinstance(value, Markup):
        return value
    return unmarked(f"{value:.4g}" if isinstance(value, float) else str(value))


def code(text: str) -> str:
    """A text in the type of code, in one line: between backticks, where it holds nothing that would end them."""
    plain = text and text.isprintable() and not set("`|") & set(text)
    return f"`{text}`" if plain else f"<code>{unmarked(text)}</code>"


def fence(text: str) -> str:
    """Marks of a code block that no line of the text can end."""
    return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def render(template: str, **values: Any) -> str:
    text = resources.files("video_trl").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": cell, "code": code, "fence": fence}
    return environment.from_string(text).render(**values)


def _parentage(base_model: str, is_adapter: bool, license: Mapping[str, str] | str | None) -> dict[str, Any]:
    """Entries of the front matter about base model and licence."""
    entries: dict[str, Any] = {"license": license} if isinstance(license, str) else dict(license or {})
    if is_repo_id(base_model):
        entries |= {"base_model": base_model, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return entries


def _model_index(repo_id: str, measurements: Sequence[Measurement], task: str | None) -> dict[str, Any]:
    """Entries of the front matter about an evaluation."""
    if not measurements:
        return {}
    return {"model_name": Path(repo_id).name, "eval_results": [_eval_result(row, task) for row in measurements]}


def _link(base_model: str, expert: tuple[str, str] | None) -> str:
    is_repo = is_repo_id(base_model)
    link = f"[{base_model}](https://huggingface.co/{base_model})" if is_repo else code(base_model)
    return link if expert is None else f"the `{expert[0]}` transformer of {link}"


def _eval_result(row: Measurement, task: str | None) -> EvalResult:
    details = {"interval": [row.low, row.high], "level": row.level, "videos": row.num_items}
    if row.low is None or row.high is None:
        del details["interval"]
    return EvalResult(
        task_type=task or "text-to-video",
        dataset_type="video-trl",
        dataset_name=row.dataset,
        metric_type=row.metric,
        metric_name=row.metric,
        metric_value=row.value,
        metric_args={name: value for name, value in details.items() if value is not None} or None,
    )


WITHOUT_LORA_LOADER = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
"""Pipelines of diffusers whose transformer loads adapters, but which have no `load_lora_weights` themselves."""


def _snippet(
    repo_id: str,
    base_model: str,
    pipeline_class: str,
    transformer_class: str | None,
    averaged: bool,
    expert: tuple[str, str] | None,
    dtype: str,
    revision: str | None,
    call: Mapping[str, Any],
    fps: float,
) -> str:
    component = "transformer" if expert is None else expert[1]
    pinned = "" if revision is None else f", revision={revision!r}"
    classes = pipeline_class if transformer_class is None else f"{pipeline_class}, {transformer_class}"
    if base_model == SANDBOX:
        imports, load = "from video_trl.load import load_pipeline", f"load_pipeline({SANDBOX!r})"
        if transformer_class is not None:
            imports = f"from diffusers import {transformer_class}\n{imports}"
    else:
        imports = f"import torch\nfrom diffusers import {classes}"
        load = f"{pipeline_class}.from_pretrained({base_model!r}{pinned}, dtype=torch.{dtype})"
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
    if _takes_image(pipeline_class):
        imports += "\nfrom diffusers.utils import load_image"
        arguments = f"image=load_image('first_frame.png'), {arguments}"
    if transformer_class is None:
        # Without the flag diffusers puts every adapter into the first transformer, without a warning.
        second = "" if component == "transformer" else ", load_into_transformer_2=True"
        load_adapter = "pipeline.load_lora_weights"
        if pipeline_class in WITHOUT_LORA_LOADER:
            load_adapter = "pipeline.transformer.load_lora_adapter"
        where = f"{repo_id!r}, subfolder={AVERAGE_FOLDER!r}" if averaged else repr(repo_id)
        use = f"{load_adapter}({where}, weight_name={LORA_FILE_NAME!r}, adapter_name='default'{second})"
    else:
        subfolder = f"{AVERAGE_FOLDER}/transformer" if averaged else "transformer"
        trained = f"{transformer_class}.from_pretrained({repo_id!r}, subfolder={subfolder!r})"
        use = f"pipeline.{component} = {trained}.to(pipeline.dtype)"
    return "\n".join(
        [
            imports,
            "from video_trl.data import write_video",
            "",
            f"pipeline = {load}",
            use,
            f"frames = pipeline({arguments}).frames[0]  # (T, H, W, 3) in [0, 1]",
            f"write_video('video.mp4', (frames * 255).round().astype('uint8'), fps={fps:g})",
        ]
    )


def _takes_image(pipeline_class: str) -> bool:
    return "ImageToVideo" in pipeline_class


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed as a package"
