"""Compare evaluation runs: paired tests with corrected p-values, and one HTML page with videos, scores and tables."""

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import read_json
from ...judges.precomputed import PrecomputedJudge
from ..runs.prompts import ALL
from ..runs.run import EvaluationRun, load_run
from ..runs.tables import RunTable, tabulate
from ..statistics import holm, paired_bootstrap, prompt_sign_test
from ..votes.results import vote_results, votes_table
from ..votes.study import Study, read_votes
from .page import Column, Comparison, Curve, Sample, Table, write_report


METRICS = ("pc", "sa", "joint")
_SCORES = (
    "pc (physical commonsense) says how well a video obeys physics, sa (semantic adherence) how well it shows what "
    "its prompt says, both from 0 to 1, by the judge {judge}. {rule}"
)
_CURVES = (
    "loss falls noisily, since most of it is noise that no model predicts. win_gap is the error of the trained model "
    "on chosen videos minus that of its reference: below 0 it has become better at them. lose_gap is the same for "
    "rejected videos. eval_ marks rows that were not trained on."
)
_NOT_CURVES = ("epoch", "step", "total_flos")  # and what ends in _runtime or _per_second


def compare_runs(
    run_dirs: Sequence[str | os.PathLike[str]],
    *,
    baseline: str | None = None,
    judge: str | None = None,
    benchmark: str | None = None,
    level: float = 0.95,
) -> list[Comparison]:
    """
    Every method against the baseline in mean `pc`, mean `sa` and the proportion that passes both, on the same
    prompts and noise. Runs of one name are training seeds of one method: their videos are pooled, and whole prompts
    are resampled.
    The p-values (sign test over prompts) are corrected by Holm's method for the number of comparisons made here.

    Args:
        run_dirs (list of path): Runs that a judge has scored; methods have distinct names.
        baseline (`str`, *optional*): Name of the method compared with; by default that of the first run.
        judge (`str`, *optional*): Whose scores; may be left out when a single judge scored the runs.
        benchmark (`str`, *optional*): Rule for `joint`; by default the one that the runs recorded.
        level (`float`, *optional*, defaults to `0.95`): Confidence level of the intervals.

    Returns:
        `list[Comparison]`: Empty for a single method.

    Raises:
        ValueError: If runs differ in prompts, seeds, judge (its name or identity, or whether it saw frames or files)
            or rule, a run is given twice, methods have different training seeds, or scores are missing.
    """
    tables = [tabulate(load_run(folder), judge=judge, benchmark=benchmark, level=level) for folder in run_dirs]
    return _compare(tables, baseline, level)


def write_comparison(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_html: str | os.PathLike[str],
    *,
    baseline: str | None = None,
    judge: str | None = None,
    benchmark: str | None = None,
    level: float = 0.95,
    max_prompts: int | None = 24,
    curves: Sequence[Curve] = (),
    votes_path: str | os.PathLike[str] | None = None,
    title: str = "Comparison",
    notes: Sequence[str] = (),
) -> Path:
    """
    Writes one self-contained HTML page: comparisons, counts with intervals for each run and group, votes, videos by
    prompt with runs as columns, training curves. Videos can be filtered by category and by how far runs differ.

    Args:
        run_dirs, baseline, judge, benchmark, level: As in [`compare_runs`].
        out_html (path): File to write.
        max_prompts (`int`, *optional*, defaults to `24`): Prompts whose videos are embedded, the first ones of each
            category in turn and never chosen by their scores; `None` embeds all. Tables count all of them.
        curves (list of [`Curve`], *optional*): Training curves, such as those of [`training_curves`].
        votes_path (path, *optional*): File of votes on these runs.
        title (`str`, *optional*), notes (list of `str`, *optional*): Heading, and how the numbers were made.

    Returns:
        `Path`: The file written.

    Raises:
        ValueError: As in [`compare_runs`], or if the votes are about other runs.
    """
    tables = [tabulate(load_run(folder), judge=judge, benchmark=benchmark, level=level) for folder in run_dirs]
    comparisons = _compare(tables, baseline, level)
    votes = [] if votes_path is None else [_votes_on(tables, votes_path, level)]
    return write_page(
        out_html,
        tables,
        comparisons,
        shown=tables,
        max_prompts=max_prompts,
        further_tables=votes,
        curves=curves,
        title=title,
        notes=notes,
        lead=_what_came_out(tables, comparisons),
        explanations={
            "Scores": _SCORES.format(judge=tables[0].judge, rule=tables[0].benchmark.note),
            "Training curves": _CURVES,
        },
    )


