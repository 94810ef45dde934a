# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Tables 1, 2 and 7 of Reg-DPO (https://huggingface.co/papers/2511.01450) on the sandbox.

- `pairs` (Tables 1 and 2): DPO on real clips against the model's own videos (GT-Pair), on the model's own videos
  against each other as annotators marked them, and on both.
- `hyperparameters` (Table 7): Reg-DPO (r = 1 DGR) with all weights or a LoRA of several ranks, four learning rates,
  four betas. The sandbox's rate and beta are not those of 14 billion weights: factors of its own stand for the paper's
  of its optimum, and the arm without a factor is the optimum.

The three annotators are not people: they give the judge's scores as marks from 1 to 5 with an error of `ERROR` marks.
From then on all is as with people: `annotated_pairs`, filled up to the number of the other pairs.

    accelerate launch examples/studies/gt_pair_tables.py                          # 16 arms x 3 seeds
    accelerate launch examples/studies/gt_pair_tables.py --tables pairs --seeds 0 # a part of it

What is there is not made again, nor what `preferences.py` left in the folder: DPO and r = 1 DGR are its arms. The
tables of what is there are printed and written to gt_pair_tables.md.
"""

import itertools
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from preferences import ALL_WEIGHTS, DEFAULTS, DPO, Arm, Runner, StudyRows, dynamic, fixed

from video_trl.experiment import BASE, ExperimentArguments
from video_trl.files import write_atomically
from video_trl.load import ScriptArguments


CENTRE = "r = 1 DGR"
ANNOTATED, BOTH = "DPO, annotated", "DPO, GT-Pair and annotated"
AS_THEY_ARE = {"rejected_score_below": None}  # marked losers have no scores; the real pairs are chosen below
BETAS = {f"Reg-DPO, beta x {factor:g}": factor for factor in (0.2, 2, 4)}
ARMS: dict[str, Arm] = {
    DPO: Arm("pair", options=fixed(0)),
    ANNOTATED: Arm("pair", "annotated", {**fixed(0), **AS_THEY_ARE}),
    BOTH: Arm("pair", "both", {**fixed(0), **AS_THEY_ARE}),
    CENTRE: Arm("pair", options=dynamic(1)),
    "Reg-DPO, all weights": Arm(
        "pair", options={**dynamic(1), **{name: ALL_WEIGHTS[name] for name in ("use_peft", "lora_target_modules")}}
    ),
    **{
        f"Reg-DPO, rank {rank}": Arm("pair", options={**dynamic(1), "lora_rank": rank, "lora_alpha": 2 * rank})
        for rank in (4, 8, 16, 32, 64)
    },
    **{f"Reg-DPO, rate x {factor:g}": Arm("pair", options=dynamic(1), rate=factor) for factor in (0.2, 3, 10)},
    **{name: Arm("pair", options=dynamic(1)) for name in BETAS},
}
TABLES = {
    "pairs": (DPO, ANNOTATED, BOTH),
    "hyperparameters": tuple(name for name in ARMS if name.startswith(("r =", "Reg-DPO"))),
}
BASELINES = {"pairs": BASE, "hyperparameters": CENTRE}  # what the other arms are compared with, by Holm's method
COMPARED = ((DPO, BASE), (DPO, ANNOTATED), (DPO, BOTH), (ANNOTATED, BASE), (BOTH, BASE))  # first rows: of Table 1
RATERS, ERROR = 3, 0.7
GOOD = 0.1  # one video is better than another one if its score is higher by this
PAGE = "gt_pair_tables.md"


@dataclass
class TableArguments:
    """What to run; how it is trained is said by the configuration of the sandbox experiment."""

    tables: list[str] = field(default_factory=lambda: list(TABLES), metadata={"help": f"Some of {', '.join(TABLES)}."})


# ---- Rows -----------------------------------------------------------------------------------------------------------


def votes_on(groups: Iterable[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Marks for each pair of rejected videos of each group, as a rating page would have them."""
    votes = []
    for number, row in enumerate(groups):
        for pair in itertools.combinations(range(len(row["rejected"])), 2):
            pair_id = f"{number}-{pair[0]}-{pair[1]}"
            for index, rater in itertools.product(pair, range(RATERS)):
                generator = random.Random(f"{seed} {pair_id} {index} {rater}")
                votes.append(
                    {
                        "pair_id": pair_id,
                        "video": f"{number}-{index}",
                        "annotator": f"rater-{rater}",
                        "prompt": row["prompt"],
                        **marks(row["rejected_scores"][index], generator),
                    }
                )
    return votes


def marks(score: dict[str, float], generator: random.Random) -> dict[str, int]:
    """Five marks: `pc` stands for the motion, `sa` for the instruction, their mean for all else."""
    from video_trl.curation.annotated import DIMENSIONS

    meant = {"motion_quality": score["pc"], "instruction_adherence": score["sa"]}
    truth = [meant.get(name, (score["pc"] + score["sa"]) / 2) for name in DIMENSIONS]
    return {
        name: min(max(round(1 + 4 * value + generator.gauss(0, ERROR)), 1), 5)
        for name, value in zip(DIMENSIONS, truth, strict=True)
    }


