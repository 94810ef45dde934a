"""
Rounds: the model that is being trained makes the next rejected videos.

A round lets the current adapter make videos of the dataset's prompts, has them judged, takes more of the clips that
the model does badly now, trains on them against its own new videos, and measures the gain on held-out prompts. Rounds
end when the interval of the gain covers zero. Every step of a round is a file or folder that is whole or absent: what
is there is not made again.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import datasets

from ..data.columns import column_names, group_features, undecoded
from ..files import fingerprint, read_json, recorded, write_atomically
from ..hub.lora import AVERAGE_FOLDER, LORA_FILE_NAME
from ..load import SANDBOX, ScriptArguments, check_judge, load_judge, load_training_rows
from .engine.manifest import write_table
from .phyaug.sampling import allocate, category_scores, draw


if TYPE_CHECKING:
    from ..evaluation.runs.tables import RunTable
    from ..methods import Method

logger = logging.getLogger(__name__)

ReferenceModel = Literal["base", "previous"]
Metric = Literal["pc", "sa", "joint"]
_ROUND, _SETTINGS, _GROUPS, _ADAPTER = "round.json", "rounds.json", "groups", "adapter"
_ABOUT_GROUPS = ("category", "seeds", "generator", "provenance")
_GENERATION = ("call_kwargs", "device", "dtype", "fps", "revision")
_SEED_STEP = 1000  # between the noises of two rounds


@dataclass
class RoundsConfig:
    """What is generated, judged, trained and measured in every round."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows with 'prompt' and 'chosen' (or 'video'), and where there is one 'category', by which clips "
            "are allocated. Unset: simulated clips of the sandbox."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    column: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that have another name there: chosen=winner.", "action": "extend"},
    )
    num_clips: int = field(default=128, metadata={"help": "Of the sandbox: simulated clips."})
    output_dir: str = field(
        default="outputs/rounds", metadata={"help": "Folder of all rounds. Stopped, they go on where they were."}
    )
    model: str = field(default=SANDBOX, metadata={"help": "Pipeline in diffusers layout, or 'sandbox'."})
    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter that the first round begins with, such as a fine-tuned one: a folder, a file, or a "
            "repository id. Unset: the model as it is."
        },
    )
    generation: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "How it makes videos: fps, call_kwargs, dtype, device, revision, as a mapping or JSON."},
    )
    batch_size: int = field(default=8, metadata={"help": "Videos generated together."})
    judge: str = field(default=SANDBOX, metadata={"help": "Judge, by the name that `load_judge` takes."})
    judge_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the judge, as a mapping or JSON."}
    )
    num_rejected: int = field(default=3, metadata={"help": "Videos of each prompt in a round."})
    budget: int | None = field(
        default=None, metadata={"help": "Clips to train on in a round, the difficult ones first. Unset: all."}
    )
    tau: float = field(default=3.0, metadata={"help": "How much difficult categories are favoured; 0: all alike."})
    method: str = field(default="gdpo", metadata={"help": "Method, by its name or as module:Class."})
    training: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of its configuration, as a mapping or JSON."}
    )
    reference: ReferenceModel = field(
        default="base",
        metadata={
            "help": "What a round's preference is measured against: 'base', the model without adapter; 'previous', "
            "the adapter as the round found it."
        },
    )
    max_rounds: int = field(default=3, metadata={"help": "Rounds at most."})
    eval_prompts: str | None = field(
        default=None, metadata={"help": "File of held-out prompts. Unset: the sandbox's."}
    )
    num_eval_prompts: int | None = field(default=None, metadata={"help": "Only the first so many of them."})
    eval_seeds: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "One video of each held-out prompt for each of these seeds."}
    )
    metric: Metric = field(default="pc", metadata={"help": "What the gain is measured in: 'pc', 'sa' or 'joint'."})
    seed: int = field(default=0, metadata={"help": "Of training, noises and the choice of clips."})

    def __post_init__(self) -> None:
        for name in ("generation", "judge_options", "training"):
            if isinstance(vars(self)[name], str):
                setattr(self, name, json.loads(vars(self)[name]))
        for name, choices in (("reference", ReferenceModel), ("metric", Metric)):
            if vars(self)[name] not in get_args(choices):
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, get_args(choices)))}, got {vars(self)[name]!r}."
                )
        if self.num_rejected < 1 or self.max_rounds < 1 or not self.eval_seeds or (self.budget or 1) < 1:
            raise ValueError(
                "Expected `num_rejected`, `max_rounds` and `budget` of at least 1 and an evaluation seed, got "
                f"{self.num_rejected}, {self.max_rounds}, {self.budget} and {self.eval_seeds}."
            )
        if not 0 <= self.tau < math.inf or self.batch_size < 1:
            raise ValueError(
                f"Expected `tau` of at least 0 and `batch_size` of at least 1, got {self.tau} and {self.batch_size}."
            )
        if len(set(self.eval_seeds)) < len(self.eval_seeds) or min(*self.eval_seeds, self.seed) < 0:
            raise ValueError(
                f"Expected different `eval_seeds` and a `seed` of at least 0, got {self.eval_seeds} and {self.seed}."
            )
        if self.model != SANDBOX and (self.dataset_name is None or self.eval_prompts is None):
            raise ValueError(
                f"`model={self.model!r}` needs `dataset_name` and `eval_prompts`: only the sandbox brings its own."
            )

    def options(self, name: str) -> dict[str, Any]:
        """One of the mappings."""
        value = vars(self)[name]
        assert not isinstance(value, str), "parsed in `__post_init__`"
        return dict(value or {})