def _votes_on(tables: Sequence[RunTable], votes_path: str | os.PathLike[str], level: float) -> Table:
    """The votes, if they are about videos of these runs; a training seed may have had a name of its own for them."""
    header, _ = read_votes(votes_path)
    hashes = [(table.run.name, table.run.video_hashes()) for table in tables]
    meant = [[each for name, each in hashes if name == voted] for voted in header["runs"]]
    studies = (
        Study((), header["questions"], dict(zip(header["runs"], videos, strict=True)))
        for videos in itertools.product(*(named or [each for _, each in hashes] for named in meant))
    )
    if not any(study.identity == header["study"] for study in studies):
        raise ValueError(
            f"{votes_path} holds votes about videos of {', '.join(header['runs'])}, which are not those of the runs "
            f"here ({', '.join(dict.fromkeys(name for name, _ in hashes))}). Pass the runs that were voted on."
        )
    return votes_table(vote_results(votes_path, level=level))


def _what_came_out(tables: Sequence[RunTable], comparisons: Sequence[Comparison]) -> str:
    """A sentence for each method against the baseline, for somebody who knows nothing of it; empty for one method."""

    def passed(name: str) -> str:
        scores = [(table, score) for table in tables if table.run.name == name for score in table.scores]
        return f"{sum(table.benchmark.passes['pc'](score) for table, score in scores)} of {len(scores)}"

    sentences = []
    for comparison in comparisons:
        if comparison.metric == "pc":
            a, b, found = comparison.a, comparison.b, comparison.difference
            sentences.append(
                f"{a} passes for physics in {passed(a)} videos, {b} in {passed(b)}; its mean physics score is "
                f"{found.mean_a:.3f}, that of {b} {found.mean_b:.3f}, a difference of {found.difference:+.3f} "
                f"[{found.low:+.3f}, {found.high:+.3f}]: {comparison.verdict}."
            )
    return " ".join(sentences)


def write_page(
    out_html: str | os.PathLike[str],
    tables: Sequence[RunTable],
    comparisons: Sequence[Comparison],
    *,
    shown: Sequence[RunTable],
    max_prompts: int | None = 24,
    further_tables: Sequence[Table] = (),
    curves: Sequence[Curve] = (),
    title: str = "Comparison",
    notes: Sequence[str] = (),
    videos: tuple[Sequence[int], str] | None = None,
    lead: str = "",
    explanations: Mapping[str, str] | None = None,
) -> Path:
    """
    The page of [`write_comparison`] for runs that are counted already.

    Args:
        out_html, max_prompts, curves, title, notes: As in [`write_comparison`].
        tables (list of [`RunTable`]): Every run, of the same prompts and seeds.
        comparisons (list of [`Comparison`]): Shown first.
        shown (list of [`RunTable`]): Runs whose videos are embedded, a column each.
        further_tables (list of [`Table`], *optional*): Shown below those of the runs.
        videos (list of `int`, and `str`; *optional*): Numbers of the cases whose videos are embedded, instead of the
            first ones, and the rule by which they were chosen.
        lead, explanations: As in [`write_report`].

    Returns:
        `Path`: The file written.
    """
    run, labels = shown[0].run, [_label(table.run) for table in shown]
    prompts = _spread_prompts(run, max_prompts)
    cases, rule = videos or (
        [index * len(run.seeds) for index in prompts],
        f"{len(prompts)} of {len(run.prompts)} prompts, the first ones of each category in turn, not chosen by their "
        f"scores; seed {run.seeds[0]} of {list(run.seeds)}.",
    )
    facts = [
        f"Videos: {rule}",
        *(f"{_label(table.run)}: {_provenance(table.run)}" for table in tables),
    ]
    return write_report(
        out_html,
        title=title,
        columns=[Column(label) for label in labels],
        samples=[_sample(shown, labels, index) for index in cases],
        comparisons=comparisons,
        tables=[_runs_table(tables), *_group_tables(tables), *further_tables],
        curves=curves,
        notes=[*notes, *facts],
        disagreement="pc",
        lead=lead,
        explanations=explanations,
    )


