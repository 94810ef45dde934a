"""Compute counts, proportions and means by group from the scores of a run: the table of a benchmark."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..report.page import Table
from ..statistics import Proportion, proportion_of
from .prompts import ALL
from .run import EvaluationRun, load_run
from .score import judge_of, load_scores


@dataclass(frozen=True)
class Benchmark:
    """
    How scores are counted.

    Attributes:
        name (`str`): Key in `BENCHMARKS`, recorded by a run.
        passes (`dict[str, function]`): Criteria; each takes a score and says whether the video passed.
        note (`str`): The rule in words, under every table.
    """

    name: str
    passes: Mapping[str, Callable[[Mapping[str, Any]], bool]]
    note: str


def _at_least(threshold: float) -> dict[str, Callable[[Mapping[str, Any]], bool]]:
    def sa(score: Mapping[str, Any]) -> bool:
        return float(score["sa"]) >= threshold

    def pc(score: Mapping[str, Any]) -> bool:
        return float(score["pc"]) >= threshold

    return {"sa": sa, "pc": pc, "joint": lambda score: sa(score) and pc(score)}


_HALF = "A video passes sa or pc with a score of at least 0.5, joint with both."
BENCHMARKS = {
    "custom": Benchmark("custom", _at_least(0.5), _HALF),
    "videophy": Benchmark("videophy", _at_least(0.5), _HALF),
    "videophy2": Benchmark(
        "videophy2",
        _at_least(4 / 5),  # the judge gives a fifth of its rating
        "A video passes sa or pc with a rating of at least 4 of 5, joint with both.",
    ),
    "phyground": Benchmark(
        "phyground",
        _at_least(3 / 4),  # the judge gives (rating - 1) / 4
        "A video passes sa or pc with a mean rating of at least 4 of 5, joint with both. The paper has mean ratings.",
    ),
}


# Judges that make (r - 1) / 4 of a rating r from 1 to 5, by their identities; VideoPhy-2's own makes r / 5.
_IN_QUARTERS = re.compile(r"(remote|phyground|videoscore2|qwen-vl(?=:.*:rating,)):")


@dataclass(frozen=True)
class RunTable:
    """
    Counts of one run.

    Attributes:
        run ([`EvaluationRun`]), benchmark ([`Benchmark`]): What was counted, and how.
        judged (`dict[str, str]`): By whom: `name` and `identity` of the judge, see [`judge_of`].
        scores (list of `dict`): Score of each video, in the order of `run.cases`.
        proportions (`dict[group, dict[criterion, Proportion]]`): Videos that passed; group `all` has all.
        means (`dict[group, dict[str, float]]`): Mean `sa` and `pc`.
    """

    run: EvaluationRun
    judged: Mapping[str, str]
    benchmark: Benchmark
    scores: Sequence[Mapping[str, Any]]
    proportions: Mapping[str, Mapping[str, Proportion]]
    means: Mapping[str, Mapping[str, float]]

    @property
    def judge(self) -> str:
        """Name of the judge."""
        return self.judged["name"]

    def rows(self) -> list[dict[str, Any]]:
        """Every video as JSON values: `prompt`, `category`, `seed`, the judge's `score`s, `joint`, path of `video`."""
        return [
            {
                **score,  # first: a judge may have remarks of its own under these names
                "prompt": case.prompt.text,
                "category": case.prompt.category,
                "seed": case.seed,
                "joint": float(self.benchmark.passes["joint"](score)),
                "video": str(self.run.video(case)),
            }
            for case, score in zip(self.run.cases, self.scores, strict=True)
        ]

    def as_table(self) -> Table:
        """The counts as a table of text, each proportion with its interval."""
        criteria = list(self.benchmark.passes)
        header = ["group", "videos", "prompts", "mean sa", "mean pc", *(f"{name} passed" for name in criteria)]
        rows = []
        for group, proportions in self.proportions.items():
            first, means = proportions[criteria[0]], self.means[group]
            counts = [str(first.n), str(first.num_clusters), f"{means['sa']:.3f}", f"{means['pc']:.3f}"]
            rows.append([group, *counts, *(str(proportions[name]) for name in criteria)])
        note = (
            f"{self.benchmark.note} Judge: {self.judge}. k/n = proportion [{100 * first.level:g} % Wilson interval, "
            "for several videos a prompt by their effective number]."
        )
        return Table(f"{self.run.name}, {self.benchmark.name}", header, rows, note)

    def __str__(self) -> str:
        return text_table(self.as_table())


def tabulate(
    run_dir: str | os.PathLike[str] | EvaluationRun,
    *,
    judge: str | None = None,
    benchmark: str | None = None,
    level: float = 0.95,
) -> RunTable:
    """
    Counts the scores of a run. Nothing is generated or judged.

    Args:
        run_dir (path or [`EvaluationRun`]): The run.
        judge (`str`, *optional*): Whose scores; may be left out when a single judge scored the run.
        benchmark (`str`, *optional*): Rule to count by; by default the one that the run recorded.
        level (`float`, *optional*, defaults to `0.95`): Confidence level of the intervals.

    Returns:
        [`RunTable`]

    Raises:
        ValueError: If the rule is unknown, or the run or its scores are not complete.
    """
    run = run_dir if isinstance(run_dir, EvaluationRun) else load_run(run_dir)
    judged, scores = judge_of(run, judge), load_scores(run, judge)
    rule = _as_given(benchmark_named(benchmark or run.benchmark), judged["identity"])
    members = groups_of(run)
    proportions: dict[str, dict[str, Proportion]] = {}
    means: dict[str, dict[str, float]] = {}
    for group, indices in members.items():
        prompts = [run.cases[index].prompt_index for index in indices]
        proportions[group] = {
            name: proportion_of([passes(scores[index]) for index in indices], prompts, level)
            for name, passes in rule.passes.items()
        }
        means[group] = {
            key: sum(float(scores[index][key]) for index in indices) / len(indices) for key in ("sa", "pc")
        }
    return RunTable(run, judged, rule, scores, proportions, means)


def benchmark_named(name: str) -> Benchmark:
    """
    Raises:
        ValueError: If there is no such rule.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"Unknown benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def _as_given(rule: Benchmark, identity: str) -> Benchmark:
    """The rule on the scale of the judge: with (r - 1) / 4 a rating of 4 is 0.75, and below VideoPhy-2's 0.8."""
    if rule.name == "videophy2" and _IN_QUARTERS.match(identity):
        return replace(rule, passes=BENCHMARKS["phyground"].passes)
    return rule


def groups_of(run: EvaluationRun) -> dict[str, list[int]]:
    """Positions among `run.cases` of all videos and of those of each group, in the order in which groups appear."""
    members: dict[str, list[int]] = {ALL: list(range(len(run.cases)))}
    for index, case in enumerate(run.cases):
        for group in case.prompt.groups:
            members.setdefault(group, []).append(index)
    return members


def text_table(table: Table) -> str:
    """The table as aligned text for the terminal."""
    rows: Sequence[Sequence[str]] = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, lines[0], rule, *lines[1:], *([table.note] if table.note else [])])
