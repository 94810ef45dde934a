# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Whether a preference helps a model that is fine-tuned already, on the sandbox: one round after fine-tuning.

    python examples/studies/tuned_first.py --output_dir outputs/tuned_first

Fine-tuning on the clips that the judge passes, 400 updates; then a round: the fine-tuned model makes three videos of
each sentence, the judge scores them, and a hundred updates set each clip against those with a `pc` below 0.4. With
log-ratio gaps, and as PhyGDPO with r = 500. The controls fine-tune on the same clips: for as long as both trainings
took (2.3 updates for one of a preference), in one schedule or as a second training of the first adapter; and for as
long as everything took, with the processor time of making and judging the rejected videos.

Fixed before there were results, after a trial with one seed on other clips, sentences and noises: the measure is the
mean `pc` on 84 sentences with two noises each. A preference is better if the intervals of its differences from both
controls of equal training time are above zero with three training seeds, after Holm's correction for the six
comparisons of the table. The comparison with the control of the whole time is shown, and decides nothing.

A second look (`--second_look`), fixed after the first had shown no difference and before its own results: the same
adapters on the 116 held-out sentences that the first did not use, three noises each; log-ratio over both controls of
equal training time, Holm's correction for these two.

What is there is not made again.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rounds import LONG, PREFERENCE, TRAINING, compared
from trl import TrlParser

from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer, VideoSFTConfig, VideoSFTTrainer
from video_trl.curation import RoundsConfig, run_rounds
from video_trl.evaluation.evaluate import sandbox_prompts
from video_trl.evaluation.runs.tables import RunTable
from video_trl.experiment import BASE, evaluate_trained, real_clips_pc, stored_table
from video_trl.files import read_json, write_atomically
from video_trl.load import SANDBOX
from video_trl.sandbox.data.regimes import SandboxRows


TUNED, LOG_RATIO, PHYGDPO = "SFT", "SFT, then log-ratio", "SFT, then PhyGDPO"
LONGER, AGAIN, WHOLE = "SFT, equal time", "SFT, then SFT", "SFT, time of everything"
ARMS = (TUNED, LOG_RATIO, PHYGDPO, LONGER, AGAIN, WHOLE)
SENTENCES, DRAW, NOISES = 84, 3, (7, 8)  # nothing was chosen on them
ALL_SENTENCES, SECOND_NOISES = 200, (9, 10, 11)
REJECTED = 3  # videos of each sentence
OBJECTIVE: dict[str, Any] = {
    "gap": "log_ratio", "beta": 10.0, "lose_gap_weight": 0.25, "lose_gap_clip": 1.0, "win_gap_penalty": 1.0,
    "sft_weight": 0.0,
}  # fmt: skip