@dataclass(frozen=True)
class Round:
    """
    What a round did, and what came of it.

    Attributes:
        number (`int`): From 1.
        adapter (`str`): Folder of its adapter.
        adapter_hash (`str`): Hash of the adapter's file.
        start (`str` or `None`): Folder or file of the adapter that it began with; `None`: the base model.
        scores (`dict[str, float]`): Mean of `sa` and `pc` of the model's videos before the round, by category.
        allocation (`dict[str, int]`): Clips that it was trained on, by category.
        value (`float`): Mean of the metric on held-out prompts after the round.
        gain (`float`): Over the adapter that it began with.
        low (`float`): Lower end of its 95 % interval.
        high (`float`): Upper end.
    """

    number: int
    adapter: str
    adapter_hash: str
    start: str | None
    scores: dict[str, float]
    allocation: dict[str, int]
    value: float
    gain: float
    low: float
    high: float

    @property
    def is_better(self) -> bool:
        return self.low > 0


@dataclass(frozen=True)
class RoundsResult:
    """
    What rounds made.

    Attributes:
        rounds (`list[Round]`): In their order; the last one ends them.
        best (`str` or `None`): Folder of the adapter of the last round with a gain; `None`: no round had one, and
            what the first one began with stays the best.
        metric (`str`): What gains are measured in.
    """

    rounds: list[Round]
    best: str | None
    metric: str

    def __str__(self) -> str:
        header = f"{'round':>5}  {'clips':>5}  {self.metric:>6}  gain over the adapter before [95 %]"
        lines = [
            f"{each.number:>5}  {sum(each.allocation.values()):>5}  {each.value:6.3f}  {each.gain:+.3f} "
            f"[{each.low:+.3f}, {each.high:+.3f}]"
            for each in self.rounds
        ]
        ending = "no round is better than what it began with"
        if self.best is not None:
            ending = f"the best adapter is {self.best}"
        return "\n".join([header, *lines, ending])