def training_curves(log: str | os.PathLike[str] | Sequence[Mapping[str, Any]], name: str = "") -> list[Curve]:
    """
    One chart for each logged quantity; names with a common part before a slash (`rewards/chosen`) share one.

    Args:
        log (path or list of `dict`): A checkpoint's `trainer_state.json`, or `trainer.state.log_history`.
        name (`str`, *optional*): Method, put before the titles.

    Raises:
        ValueError: If the file cannot be read or has no log.
    """
    if isinstance(log, str | os.PathLike):
        content = read_json(log)
        if not isinstance(content, dict) or "log_history" not in content:
            raise ValueError(f"{log} has no 'log_history'. Pass the trainer_state.json of a checkpoint.")
        entries: Sequence[Mapping[str, Any]] = content["log_history"]
    else:
        entries = log
    series: dict[str, dict[str, dict[float, float]]] = {}
    for entry in entries:
        for key, value in entry.items():
            if _is_curve(key, value):
                series.setdefault(key.partition("/")[0], {}).setdefault(key, {})[entry["step"]] = float(value)
    curves = []
    for title, lines in series.items():
        steps = sorted({step for points in lines.values() for step in points})
        if len(steps) > 1:
            values = {key: [points.get(step, math.nan) for step in steps] for key, points in lines.items()}
            curves.append(Curve(f"{name}: {title}" if name else title, steps, values))
    return curves


def _is_curve(key: str, value: Any) -> bool:
    timing = key in _NOT_CURVES or key.endswith(("_runtime", "_per_second"))
    return not timing and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def compare_tables(
    tables: Sequence[RunTable], pairs: Sequence[tuple[str, str]], *, level: float = 0.95
) -> list[Comparison]:
    """
    Pairs of methods, the first of each against the second, in the metrics of [`compare_runs`]. The intervals stand by
    themselves: no p-value, and no correction for the number of comparisons.

    Args:
        tables (list of [`RunTable`]): Runs; those of one name are training seeds of one method.
        pairs (list of (`str`, `str`)): Names of methods.
        level (`float`, *optional*, defaults to `0.95`): Confidence level of the intervals.

    Returns:
        `list[Comparison]`: Metric by metric, the pairs in their order.

    Raises:
        ValueError: As in [`compare_runs`].
    """
    values, clusters, num_seeds = _paired_values(tables)
    return [
        Comparison(
            metric,
            a,
            b,
            paired_bootstrap(values[a][metric], values[b][metric], level=level, clusters=clusters),
            num_seeds,
        )
        for metric in METRICS
        for a, b in pairs
    ]


def _compare(tables: Sequence[RunTable], baseline: str | None, level: float) -> list[Comparison]:
    values, clusters, num_seeds = _paired_values(tables)
    baseline = tables[0].run.name if baseline is None else baseline
    if baseline not in values:
        raise ValueError(f"The baseline {baseline!r} is not among the methods {sorted(values)}.")
    pairs = [(metric, name) for name in values if name != baseline for metric in METRICS]
    differences, p_values = [], []
    for metric, name in pairs:
        a, b = values[name][metric], values[baseline][metric]
        differences.append(paired_bootstrap(a, b, level=level, clusters=clusters))
        p_values.append(prompt_sign_test(a, b, clusters))
    return [
        Comparison(metric, name, baseline, difference, num_seeds, p)
        for (metric, name), difference, p in zip(pairs, differences, holm(p_values), strict=True)
    ]


def _paired_values(tables: Sequence[RunTable]) -> tuple[dict[str, dict[str, list[float]]], list[int], int]:
    """Method -> metric -> values of its videos, paired by position; the prompt of each; number of training seeds."""
    if not tables:
        raise ValueError("A comparison needs at least one run, got none.")
    methods = _methods(tables)
    seeds = {name: [table.run.training_seed for table in runs] for name, runs in methods.items()}
    trained = {tuple(sorted(map(str, values))): name for name, values in seeds.items() if values != [None]}
    if len(trained) > 1:
        raise ValueError(
            f"Methods are compared training seed by training seed; each needs the same ones, got {seeds}."
        )
    num_seeds = max(len(values) for values in seeds.values())
    clusters = [case.prompt_index for case in tables[0].run.cases] * num_seeds
    return {name: _pooled(runs, num_seeds) for name, runs in methods.items()}, clusters, num_seeds


