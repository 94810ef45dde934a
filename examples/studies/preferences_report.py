# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl[evaluation]", "matplotlib"]
# ///
"""
The pages of the studies of `preferences.py`: tables and figures of all that is there, between the two marks of a page.

    accelerate launch examples/studies/preferences_report.py --pages docs/benchmarks

An arm counts with the training seeds that are whole; what is missing is listed as such.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preferences import ARMS, DPO, MEASURED, RESULT, STUDIES, Runner, parse, regularised

from video_trl.experiment import BASE, REG_DPO
from video_trl.files import read_json, write_atomically


if TYPE_CHECKING:
    from video_trl.evaluation import PairedDifference
    from video_trl.evaluation.runs.tables import RunTable

MARKS = ("<!-- results of examples/studies/preferences_report.py -->", "<!-- end of results -->")
LAST_ENTRIES = 5  # of a log that stand for the end of a run: a quarter of it
OF_RATIOS = "; of log-ratio arms the gap is the logarithm of the ratio of the two errors"
MODES = "modes.json"


@dataclass
class PageArguments:
    """Where the pages are."""

    pages: str = field(default="docs/benchmarks", metadata={"help": "Folder of the pages of the studies."})


def main(argv: list[str]) -> None:
    study, runner, where = parse(argv, PageArguments)
    for name in study.studies:
        Report(runner, name).write(Path(where.pages) / STUDIES[name].page)


@dataclass(frozen=True)
class Unit:
    """What was measured of an arm with one training seed."""

    pc: list[float]
    sa: list[float]
    modes: list[str]
    prompts: list[str]
    cpu_seconds: float
    win_gaps: list[float]
    log: list[dict[str, Any]]
    rows: int

    def values(self, metric: str) -> list[float]:
        if metric == "lawful":
            return [float(mode == "lawful") for mode in self.modes]
        return {"pc": self.pc, "sa": self.sa}[metric]

    def at_end(self, metric: str) -> float:
        """Mean of a metric over the last entries of the log."""
        return mean([entry[metric] for entry in self.log if metric in entry][-LAST_ENTRIES:])


class Report:
    """Tables of a study, of whatever is there: an arm counts with the seeds that are whole."""

    def __init__(self, runner: Runner, name: str) -> None:
        self.runner, self.name, self.study = runner, name, STUDIES[name]
        self.seeds = runner.experiment.seeds
        self.arms = (*self.study.arms, *self.study.further)
        self.units = {arm: self._units(arm) for arm in (BASE, *self.arms)}

    def write(self, page: Path) -> None:
        """
        Puts the tables between the marks of the page, and the figures beside it.

        Raises:
            ValueError: The page has no place for them, or the base model is not evaluated.
        """
        text = page.read_text() if page.is_file() else ""
        if any(text.count(mark) != 1 for mark in MARKS):
            raise ValueError(f"{page}: expected each of the lines {MARKS} once, between which the tables are written.")
        if not self.units[BASE]:
            raise ValueError(f"Expected an evaluation of the base model in {self.runner.folder}. Run the study first.")
        parts = [self.setting(), self.figure(page.with_suffix(".png")), self.scores(), self.comparisons()]
        if self.name == "reg_dpo":
            parts += [self.curves(page.with_name("reg_dpo_curves.png")), self.end_of_training(), self.claims()]
        if self.name == "phygdpo":
            parts.append(self.costs())
        if self.name == "losers":
            parts.append(self.mechanism())
        before, rest = text.split(MARKS[0])
        block = "\n\n".join([MARKS[0], *filter(None, parts), MARKS[1]])
        write_atomically(page, before + block + rest.split(MARKS[1])[1])
        print(f"{page} is written.")

    def _units(self, arm: str) -> dict[int, Unit]:
        tables = {seed: self.runner.table(arm, seed) for seed in self.seeds}
        return {seed: self._unit(arm, seed, table) for seed, table in tables.items() if table is not None}

    def _unit(self, arm: str, seed: int, table: "RunTable") -> Unit:
        from video_trl.data.video_io import read_video
        from video_trl.sandbox import find_mode

        rows, path = table.rows(), table.run.folder / MODES
        if not path.is_file():
            modes = [find_mode(read_video(row["video"]), row["prompt"]).name for row in rows]
            write_atomically(path, json.dumps(modes))
        result: dict[str, Any] = {"cpu_seconds": 0.0, "win_gaps": [], "log_history": []}
        if arm != BASE:
            result = read_json(self.runner.folder / self.runner.unit(arm, seed) / RESULT)
        columns = {name: [row[name] for row in rows] for name in ("pc", "sa")}
        prompts = [row["prompt"] for row in rows]
        log = result["log_history"]
        return Unit(**columns, modes=read_json(path), prompts=prompts, cpu_seconds=result["cpu_seconds"],
                    win_gaps=result["win_gaps"], log=log, rows=result.get("rows", 0))  # fmt: skip

    def setting(self) -> str:
        values = read_json(self.runner.folder / "studies.json")
        whole = sum(len(self.units[arm]) for arm in self.study.arms)
        minutes = sum(unit.cpu_seconds for arm in self.study.arms for unit in self.units[arm].values()) / 60
        return (
            f"Whole: {whole} of {len(self.seeds) * len(self.study.arms)} runs ({len(self.study.arms)} arms, training "
            f"seeds {', '.join(map(str, self.seeds))}), {minutes:.0f} CPU minutes of training. Setting: "
            f"{', '.join(f'{name} {value}' for name, value in values.items())}."
        )

    # ---- Scores and comparisons ----

    @cached_property
    def real_pc(self) -> float:
        """Of lawful clips of the same sentences after the autoencoder: what can be reached."""
        from video_trl.experiment import real_clips_pc

        return real_clips_pc(list(dict.fromkeys(self._base.prompts)))

    @property
    def _base(self) -> Unit:
        return next(iter(self.units[BASE].values()))

    def difference(self, a: str, b: str, metric: str) -> "PairedDifference | None":
        """Over the training seeds that both have; whole sentences are resampled, with the videos of all seeds."""
        from video_trl.evaluation import paired_bootstrap

        seeds = self.common(a, b)
        if not seeds:
            return None
        ours, theirs = ([value for seed in seeds for value in self._of(arm, seed).values(metric)] for arm in (a, b))
        return paired_bootstrap(ours, theirs, clusters=self._base.prompts * len(seeds))

    def common(self, a: str, b: str) -> list[int]:
        return [seed for seed in self.seeds if all(arm == BASE or seed in self.units[arm] for arm in (a, b))]

    def _of(self, arm: str, seed: int) -> Unit:
        return self._base if arm == BASE else self.units[arm][seed]

    def scores(self) -> str:
        rows = [["arm", "seeds", "videos", "CPU s", "pc", "gap closed", "sa", "lawful, violated, neither, %",
                 "pc over base", "held-out win_gap"]]  # fmt: skip
        there = [arm for arm in self.arms if self.units[arm]]
        rows += [[arm, *self._scores(arm, list(self.units[arm].values()))] for arm in (BASE, *there)]
        note = (
            f"Means over seeds. Videos: seen in training. Gap: between the base model and lawful clips of the same "
            f"sentences after the autoencoder (pc {self.real_pc:.3f}). Intervals: 95 %, paired bootstrap over "
            f"{len(set(self._base.prompts))} sentences ({len(self._base.prompts)} videos a seed), win_gap over rows"
            f"{OF_RATIOS if any(ARMS[arm].options.get('gap') == 'log_ratio' for arm in there) else ''}."
        )
        missing = [arm for arm in self.study.arms if arm not in there]
        further = len([arm for arm in self.study.further if arm not in there])
        rest = f"\n\nFurther {further} arms are there for `--arms`, and were not run." if further else ""
        return f"### Scores\n\n{markdown_table(rows)}\n\n{note}{not_yet(missing)}{rest}"

    def _scores(self, arm: str, units: list[Unit]) -> list[str]:
        from video_trl.sandbox import mode_shares

        pc, sa = (mean([value for unit in units for value in unit.values(metric)]) for metric in ("pc", "sa"))
        shares = mode_shares([mode for unit in units for mode in unit.modes])
        ways = ", ".join(f"{100 * share:.0f}" for share in shares.values())
        if arm == BASE:
            return ["", "", "", f"{pc:.3f}", "", f"{sa:.3f}", ways, "", ""]
        closed = (pc - mean(self._base.pc)) / (self.real_pc - mean(self._base.pc))
        seconds = mean([unit.cpu_seconds for unit in units])
        return [str(len(units)), f"{self._videos(arm):,}", f"{seconds:.0f}", f"{pc:.3f}", f"{100 * closed:.0f} %",
                f"{sa:.3f}", ways, interval(self.difference(arm, BASE, "pc")), self._win_gap(units)]  # fmt: skip

    def _videos(self, arm: str) -> int:
        """Seen in training, each as often as it is seen."""
        spec, args = ARMS[arm], self.runner.args
        each = 1 if spec.method == "sft" else 2
        if spec.options.get("loss_type") in ("sum", "plackett_luce"):
            each = 1 + self.runner.data.num_rejected
        return round(spec.steps * args.max_steps * spec.batch * args.per_device_train_batch_size * each)

    def _win_gap(self, units: list[Unit]) -> str:
        from video_trl.evaluation import paired_bootstrap

        gaps = [gap for unit in units for gap in unit.win_gaps]
        if not gaps:
            return ""
        rows = [row for unit in units for row in range(len(unit.win_gaps))]
        return interval(paired_bootstrap(gaps, [0.0] * len(gaps), clusters=rows), "+.4f")

    def comparisons(self) -> str:
        from video_trl.evaluation import holm, prompt_sign_test, verdict

        pairs = [pair for pair in self.study.comparisons if self.common(*pair)]
        raw = []
        for a, b in pairs:
            seeds = self.common(a, b)
            ours, theirs = ([v for seed in seeds for v in self._of(arm, seed).pc] for arm in (a, b))
            raw.append(prompt_sign_test(ours, theirs, self._base.prompts * len(seeds)))
        rows = [["comparison", "seeds", "pc", "p (Holm)", "verdict", "sa", "lawful"]]
        for (a, b), p in zip(pairs, holm(raw), strict=True):
            found = [self.difference(a, b, metric) for metric in ("pc", "sa", "lawful")]
            assert found[0] is not None
            words = verdict(found[0], num_seeds=len(self.common(a, b)), p_adjusted=p)
            number = str(len(self.common(a, b)))
            rows.append([f"{a} over {b}", number, interval(found[0]), f"{p:.2g}", words, *map(interval, found[1:])])
        note = (
            "Fixed before there were results. p: sign test over sentences in pc, corrected by Holm's method for the "
            f"{len(pairs)} comparisons of this table that could be made."
        )
        missing = [
            f"{a} over {b}"
            for a, b in self.study.comparisons
            if (a, b) not in pairs and a not in self.study.further  # of which nothing was said
        ]
        table = f"\n\n{markdown_table(rows)}\n\n{note}" if pairs else ""
        return f"### Comparisons{table}{not_yet(missing)}"

    def figure(self, path: Path) -> str:
        """pc over base of every arm: interval with all seeds pooled, and each seed as a dash."""
        from matplotlib.figure import Figure

        arms = [arm for arm in self.arms if self.units[arm]]
        if not arms:
            return ""
        figure = Figure(figsize=(7.5, 0.27 * len(arms) + 1), layout="constrained")
        panel = figure.subplots()
        for height, arm in enumerate(reversed(arms)):
            found = self.difference(arm, BASE, "pc")
            assert found is not None
            panel.plot([found.low, found.high], [height, height], color="tab:blue", linewidth=3)
            panel.plot([found.difference], [height], "o", color="tab:blue")
            each = [mean(unit.pc) - mean(self._base.pc) for unit in self.units[arm].values()]
            panel.plot(each, [height] * len(each), "|", color="black", markersize=9)
        panel.axvline(0, color="gray", linewidth=0.8, linestyle="--")
        panel.set_yticks(range(len(arms)), list(reversed(arms)), fontsize=8)
        panel.set_xlabel("pc over base: 95 % interval; a dash is a training seed")
        panel.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=110)
        return f"![pc over the base model, of every arm]({path.name})"

    def mechanism(self) -> str:
        """What the two errors did, and how often losers were held back."""
        names = ("win_gap", "lose_gap", "rewards/accuracies", "safeguard/held_back", "safeguard/scale")
        rows = [["arm", "rows", "held-out win_gap", *(f"`{name}`" for name in names)]]
        for arm in self.arms:
            units = list(self.units[arm].values())
            if not units or ARMS[arm].method == "sft":
                continue
            cells = []
            for name in names:
                logged = [unit for unit in units if any(name in entry for entry in unit.log)]
                cells.append(f"{mean([unit.at_end(name) for unit in logged]):.3g}" if logged else "")
            seen = {unit.rows for unit in units}
            rows.append([arm, ", ".join(map(str, sorted(seen))), self._win_gap(units), *cells])
        note = (
            f"On training rows: mean of the last {LAST_ENTRIES} log entries and of the seeds. Rows: those compared. "
            f"Held out: rows in the plain rendering, of all kinds of winners{OF_RATIOS}."
        )
        return f"### What the errors did\n\n{markdown_table(rows)}\n\n{note}"

    # ---- Reg-DPO ----

    def curves(self, path: Path) -> str:
        """Logged metrics over steps, mean over seeds: DPO black, fixed weights dashed, dynamic ones solid."""
        import matplotlib
        from matplotlib.figure import Figure

        arms = [arm for arm in self.arms if self.units[arm]]
        if not arms:
            return ""
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        panels = figure.subplots(1, 3)
        for name, panel in zip(("dgr", "win_gap", "lose_gap"), panels, strict=True):
            for number, arm in enumerate(arms):
                logs = [[entry for entry in unit.log if name in entry] for unit in self.units[arm].values()]
                steps = [entry["step"] for entry in logs[0]]
                values = [mean([entry[name] for entry in entries]) for entries in zip(*logs, strict=True)]
                kind, line = ("Oranges", "-") if arm.endswith("DGR") else ("Blues", "--")
                colour = "black" if arm == DPO else matplotlib.colormaps[kind](0.35 + 0.6 * (number % 5) / 4)
                panel.plot(steps, values, label=arm, color=colour, linestyle="-" if arm == DPO else line)
            panel.set_title(name)
            panel.set_xlabel("step")
            panel.set_yscale("symlog", linthresh=1 if name == "dgr" else 0.01)
            panel.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        figure.savefig(path, dpi=110)
        return f"![Training curves of every arm]({path.name})"

    def end_of_training(self) -> str:
        names = ("dgr", "loss/dpo", "win_gap", "lose_gap", "chosen_weight")
        rows = [["arm", *(f"`{name}`" for name in names), "collapse found at step"]]
        for arm in self.study.arms:
            units = list(self.units[arm].values())
            if not units:
                continue
            cells = []
            for name in names:
                ends = [unit.at_end(name) for unit in units]
                cells.append(f"{mean(ends):.3g} [{min(ends):.3g}, {max(ends):.3g}]")
            rows.append([arm, *cells, ", ".join(self._collapse(unit.log) for unit in units)])
        note = (
            f"On training rows. Mean of the last {LAST_ENTRIES} log entries; mean over seeds [smallest, largest]. The "
            "last column says where `find_collapse`, which is what `CollapseMonitor` asks, first finds the signature."
        )
        return f"### At the end of training\n\n{markdown_table(rows)}\n\n{note}"

    def _collapse(self, log: list[dict[str, Any]]) -> str:
        from video_trl.trainer import find_collapse

        found = (find_collapse(log[: end + 1], self.runner.args.beta) for end in range(len(log)))
        return next((str(collapse.step) for collapse in found if collapse is not None), "never")

    def claims(self) -> str:
        """The paper's claims (Section 4.3), each with the rule that decides it here; written before the results."""
        if any(len(self.units[arm]) < len(self.seeds) for arm in self.study.arms):
            return (
                "### The paper's claims\n\nThe rules of this table need every arm with every seed; not all are there."
            )
        start, arms = self.runner.args.beta / 4, regularised()
        strong = [arm for arm in arms if arm in ("r = 125", "r = 300", REG_DPO, "r = 1 DGR", "r = 2 DGR")]
        dpo = list(self.units[DPO].values())
        lowest = [min(entry["loss/dpo"] for entry in unit.log if "loss/dpo" in entry) for unit in dpo]
        falls = all(unit.at_end("dgr") < start / 2 for unit in dpo) and max(lowest) < math.log(2) / 2
        rises = all(min(unit.at_end("win_gap"), unit.at_end("lose_gap")) > 0 for unit in dpo)

        def gaps(arm: str) -> list[float]:
            return [mean(unit.win_gaps) for unit in self.units[arm].values()]

        def weights(arm: str) -> list[float]:
            return [unit.at_end("chosen_weight") for unit in self.units[arm].values()]

        def apart(a: str, b: str, sign: int) -> list[str]:
            return [m for m in ("pc", "sa", "lawful") if (d := self.difference(a, b, m)) and sign * d.difference > 0
                    and d.excludes_zero]  # fmt: skip

        every_seed = "every seed of the one against every seed of the other"
        differing = [
            f"{a} and {b} ({metric})"
            for a, b in (("r = 125", REG_DPO), ("r = 1 DGR", "r = 2 DGR"))
            for metric in [*apart(a, b, 1), *apart(a, b, -1)]
        ]
        rows = [
            ["claim of the paper", "rule here", "outcome"],
            ["DPO: gradient ratio and loss fall sharply", "DGR at end, loss once halved, every seed", holds(falls)],
            ["... while both gaps rise", "both above 0 at the end, every seed", holds(rises)],
            ["DPO degrades the videos", "pc, sa, lawful below base, interval without 0",
             listed(apart(DPO, BASE, -1), 3)],
            ["the SFT term curbs the win gap", f"held out, below DPO's, {every_seed}",
             listed([arm for arm in arms if max(gaps(arm)) < min(gaps(DPO))], len(arms))],
            ["the win gap is negative from about r = DGR on", "held out, mean below 0, every seed",
             listed([arm for arm in strong if max(gaps(arm)) < 0], len(strong))],
            ["DGR + r stays up where DPO's DGR vanishes", f"above DPO's, {every_seed}",
             listed([arm for arm in arms if min(weights(arm)) > max(weights(DPO))], len(arms))],
            ["r = DGR beats DPO", "pc, sa, lawful above, interval without 0", listed(apart("r = 1 DGR", DPO, 1), 3)],
            ["r = DGR beats the base model", "the same", listed(apart("r = 1 DGR", BASE, 1), 3)],
            ["beyond r = DGR nothing changes", "no interval excludes 0",
             f"fails: {', '.join(differing)}" if differing else "holds"],
        ]  # fmt: skip
        return f"### The paper's claims\n\nThe rules were fixed before the study was run.\n\n{markdown_table(rows)}"

    # ---- PhyGDPO's Table 2d ----

    def costs(self) -> str:
        rows = [["arm", "trained parameters", "weights", "peak of tensors", "file", "pc over base"]]
        for arm in MEASURED:
            path = self.runner.folder / "memory" / f"{self.runner.unit(arm, 0)}.json"
            if not path.is_file() or not self.units[arm]:
                continue
            memory, weights = read_json(path), self.runner.folder / self.runner.unit(arm, min(self.units[arm]))
            file = sum(file.stat().st_size for file in weights.rglob("*.safetensors"))
            sizes = (memory["weights"], memory["weights"] + memory["training"], file)
            cells = [f"{memory['trained']:,}", *(f"{size / 2**20:.1f} MiB" for size in sizes)]
            rows.append([arm, *cells, interval(self.difference(arm, BASE, "pc"))])
        missing = [arm for arm in MEASURED if arm not in [row[0] for row in rows]]
        table = f"\n\n{markdown_table(rows)}" if rows[1:] else ""
        return f"### Table 2d: the reference{table}{not_yet(missing)}"


def not_yet(names: Sequence[str]) -> str:
    return f"\n\n**Not run yet:** {'; '.join(names)}." if names else ""


def holds(value: bool) -> str:
    return "holds" if value else "fails"


def listed(names: Sequence[str], number: int) -> str:
    """Which of `number` arms or scores a rule holds for."""
    word = "holds" if len(names) == number else "fails" if not names else "in part"
    return f"{word}: {', '.join(names) or 'none'} ({len(names)} of {number})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interval(found: "PairedDifference | None", form: str = "+.3f") -> str:
    return "" if found is None else f"{found.difference:{form}} [{found.low:{form}}, {found.high:{form}}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    main(sys.argv[1:])