def run_rounds(config: RoundsConfig) -> RoundsResult:
    """
    Rounds of generation, judging, allocation, training and evaluation, until one does not show a gain.

    Args:
        config ([`RoundsConfig`]): Everything.

    Returns:
        [`RoundsResult`]

    Raises:
        ValueError: If an option does not fit, before anything is generated; if the folder holds rounds of other
            settings; or under a launch of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "Rounds are run by one process, got a launch of several. Their steps by themselves share the work of a "
            "round: `video-trl eval`, `video-trl train`."
        )
    maker = _Rounds(config)
    maker.check()
    rounds: list[Round] = []
    best: str | None = None
    for number in range(1, config.max_rounds + 1):
        done = maker.round(number, best or maker.start)
        rounds.append(done)
        logger.info("Round %d: %s %.3f, %+.3f [%+.3f, %+.3f].", number, config.metric, *_numbers(done))
        if not done.is_better:
            break
        best = done.adapter
    return RoundsResult(rounds, best, config.metric)


def _numbers(done: Round) -> tuple[float, float, float, float]:
    return done.value, done.gain, done.low, done.high


def _handed_on(folder: Path) -> Path:
    """The adapter of a round: with `ema_decay` the averaged one, as in the evaluations of a training."""
    average = folder / _ADAPTER / AVERAGE_FOLDER
    return average if average.is_dir() else folder / _ADAPTER


@dataclass
class _Rounds:
    config: RoundsConfig

    @cached_property
    def root(self) -> Path:
        return Path(self.config.output_dir).absolute()

    @cached_property
    def method(self) -> "Method":
        from ..methods import Method, known_methods

        name = self.config.method
        known = {method.name: method for method in known_methods()}
        if name not in known and ":" not in name:
            raise ValueError(f"`method` must be one of {', '.join(known)}, or module:Class, got {name!r}.")
        return known.get(name) or Method(name, name)

    @cached_property
    def rows(self) -> Any:
        """The clips, `prompt`, `chosen` and where there is one `category`."""
        data = ScriptArguments(
            model_name_or_path=self.config.model,
            dataset_name=self.config.dataset_name,
            dataset_split=self.config.dataset_split,
            column=self.config.column,
            num_clips=self.config.num_clips,
        )
        return undecoded(load_training_rows(data, self.arguments(self.root, None), "video"))

    @cached_property
    def chosen(self) -> str:
        return "chosen" if "chosen" in column_names(self.rows) else "video"

    @cached_property
    def categories(self) -> list[str]:
        """Of every row; without a column each prompt is one."""
        name = "category" if "category" in column_names(self.rows) else "prompt"
        return [str(self.rows[number][name]) for number in range(len(self.rows))]

    def check(self) -> None:
        """Refuse what cannot work before anything is made, and claim the folder."""
        self._check_training(self.arguments(self.root, self.start))
        if unknown := set(self.config.options("generation")) - {*_GENERATION}:
            raise ValueError(f"`generation` has no {', '.join(sorted(unknown))}; it takes {', '.join(_GENERATION)}.")
        check_judge(self.config.judge, **self.config.options("judge_options"))
        from ..evaluation.evaluate import evaluation_prompts

        held_out = evaluation_prompts(self.config.eval_prompts, self.config.num_eval_prompts)
        if len(held_out) < 2:
            raise ValueError(f"The interval of a gain needs two held-out prompts, got {len(held_out)}.")
        columns = set(column_names(self.rows))
        if "prompt" not in columns or not {"chosen", "video"} & columns:
            raise ValueError(f"Expected rows with 'prompt' and 'chosen' (or 'video'), got {sorted(columns)}.")
        settings = asdict(self.config)
        for name in ("max_rounds", "output_dir"):  # it may be raised; the folder may be called or lie otherwise
            settings.pop(name)
        if self.start is None:
            settings.pop("init_adapter")  # folders that were begun without the option are finished as they are
        else:
            settings["init_adapter"] = fingerprint(Path(self.start))  # it may lie elsewhere, too
        found, settings = recorded(self.root / _SETTINGS, settings)
        if found != settings:
            raise ValueError(f"{self.root} holds rounds of {found}, expected {settings}. Pass another folder.")

    def _check_training(self, args: Any) -> None:
        """Whether the method can train what rounds will give it: groups, and an adapter."""
        from ..trainer.setup.run_options import check_run_options

        trainer_class = self.method.load()
        if trainer_class.row_type == "video":
            raise ValueError(
                f"`method={self.config.method!r}` trains on single videos, but rounds make rejected videos to compare "
                "with: expected a method that compares, such as 'dpo', 'gdpo' or 'regdpo'."
            )
        if not args.use_peft or args.transformer_file is not None:
            raise ValueError(
                "Rounds hand adapters of `model` on: expected `training` without `use_peft=False` and "
                f"`transformer_file`, got use_peft={args.use_peft} and transformer_file={args.transformer_file!r}."
            )
        check_run_options(args, evaluates=False)
        scores = [{"sa": 0.0, "pc": 0.0}] * self.config.num_rejected
        group: dict[str, Any] = dict.fromkeys(group_features(*_ABOUT_GROUPS), "")
        rejected = {"rejected": [""] * self.config.num_rejected, "rejected_scores": scores}
        trainer_class.check_rows([group | rejected], args)

    def arguments(self, folder: Path, start: str | None) -> Any:
        """The configuration of a round's trainer."""
        trainer_class = self.method.load()
        options = self.config.options("training")
        ours: dict[str, Any] = {"output_dir": str(folder), "seed": self.config.seed, "init_adapter": start}
        ours["overwrite_output_dir"] = True  # a kill between the last two files of a training leaves weights there
        if trainer_class.uses_reference:
            ours["reference_is_base"] = start is not None and self.config.reference == "base"
        if taken := set(options) & {*ours, "reference_is_base"}:
            raise ValueError(f"`training` leaves {', '.join(sorted(taken))} to the rounds.")
        if start is not None:
            options.pop("lora_target_modules", None)  # of the adapter to make: the first round made it
        try:
            args = trainer_class.config_class(**options, **ours)
        except TypeError as error:
            raise ValueError(f"`training`: {error}.") from error
        revision = self.config.options("generation").get("revision")
        loading: Any = args.model_init_kwargs or {}
        if loading.get("revision", revision) != revision:
            raise ValueError(
                f"`training` trains revision {loading['revision']!r}, and `generation` makes videos with "
                f"{revision!r}: expected the same one. Set it in `generation` alone."
            )
        if revision is not None:  # what is trained is what makes the videos
            args.model_init_kwargs = {**loading, "revision": revision}
        return args

    @cached_property
    def start(self) -> str | None:
        """File of the adapter that the first round begins with."""
        from ..hub.attach import find_adapter

        file = find_adapter(self.config.init_adapter)
        return None if file is None else str(file.absolute())

    # ---- A round ----

    def round(self, number: int, start: str | None) -> Round:
        """What is there of it is taken, the rest made."""
        folder = self.root / f"round-{number}"
        path = folder / _ROUND
        if path.is_file():  # maybe the folder was elsewhere
            return Round(**read_json(path) | {"adapter": str(_handed_on(folder)), "start": start})
        scores, videos = self.losers(folder, number, start)
        groups, allocation = self.groups(folder, number, scores, videos)
        adapter = self.train(folder, groups, start)
        before = self.evaluate(self.root / "evaluations" / f"round-{number - 1}", start)
        after = self.evaluate(self.root / "evaluations" / f"round-{number}", str(adapter))
        gain = self.gain(after, before)
        done = Round(
            number=number,
            adapter=str(adapter),
            adapter_hash=fingerprint(adapter / LORA_FILE_NAME),
            start=start,
            scores=scores,
            allocation=allocation,
            value=gain.mean_a,
            gain=gain.difference,
            low=gain.low,
            high=gain.high,
        )
        write_atomically(path, json.dumps(asdict(done), indent=1))  # last: it says that the round is whole
        return done

    def losers(
        self, folder: Path, number: int, start: str | None
    ) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
        """Mean score of each category, and the judged videos of each prompt, made by the model as it is now."""
        from ..evaluation.evaluate import evaluate_model
        from ..evaluation.runs.prompts import EvaluationPrompt

        of_prompt = {self.rows[row]["prompt"]: self.categories[row] for row in range(len(self.rows))}
        first = self.config.seed + _SEED_STEP * number
        table = evaluate_model(
            folder / "losers",
            prompts=[EvaluationPrompt(text, category=category) for text, category in of_prompt.items()],
            seeds=list(range(first, first + self.config.num_rejected)),
            name=f"before round {number}",
            **self._model(start),
        )
        assert table is not None, "there is one process"
        videos: dict[str, list[dict[str, Any]]] = {text: [] for text in of_prompt}
        for row in table.rows():
            videos[row["prompt"]].append(row)
        # By clip, not by prompt: clips of one prompt may be of several categories.
        judged = [
            (self.categories[row], (float(video["sa"]) + float(video["pc"])) / 2)
            for row in range(len(self.rows))
            for video in videos[self.rows[row]["prompt"]]
        ]
        return category_scores(*zip(*judged, strict=True)), videos

    def groups(
        self,
        folder: Path,
        number: int,
        scores: Mapping[str, float],
        videos: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        """Group rows of the clips that the new difficulty allots, and how many of each category."""
        members: dict[str, list[int]] = {}
        for row, category in enumerate(self.categories):
            members.setdefault(category, []).append(row)
        counts = {category: len(rows) for category, rows in members.items()}
        budget = self.config.budget or len(self.rows)
        allocation = allocate(counts, scores, tau=self.config.tau, budget=budget, redistribute=True)
        chosen: list[int] = []
        for category, rows in members.items():
            drawn = draw([str(row) for row in rows], allocation[category], self.config.seed + number)
            chosen += [row for row in rows if str(row) in drawn]
        made = []
        for row in sorted(chosen):
            clip, own = self.rows[row], videos[self.rows[row]["prompt"]]
            provenance = {"route": "rounds", "round": number, "row": row, "judge": self.config.judge}
            made.append(
                {
                    "prompt": clip["prompt"],
                    "chosen": clip[self.chosen],
                    "rejected": [video["video"] for video in own],
                    "rejected_scores": [{name: float(video[name]) for name in ("sa", "pc")} for video in own],
                    "category": self.categories[row],
                    "seeds": [video["seed"] for video in own],
                    "generator": f"{self.config.model}, before round {number}",
                    "provenance": json.dumps(provenance),
                }
            )
        features = group_features(*_ABOUT_GROUPS)
        groups = datasets.Dataset.from_list(made, features=features)
        write_table(groups.with_format("arrow")[:], folder / _GROUPS / "train.parquet")  # with the videos' paths
        return groups, {category: count for category, count in allocation.items() if count}

    def train(self, folder: Path, groups: datasets.Dataset, start: str | None) -> Path:
        """The adapter of the round; training that was stopped goes on from its last checkpoint."""
        adapter = folder / _ADAPTER
        if (adapter / "trained.json").is_file():
            return _handed_on(folder)
        from ..trainer.publishing.progress import ClosingLine

        trainer = self.method.load()(self.config.model, self.arguments(adapter, start), groups)
        trainer.remove_callback(ClosingLine)  # a line after each round says where everything is
        trainer.train(resume_from_checkpoint="auto")
        trainer.save_model()
        write_atomically(adapter / "trained.json", json.dumps({"updates": trainer.state.global_step}))
        return _handed_on(folder)

    def evaluate(self, run_dir: Path, adapter: str | None) -> "RunTable":
        """Held-out prompts; of the adapter that a round begins with it was made by the round before."""
        from ..evaluation.evaluate import evaluate_model

        table = evaluate_model(
            run_dir,
            prompts=self.config.eval_prompts,
            num_prompts=self.config.num_eval_prompts,
            seeds=self.config.eval_seeds,
            name=run_dir.name,
            training_seed=None if adapter is None else self.config.seed,
            **self._model(adapter),
        )
        assert table is not None, "there is one process"
        return table

    def _model(self, adapter: str | None) -> dict[str, Any]:
        return {
            **self.config.options("generation"),
            "model": self.config.model,
            "adapter": adapter,
            "judge": load_judge(self.config.judge, **self.config.options("judge_options")),
            "batch_size": self.config.batch_size,
        }

    def gain(self, after: "RunTable", before: "RunTable") -> Any:
        from ..evaluation.statistics import paired_bootstrap

        ours, theirs = ([float(row[self.config.metric]) for row in table.rows()] for table in (after, before))
        return paired_bootstrap(ours, theirs, clusters=[row["prompt"] for row in after.rows()])