@dataclass
class StudyArguments:
    """Where the study is, and its size."""

    output_dir: str = field(default="outputs/tuned_first", metadata={"help": "Folder of clips, adapters and runs."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    regime: str = field(default="judged", metadata={"help": "Kind of clips: 'judged', 'wild', 'first 16'."})
    found_clips: int = field(default=320, metadata={"help": "Clips in the pool; the judge passes about 40 %."})
    tuned_steps: int = field(default=400, metadata={"help": "Updates of fine-tuning."})
    max_steps: int = field(default=100, metadata={"help": "Updates of the preference."})
    second_look: bool = field(default=False, metadata={"help": "Only the second look, at what the first has trained."})


@dataclass
class Study:
    """The arms of one training seed."""

    args: StudyArguments
    seed: int

    @cached_property
    def folder(self) -> Path:
        return Path(self.args.output_dir) / self.args.regime.replace(" ", "-") / f"seed{self.seed}"

    @cached_property
    def clips(self) -> Any:
        """The chosen videos with their sentences."""
        import datasets

        data = SandboxRows(Path(self.args.output_dir) / "data", self.args.found_clips, REJECTED, below=0.4)
        features = datasets.Features({"prompt": datasets.Value("string"), "chosen": datasets.Video(decode=False)})
        rows = [{name: row[name] for name in features} for row in data.of(self.args.regime)]
        return datasets.Dataset.from_list(rows, features=features)

    def adapter(self, arm: str) -> Path:
        """Folder of what an arm has trained."""
        folder = self.folder / _slug(arm)
        if not (folder / "spent.json").is_file():
            start = time.process_time()
            trainer = self.trainer(arm, str(folder))
            trainer.train()
            trainer.save_model()
            spent = {"updates": trainer.state.global_step, "cpu_seconds": time.process_time() - start}
            write_atomically(folder / "spent.json", json.dumps(spent))
        return folder

    def trainer(self, arm: str, folder: str) -> Any:
        shared: dict[str, Any] = {"output_dir": folder, "seed": self.seed, "overwrite_output_dir": True}
        steps, tuned = self.args.max_steps, self.args.tuned_steps
        if arm in (LOG_RATIO, PHYGDPO):
            own: dict[str, Any] = {**PREFERENCE, "lora_target_modules": None}
            own |= OBJECTIVE if arm == LOG_RATIO else {}
            start = str(self.adapter(TUNED))
            args = VideoGroupDPOConfig(**shared, **own, max_steps=steps, init_adapter=start)
            return VideoGroupDPOTrainer(SANDBOX, args, self.groups)
        longer = round(LONG * steps)
        updates = self.making if arm == WHOLE else 0
        updates += {TUNED: tuned, AGAIN: longer}.get(arm, tuned + longer)
        own = {**TRAINING, "max_steps": updates}
        if arm == AGAIN:
            own |= {"lora_target_modules": None, "init_adapter": str(self.adapter(TUNED))}
        return VideoSFTTrainer(SANDBOX, VideoSFTConfig(**shared, **own), self.clips)

    @cached_property
    def groups(self) -> Any:
        """Clips against videos of the fine-tuned model, as a round makes them; its own training is one update."""
        import datasets

        rounds = self.folder / "round"
        if not (rounds / "spent.json").is_file():
            self.clips.save_to_disk(str(self.folder / "clips"))
            start = time.process_time()
            run_rounds(
                RoundsConfig(
                    dataset_name=str(self.folder / "clips"),
                    output_dir=str(rounds),
                    init_adapter=str(self.adapter(TUNED)),
                    num_rejected=REJECTED,
                    max_rounds=1,
                    num_eval_prompts=2,
                    eval_seeds=[0],
                    training={**PREFERENCE, "max_steps": 1},
                    seed=self.seed,
                )
            )
            write_atomically(rounds / "spent.json", json.dumps({"cpu_seconds": time.process_time() - start}))
        table = rounds / "round-1" / "groups" / "train.parquet"
        return datasets.load_dataset("parquet", data_files=str(table), split="train")

    @property
    def making(self) -> int:
        """Updates of fine-tuning in the time in which the rejected videos were made and judged."""
        assert self.groups is not None
        tuned = read_json(self.adapter(TUNED) / "spent.json")
        made = read_json(self.folder / "round" / "spent.json")
        return round(made["cpu_seconds"] / tuned["cpu_seconds"] * tuned["updates"])

    def table(self, arm: str) -> RunTable:
        run = (self.folder.parent if arm == BASE else self.folder) / "runs" / _slug(arm)
        weights = None if arm == BASE else self.adapter(arm)
        seed = None if arm == BASE else self.seed
        prompts = sandbox_prompts(SENTENCES, seed=DRAW)
        noises: tuple[int, ...] = NOISES
        if self.args.second_look:
            seen = {prompt.text for prompt in prompts}
            prompts = tuple(each for each in sandbox_prompts(ALL_SENTENCES, seed=DRAW) if each.text not in seen)
            run, noises = run.with_name(f"{run.name}-second-look"), SECOND_NOISES
        return stored_table(run) or evaluate_trained(run, weights, prompts, seeds=noises, name=arm, training_seed=seed)


def _slug(arm: str) -> str:
    return arm.replace(",", "").replace(" ", "-").lower()


def rows(scores: dict[str, list[float]], sentences: list[str], seeds: int) -> list[str]:
    """Each preference against each control, from the `pc` of each video, all seeds in one order."""
    pairs = [(ours, control) for ours in (LOG_RATIO, PHYGDPO) for control in (LONGER, AGAIN, WHOLE)]
    pairs = [pair for pair in pairs if scores.keys() >= {*pair}]
    lines = ["| comparison | pc | p (Holm) | verdict |", "|---|---|---|---|"]
    found = compared(scores, pairs, sentences, seeds)
    return lines + [f"| {a} over {b} | {cells} |" for (a, b), (_, cells) in zip(pairs, found, strict=True)]


def main(argv: list[str]) -> None:
    (args,) = TrlParser((StudyArguments,)).parse_args_and_config(args=argv)
    arms = (BASE, LOG_RATIO, LONGER, AGAIN) if args.second_look else (BASE, *ARMS)
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    follow: dict[str, list[float]] = {arm: [] for arm in arms}
    sentences: list[str] = []
    for seed in args.seeds:
        study = Study(args, seed)
        for arm in found:
            scores = study.table(arm).scores
            found[arm] += [float(score["pc"]) for score in scores]
            follow[arm] += [float(score["sa"]) for score in scores]
            spent = {} if arm == BASE else read_json(study.adapter(arm) / "spent.json")
            sys.stdout.write(f"seed {seed}, {arm}: pc {_mean(found[arm][-len(scores) :]):.3f} {spent}\n")
            sys.stdout.flush()
        sentences += [row["prompt"] for row in study.table(BASE).rows()]
    top, base = real_clips_pc(list(dict.fromkeys(sentences))), _mean(found[BASE])
    lines = ["| arm | pc | gap closed | sa |", "|---|---|---|---|"]
    for arm, values in found.items():
        gap = f"{(_mean(values) - base) / (top - base):.0%}"
        lines.append(f"| {arm} | {_mean(values):.3f} | {gap} | {_mean(follow[arm]):.3f} |")
    text = "\n".join([*lines, "", *rows(found, sentences, len(args.seeds))])
    sys.stdout.write(f"{text}\n\nLawful clips after the autoencoder: pc {top:.3f}.\n")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main(sys.argv[1:])