def _methods(tables: Sequence[RunTable]) -> dict[str, list[RunTable]]:
    """Runs by name, ordered by training seed, after checking that all of them can be compared."""
    first = tables[0]
    methods: dict[str, list[RunTable]] = {}
    for table in tables:
        run = table.run
        if [(c.prompt.text, c.seed) for c in run.cases] != [(c.prompt.text, c.seed) for c in first.run.cases]:
            raise ValueError(
                f"{run.folder} and {first.run.folder} have other prompts or seeds ({len(run.cases)} and "
                f"{len(first.run.cases)} videos). Evaluate both on the same ones."
            )
        if (table.judge, table.benchmark.name) != (first.judge, first.benchmark.name):
            raise ValueError(
                f"{run.folder} was scored by {table.judge!r} and counted as {table.benchmark.name!r}, "
                f"{first.run.folder} by {first.judge!r} as {first.benchmark.name!r}. Score both by one judge and rule."
            )
        if _judged(table) != _judged(first):
            raise ValueError(
                f"{run.folder} was judged by {dict(table.judged)}, {first.run.folder} by {dict(first.judged)}: one "
                "name, and other weights, settings or pictures, whose scores do not compare. Score both in one way."
            )
        methods.setdefault(run.name, []).append(table)
    for name, runs in methods.items():
        counts = Counter(table.run.training_seed for table in runs)
        if max(counts.values()) > 1 or (None in counts and len(counts) > 1):
            raise ValueError(
                f"Several runs are called {name!r} and their training seeds {list(counts)} do not tell them apart. "
                "Give methods distinct names, and each run of a method its training seed."
            )
    return {name: sorted(runs, key=lambda table: table.run.training_seed or 0) for name, runs in methods.items()}


def _judged(table: RunTable) -> dict[str, str]:
    """What must be equal for scores to compare; of tables with scores each run may have one of its own."""
    own = {"identity": ""} if table.judge == PrecomputedJudge.name else {}
    return {**table.judged, **own}


def _pooled(tables: Sequence[RunTable], num_seeds: int) -> dict[str, list[float]]:
    """Values of all videos of a method, seed after seed. A model without training seed stands against each of them."""
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for table in tables:
        for score in table.scores:
            values["sa"].append(float(score["sa"]))
            values["pc"].append(float(score["pc"]))
            values["joint"].append(float(table.benchmark.passes["joint"](score)))
    return {metric: row * (num_seeds // len(tables)) for metric, row in values.items()}


def _label(run: EvaluationRun) -> str:
    return run.name if run.training_seed is None else f"{run.name}, seed {run.training_seed}"


def _provenance(run: EvaluationRun) -> str:
    entries = {
        "model": run.provenance.get("model"),
        "adapter": run.provenance.get("adapter"),
        **{key: run.generation.get(key) for key in ("revision", "adapter_hash", "fps", "call_kwargs")},
        "run": run.identity,
        **run.versions,
    }
    return ", ".join(f"{key} {value}" for key, value in entries.items() if value is not None)


def _runs_table(tables: Sequence[RunTable]) -> Table:
    """One row for each run: all its videos."""
    header = ["run", *tables[0].as_table().header[1:]]
    rows = [[_label(table.run), *table.as_table().rows[0][1:]] for table in tables]
    return Table("Each run", header, rows, tables[0].as_table().note)


def _group_tables(tables: Sequence[RunTable]) -> list[Table]:
    """Proportion that passes both criteria by group, runs as columns; none when there are no groups."""
    groups = [group for group in tables[0].proportions if group != ALL]
    if not groups:
        return []
    rows = []
    for group in groups:
        first = tables[0].proportions[group]["joint"]
        of_runs = [table.proportions.get(group, {}).get("joint", "") for table in tables]
        rows.append([group, str(first.n), *map(str, of_runs)])
    header = ["group", "videos", *(_label(table.run) for table in tables)]
    return [Table("Joint proportion by group", header, rows)]


def _spread_prompts(run: EvaluationRun, most: int | None) -> list[int]:
    """Prompts to show: the first one of each category, then the second ones, and so on; in the order of the run."""
    counts: Counter[str] = Counter()
    turns = []
    for index, prompt in enumerate(run.prompts):
        turns.append((counts[prompt.category], index))
        counts[prompt.category] += 1
    return sorted(index for _, index in sorted(turns)[:most])


def _sample(tables: Sequence[RunTable], labels: Sequence[str], index: int) -> Sample:
    case = tables[0].run.cases[index]
    scores: dict[str, dict[str, float | str]] = {}
    for label, table in zip(labels, tables, strict=True):
        score = table.scores[index]
        scores[label] = {"pc": float(score["pc"]), "sa": float(score["sa"])}
        if isinstance(score.get("explanation"), str):
            scores[label]["explanation"] = score["explanation"]
    videos = {label: run.video(run.cases[index]) for label, run in zip(labels, (t.run for t in tables), strict=True)}
    return Sample(case.prompt.text, videos, scores, case.prompt.category)
