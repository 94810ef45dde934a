# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Whether rounds help on the sandbox: new rejected videos from the current adapter, against the first ones kept.

    python examples/studies/rounds.py --output_dir outputs/rounds_study

Rounds of PhyGDPO on 128 lawful clips, a hundred steps each and three at most, with the rule that ends them. The
controls have the same clips and recipe, and as many updates as all rounds of that seed together, the one that ended
them included: PhyGDPO with the rejected videos of the first round; fine-tuning; fine-tuning in the time of PhyGDPO.

Fixed before there were results: the measure is the mean `pc` on 60 sentences that no round has seen, one noise. What
rounds hand over is the best adapter by their own evaluation. Rounds are better than a control if the interval of the
difference is above zero with three training seeds, after Holm's correction for the comparisons of the table.

Added when the first seed had been seen, and no part of the rule: the adapter of the last round, adopted or not, which
has had as many updates as the controls.

What is there is not made again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trl import TrlParser

from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer, VideoSFTConfig, VideoSFTTrainer
from video_trl.curation import RoundsConfig, RoundsResult, run_rounds
from video_trl.evaluation import PairedDifference, holm, paired_bootstrap, prompt_sign_test, verdict
from video_trl.evaluation.evaluate import sandbox_prompts
from video_trl.evaluation.runs.tables import RunTable
from video_trl.experiment import BASE, evaluate_trained, stored_table
from video_trl.hub import LORA_FILE_NAME
from video_trl.load import SANDBOX


ROUNDS, LAST, KEPT, SFT, LONGER = "rounds", "last round", "first losers kept", "SFT", "SFT, equal time"
CONTROLS = (KEPT, SFT, LONGER)
LONG = 2.3  # steps of fine-tuning in the time of one of PhyGDPO: as in the sandbox experiment
SENTENCES, DRAW, NOISE = 60, 2, 1  # nothing was chosen on them
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.01, "timestep_range": [850, 1000],
    "lora_target_modules": "all-linear", "fps": 8, "bf16": False, "use_cpu": True, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
PREFERENCE: dict[str, Any] = {**TRAINING, "beta": 500.0, "sft_weight": 500.0, "rejected_score_below": 0.4}


@dataclass
class StudyArguments:
    """Where the study is, and its size."""

    output_dir: str = field(default="outputs/rounds_study", metadata={"help": "Folder of rounds, controls and runs."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    num_clips: int = field(default=128, metadata={"help": "Lawful clips."})
    max_steps: int = field(default=100, metadata={"help": "Updates of a round."})
    max_rounds: int = field(default=3, metadata={"help": "Rounds at most."})
    eval_prompts: int = field(default=42, metadata={"help": "Sentences by which rounds end, two videos each."})


@dataclass
class Study:
    """The arms of one training seed."""

    args: StudyArguments
    seed: int

    @cached_property
    def folder(self) -> Path:
        return Path(self.args.output_dir) / f"seed{self.seed}"

    @cached_property
    def result(self) -> RoundsResult:
        return run_rounds(
            RoundsConfig(
                output_dir=str(self.folder / "rounds"),
                num_clips=self.args.num_clips,
                max_rounds=self.args.max_rounds,
                num_eval_prompts=self.args.eval_prompts,
                training={**PREFERENCE, "max_steps": self.args.max_steps},
                seed=self.seed,
            )
        )

    def adapter(self, arm: str) -> str | None:
        """Folder of what an arm has trained; `None`, the base model, if no round was better than it."""
        if arm in (ROUNDS, LAST):
            return self.result.best if arm == ROUNDS else self.result.rounds[-1].adapter
        folder = self.folder / arm.replace(",", "").replace(" ", "-")
        if not (folder / LORA_FILE_NAME).is_file():
            trainer = self.trainer(arm, str(folder))
            trainer.train()
            trainer.save_model()
        return str(folder)

    def trainer(self, arm: str, folder: str) -> Any:
        import datasets

        table = self.folder / "rounds" / "round-1" / "groups" / "train.parquet"
        rows = datasets.load_dataset("parquet", data_files=str(table), split="train")
        updates = self.args.max_steps * len(self.result.rounds)
        if arm == KEPT:
            args = VideoGroupDPOConfig(folder, **PREFERENCE, max_steps=updates, seed=self.seed)
            return VideoGroupDPOTrainer(SANDBOX, args, rows)
        steps = round(updates * (LONG if arm == LONGER else 1))
        return VideoSFTTrainer(SANDBOX, VideoSFTConfig(folder, **TRAINING, max_steps=steps, seed=self.seed), rows)

    def table(self, arm: str) -> RunTable:
        run = self.folder / "runs" / arm.replace(",", "").replace(" ", "-")
        weights = None if arm == BASE else self.adapter(arm)
        prompts = sandbox_prompts(SENTENCES, seed=DRAW)
        return stored_table(run) or evaluate_trained(
            run, weights, prompts, seeds=(NOISE,), name=arm, training_seed=self.seed
        )


def rows(scores: dict[str, list[float]], sentences: list[str], seeds: int, ours: str = ROUNDS) -> list[str]:
    """One arm against the base model and the controls, from the `pc` of each video, all seeds in one order."""
    others = (BASE, *CONTROLS)
    lines = [f"| {ours} over | pc of it | difference | p (Holm) | verdict |", "|---|---|---|---|---|"]
    found = compared(scores, [(ours, arm) for arm in others], sentences, seeds)
    return lines + [
        f"| {arm} | {difference.mean_b:.3f} | {cells} |"
        for arm, (difference, cells) in zip(others, found, strict=True)
    ]


def compared(
    scores: dict[str, list[float]], pairs: Sequence[tuple[str, str]], sentences: list[str], seeds: int
) -> list[tuple[PairedDifference, str]]:
    """Of each pair of arms the difference, and cells of a table: it with its interval, p after Holm, the verdict."""
    p_values = holm([prompt_sign_test(scores[a], scores[b], sentences) for a, b in pairs])
    found = []
    for (a, b), p in zip(pairs, p_values, strict=True):
        each = paired_bootstrap(scores[a], scores[b], clusters=sentences)
        words = verdict(each, num_seeds=seeds, p_adjusted=p)
        found.append((each, f"{each.difference:+.3f} [{each.low:+.3f}, {each.high:+.3f}] | {p:.2g} | {words}"))
    return found


def main(argv: list[str]) -> None:
    (args,) = TrlParser((StudyArguments,)).parse_args_and_config(args=argv)
    scores: dict[str, list[float]] = {arm: [] for arm in (ROUNDS, LAST, BASE, *CONTROLS)}
    sentences: list[str] = []
    for seed in args.seeds:
        study = Study(args, seed)
        sys.stdout.write(f"Training seed {seed}\n{study.result}\n")
        for arm, values in scores.items():
            table = study.table(arm)
            values += [float(score["pc"]) for score in table.scores]
            means = table.means["all"]
            sys.stdout.write(f"{arm}: pc {means['pc']:.3f}, sa {means['sa']:.3f}\n")
            sys.stdout.flush()
        sentences += [row["prompt"] for row in table.rows()]
    for ours in (ROUNDS, LAST):
        sys.stdout.write("\n".join(rows(scores, sentences, len(args.seeds), ours)) + "\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