class PairRows(StudyRows):
    """Further kinds: "annotated", and "both": annotated and real pairs, as many of each."""

    def of(self, kind: str) -> Any:
        if kind not in ("annotated", "both"):
            return super().of(kind)
        from video_trl.curation import annotated_pairs

        real = self.trained()
        # The paper: all pairs whose marks differ by 2, and ones that differ by 1 up to the number of the others.
        pairs, _ = annotated_pairs(votes_on(real), min_raters=RATERS, min_positive=None, fill_to=len(real))
        videos = {f"{n}-{index}": video for n, row in enumerate(real) for index, video in enumerate(row["rejected"])}
        marked = [
            {
                "prompt": row["prompt"],
                "chosen": videos[row["chosen"]["path"]],
                "rejected": [videos[row["rejected"]["path"]]],
            }
            for row in pairs
        ]
        if kind == "annotated":
            return marked
        return marked + self._lawless(real)

    def _lawless(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Real pairs like those that the other arms are trained on: the first loser below the bound, where one is."""
        found = []
        for row in rows:
            scored = zip(row["rejected"], row["rejected_scores"], strict=True)
            losers = [video for video, score in scored if score["pc"] < self.below]
            if losers:
                found.append({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": losers[:1]})
        return found


@dataclass
class TableRunner(Runner):
    """With the arms of this study."""

    arms: dict[str, Arm] = field(default_factory=lambda: ARMS)

    @cached_property
    def rows(self) -> StudyRows:
        below = self.args.rejected_score_below or 1.0
        return PairRows(self.folder, self.experiment.found_clips, self.data.num_rejected, below)

    def trainer(self, arm: str, seed: int, **changes: Any) -> Any:
        if arm in BETAS:
            changes["beta"] = BETAS[arm] * self.args.beta
        return super().trainer(arm, seed, **changes)


# ---- Tables ---------------------------------------------------------------------------------------------------------


def page(runner: Runner, tables: Sequence[str]) -> str:
    """The tables of what is there, as Markdown."""
    from video_trl.evaluation.report.comparison import compare_runs
    from video_trl.evaluation.report.page import Table, summary_table
    from video_trl.evaluation.runs.tables import text_table

    seeds = runner.experiment.seeds
    parts = []
    for name in tables:
        rows = []
        for arm in (BASE, *TABLES[name]):
            there = [table for seed in seeds if (table := runner.table(arm, seed)) is not None]
            if there:
                scores = [score for table in there for score in table.scores]
                means = [f"{fmean(score[key] for score in scores):.3f}" for key in ("pc", "sa")]
                rows.append([arm, str(1 if arm == BASE else len(there)), *means])
        note = "Means over seeds, prompts and noises."
        parts.append(text_table(Table(f"{name}: scores", ["arm", "seeds", "pc", "sa"], rows, note)))
        whole = [arm for arm in (BASE, *TABLES[name]) if all(runner.table(arm, seed) for seed in seeds)]
        if len(whole) > 1 and BASELINES[name] in whole:
            units = dict.fromkeys(runner.unit(arm, seed) for arm in whole for seed in seeds)
            folders = [runner.folder / "runs" / unit for unit in units]
            parts.append(summary_table(compare_runs(folders, baseline=BASELINES[name])))
    if "pairs" in tables:
        compared = [line for pair in COMPARED if (line := preference(runner, *pair))]
        note = f"A video is Good (Bad) where its score is higher (lower) by {GOOD} than that of the same noise."
        header = ["comparison", "seeds", "pc G/S/B", "score", "sa G/S/B", "score"]
        parts.append(text_table(Table("pairs: Good / Same / Bad, as Table 1", header, compared, note)))
    return "\n\n".join(f"```\n{part}\n```" for part in parts) + "\n"


def preference(runner: Runner, arm: str, other: str) -> list[str]:
    """A row of Table 1; empty if no seed has both."""
    from video_trl.evaluation.statistics import gsb_score

    pairs = [[runner.table(name, seed) for name in (arm, other)] for seed in runner.experiment.seeds]
    whole = [pair for pair in pairs if None not in pair]
    if not whole:
        return []
    cells = []
    for key in ("pc", "sa"):
        gaps = [a[key] - b[key] for ours, theirs in whole for a, b in zip(ours.scores, theirs.scores, strict=True)]
        good, bad = sum(gap > GOOD for gap in gaps), sum(gap < -GOOD for gap in gaps)
        same = len(gaps) - good - bad
        cells += [f"{good}/{same}/{bad}", f"{gsb_score(good, same, bad):.2f}"]
    return [f"{arm} vs {other}", str(len(whole)), *cells]


def main(argv: list[str]) -> None:
    """
    Raises:
        ValueError: There is no such table.
    """
    from trl import TrlParser

    from video_trl import VideoGroupDPOConfig

    parser = TrlParser((TableArguments, ScriptArguments, ExperimentArguments, VideoGroupDPOConfig))
    chosen, data, experiment, args = parser.parse_args_and_config(args=[*DEFAULTS, *argv])
    unknown = set(chosen.tables) - set(TABLES)
    if unknown:
        raise ValueError(f"Expected tables among {list(TABLES)}, got {unknown}.")
    runner = TableRunner(data, experiment, args)
    runner.claim_folder()
    for name, seed in itertools.product(chosen.tables, experiment.seeds):  # a cut study has whole seeds
        for arm in (BASE, *TABLES[name]):
            runner.run(arm, seed)
        text = page(runner, chosen.tables)
        write_atomically(Path(args.output_dir) / PAGE, text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
