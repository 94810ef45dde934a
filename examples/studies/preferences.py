# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
What makes preference training work, on the sandbox: four studies that share recipe, clips, evaluation and arms.

- `controls`: fine-tuning against preferences at equal videos and at equal time; how many winners, whose winners, which
  losers.
- `reg_dpo`: the stability study of Reg-DPO (https://huggingface.co/papers/2511.01450, Section 4.3).
- `losers`: which losers with which safeguard of the winner, against fine-tuning in equal time on the same winners. A
  short list of arms; the rest of the grid is there for `--arms`.
- `phygdpo`: Tables 2b to 2d of PhyGDPO (https://huggingface.co/papers/2512.24551), and how its loss is estimated.

The recipe is that of the sandbox experiment with a quarter of its steps and half of its sentences, so that some 120
trainings take hours instead of a day. What an arm and training seed leaves is not made again: a study can be cut and
goes on, and studies share their arms:

    accelerate launch examples/studies/preferences.py                                # all: make study-preferences
    accelerate launch examples/studies/preferences.py --studies reg_dpo --seeds 0    # a part of it

`preferences_report.py` writes the pages of what is there.
"""

import itertools
import json
import re
import sys
import time
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_trl.experiment import (
    BASE,
    FIRST_NOISE_SEED,
    FOUND,
    JUDGED,
    LONGER,
    PHYGDPO,
    PLAIN,
    PROMPT_DRAW,
    REG_DPO,
    ExperimentArguments,
    evaluate_trained,
    peak_of_tensors,
    stored_table,
)
from video_trl.files import atomic_folder, recorded, write_atomically
from video_trl.load import SANDBOX, ScriptArguments
from video_trl.sandbox.data.regimes import SandboxRows


if TYPE_CHECKING:
    from video_trl import VideoGroupDPOConfig
    from video_trl.evaluation.runs.tables import RunTable

CONFIG = Path(__file__).parents[1] / "configs" / "sandbox-gdpo.yaml"
DEFAULTS = (
    "--config", str(CONFIG), "--output_dir", "outputs/preferences", "--seeds", "0", "1", "2",
    "--max_steps", "100", "--eval_prompts", "42", "--logging_steps", "5",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """
    How an arm differs from PhyGDPO in the sandbox experiment.

    Attributes:
        method: "sft", "group" (PhyGDPO's trainer), or "pair" (Reg-DPO's, which is plain DPO with r = 0).
        data: kind of its rows, as in `SandboxRows`.
        options: of the trainer.
        steps, batch, rate: factors of the steps, of the rows in a step, and of the learning rate.
    """

    method: str
    data: str = "judged"
    options: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0
    batch: float = 1.0
    rate: float = 1.0


def fixed(weight: float) -> dict[str, Any]:
    return {"sft_weight_mode": "fixed", "sft_coefficient": weight}


def dynamic(weight: float) -> dict[str, Any]:
    return {"sft_weight_mode": "dgr", "sft_coefficient": weight}


R0 = {"sft_weight": 0.0}
UNWEIGHTED = {**R0, "physics_rewarding": False}
ALL_WEIGHTS = {**R0, "use_peft": False, "lora_target_modules": None}
DPO, EQUAL_VIDEOS, FOUND_LONGER = "DPO", "SFT judged, equal videos", "SFT as found, longer"
LORA_SR, GROUP, VIDEO_DPO = "DPO, one loser", "groupwise", "DPO, own best over own worst"
COPIED, COPIED_SLOW = "PhyGDPO, r = 0, copied reference", "PhyGDPO, r = 0, copied reference, a tenth of the rate"
LONG = 2.3  # steps of fine-tuning in the time of one of a preference method: as in the sandbox experiment

ARMS: dict[str, Arm] = {
    FOUND: Arm("sft", "found"),
    JUDGED: Arm("sft"),
    EQUAL_VIDEOS: Arm("sft", steps=2),
    LONGER: Arm("sft", steps=LONG),
    FOUND_LONGER: Arm("sft", "found", steps=LONG),
    DPO: Arm("pair", options=fixed(0)),
    PLAIN: Arm("group", options=R0),
    PHYGDPO: Arm("group"),
    REG_DPO: Arm("pair", options=fixed(500)),
    **{f"SFT, {number} winners": Arm("sft", f"first {number}") for number in (16, 64)},
    **{f"PhyGDPO, {number} winners": Arm("group", f"first {number}") for number in (16, 64)},
    "SFT, own best": Arm("sft", "own best"),
    "PhyGDPO, own best": Arm("group", "own best"),
    "SFT, wild": Arm("sft", "wild"),
    "PhyGDPO, wild": Arm("group", "wild"),
    "PhyGDPO, wild against twins": Arm("group", "wild twins"),
    "PhyGDPO, guided losers": Arm("group", "guided"),
    "PhyGDPO, twins": Arm("group", "twins"),
    **{f"r = {weight}": Arm("pair", options=fixed(weight)) for weight in (25, 50, 125, 300)},
    **{f"r = {weight:g} DGR": Arm("pair", options=dynamic(weight)) for weight in (0.2, 0.5, 1, 2)},
    LORA_SR: Arm("pair", "1 of 3", fixed(0)),
    GROUP: Arm("group", options=UNWEIGHTED),
    VIDEO_DPO: Arm("pair", "own best, own worst", fixed(0)),
    COPIED: Arm("group", options=ALL_WEIGHTS),
    COPIED_SLOW: Arm("group", options=ALL_WEIGHTS, rate=0.1),
    **{f"PhyGDPO, r = 0, m = {number}": Arm("group", f"{number} of 7", R0) for number in (1, 3, 7)},
    # At equal videos: a step of these sees all of a group, a step of the others two videos of it.
    "groupwise, sum": Arm("group", options={**UNWEIGHTED, "loss_type": "sum"}, steps=0.5),
    "groupwise, exact": Arm("group", options={**UNWEIGHTED, "loss_type": "plackett_luce"}, steps=0.5),
    "PhyGDPO, r = 0, own noises": Arm("group", options={**R0, "shared_noise": False}),
    # At equal videos; the rate goes with the square root of the rows, as the noise of a gradient does.
    "PhyGDPO, r = 0, 4 rows": Arm("group", options=R0, steps=2, batch=0.5, rate=0.5**0.5),
    "PhyGDPO, r = 0, 32 rows": Arm("group", options=R0, steps=0.25, batch=4, rate=2),
}

# ---- Losers and safeguards: every kind of loser with every objective, for clean winners and for those in the wild.

LOSERS = ("own", "guided", "twins", "partial", "repaint")
LOG_RATIO = {"gap": "log_ratio", "beta": 10.0, "lose_gap_weight": 0.25, "lose_gap_clip": 1.0, "win_gap_penalty": 1.0}
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("pair", fixed(0)),
    "PhyGDPO, r = 0": ("group", R0),
    "PhyGDPO": ("group", {}),  # r = 500
    "safeguard": ("group", {**R0, "safeguard": "output", "safeguard_mu": 0.5}),
    "safeguard and r": ("group", {"safeguard": "output", "safeguard_mu": 0.5}),
    "hinge": ("group", {**R0, "win_gap_penalty": 125.0}),  # beta / 4
    "log-ratio": ("group", {**R0, **LOG_RATIO}),
}
# What other studies call the same arm.
SAME = {
    "PhyGDPO, guided": "PhyGDPO, guided losers", "PhyGDPO, wild own": "PhyGDPO, wild",
    "PhyGDPO, wild twins": "PhyGDPO, wild against twins",
    "PhyGDPO, few own": "PhyGDPO, 16 winners",
    **{f"{objective}, own": objective for objective in ("DPO", "PhyGDPO, r = 0", "PhyGDPO")},
}  # fmt: skip
WILD_LONGER, FEW_LONGER, JOINT = "SFT, wild, longer", "SFT, 16 winners, longer", "joint, wild twins"


def rows_of(losers: str) -> str:
    """Kind of the rows: of winners and losers as they stand in the name of an arm."""
    return {"own": "judged", "wild own": "wild", "few own": "first 16"}.get(losers, losers)


def add_arms() -> dict[str, tuple[str, ...]]:
    """Puts the arms of this study into `ARMS`; their names by winners."""
    added: dict[str, tuple[str, ...]] = {}
    for winners, kinds in (("", LOSERS), ("wild ", LOSERS), ("few ", ("own", "partial", "twins"))):
        names = []
        for (objective, (method, options)), losers in itertools.product(OBJECTIVES.items(), kinds):
            name = f"{objective}, {winners}{losers}"
            name = SAME.get(name, name)
            ARMS.setdefault(name, Arm(method, rows_of(f"{winners}{losers}"), options))
            names.append(name)
        added[winners.strip()] = tuple(names)
    ARMS[WILD_LONGER] = Arm("sft", "wild", steps=LONG)
    ARMS[FEW_LONGER] = Arm("sft", "first 16", steps=LONG)
    ARMS[JOINT] = Arm("group", "wild twins", {"repa_coeff": 0.5, "repa_options": {"align_layer": 0.6}})
    return added


@dataclass(frozen=True)
class Study:
    """
    Arms in the order of their table, and the comparisons, which were fixed before there were results.

    Further arms belong to the study too, but are run only where they are named; the page has them if they are there.
    """

    page: str
    arms: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]
    further: tuple[str, ...] = ()


def regularised() -> tuple[str, ...]:
    """Arms of Reg-DPO with r > 0, fixed ones first, each kind by its strength."""
    named = [name for name in ARMS if name.startswith("r = ")]
    return (*named[:4], REG_DPO, *named[4:])


CONTROLS = tuple(itertools.takewhile(lambda name: name != "r = 25", ARMS))
ESTIMATES = tuple(itertools.dropwhile(lambda name: name != VIDEO_DPO, ARMS))
BY_WINNERS = add_arms()
EQUAL_TIME = {"": LONGER, "wild": WILD_LONGER, "few": FEW_LONGER}  # by winners
EQUAL_UPDATES = {"": JUDGED, "wild": "SFT, wild", "few": "SFT, 16 winners"}
# The arms that decide the question of the study: fewest winners first, where a comparison could be worth most.
SHORT_LIST = (
    FEW_LONGER, EQUAL_UPDATES["few"], "PhyGDPO, 16 winners", "safeguard and r, few own",
    "safeguard and r, few partial", "hinge, few own", "log-ratio, few own",
    WILD_LONGER, EQUAL_UPDATES["wild"], "PhyGDPO, wild", "PhyGDPO, wild against twins", "safeguard and r, wild twins",
    "safeguard and r, wild partial", "hinge, wild twins", "log-ratio, wild twins", JOINT,
    LONGER, JUDGED, PHYGDPO, "safeguard and r, own", "log-ratio, own",
)  # fmt: skip
GRID = tuple(itertools.chain(*BY_WINNERS.values()))
STUDIES = {
    "controls": Study(
        "sandbox_controls.md",
        CONTROLS,
        (
            (FOUND, BASE), (JUDGED, BASE), (JUDGED, FOUND),
            *((arm, JUDGED) for arm in (DPO, PLAIN, PHYGDPO, REG_DPO)),
            *((arm, other) for other in (EQUAL_VIDEOS, LONGER) for arm in (DPO, PLAIN, PHYGDPO, REG_DPO)),
            (FOUND_LONGER, BASE), (PHYGDPO, PLAIN), (REG_DPO, DPO), (REG_DPO, PHYGDPO),
            ("SFT, 64 winners", "SFT, 16 winners"), (JUDGED, "SFT, 64 winners"),
            ("PhyGDPO, 16 winners", "SFT, 16 winners"), ("PhyGDPO, 64 winners", "SFT, 64 winners"),
            ("SFT, own best", JUDGED), ("PhyGDPO, own best", "SFT, own best"),
            ("SFT, wild", JUDGED), ("PhyGDPO, wild", "SFT, wild"), ("PhyGDPO, wild against twins", "SFT, wild"),
            ("PhyGDPO, wild against twins", "PhyGDPO, wild"),
            ("PhyGDPO, guided losers", PHYGDPO), ("PhyGDPO, twins", PHYGDPO),
        ),
    ),
    "reg_dpo": Study(
        "reg_dpo_stability.md",
        (DPO, *regularised()),
        ((DPO, BASE), *((arm, DPO) for arm in regularised()), ("r = 1 DGR", BASE), ("r = 125", REG_DPO),
         ("r = 1 DGR", "r = 2 DGR")),
    ),
    "phygdpo": Study(
        "phygdpo_ablation.md",
        (JUDGED, LORA_SR, GROUP, PLAIN, *ESTIMATES),
        (
            (LORA_SR, BASE), (GROUP, LORA_SR), (PLAIN, GROUP), (PLAIN, BASE), (PLAIN, LORA_SR), (PLAIN, VIDEO_DPO),
            (PLAIN, JUDGED), (PLAIN, COPIED), (PLAIN, COPIED_SLOW),
            ("PhyGDPO, r = 0, m = 3", "PhyGDPO, r = 0, m = 1"), ("PhyGDPO, r = 0, m = 7", "PhyGDPO, r = 0, m = 3"),
            ("groupwise, sum", GROUP), ("groupwise, exact", GROUP), ("PhyGDPO, r = 0, own noises", PLAIN),
            ("PhyGDPO, r = 0, 4 rows", PLAIN), ("PhyGDPO, r = 0, 32 rows", PLAIN),
        ),
    ),
    "losers": Study(
        "losers.md",
        SHORT_LIST,
        (
            *((EQUAL_TIME[winners], EQUAL_UPDATES[winners]) for winners in EQUAL_TIME),
            *((arm, EQUAL_TIME[winners]) for winners, arms in BY_WINNERS.items() for arm in arms),
            (JOINT, WILD_LONGER), (JOINT, "PhyGDPO, wild against twins"),
        ),
        further=tuple(arm for arm in GRID if arm not in SHORT_LIST),
    ),
}  # fmt: skip
MEASURED = (JUDGED, COPIED, PLAIN)  # memory, as in PhyGDPO's Table 2d
RESULT = "arm.json"  # as there
# What the numbers depend on; kept with the results, and others are refused.
SETTINGS = (
    "found_clips", "num_rejected", "eval_prompts", "eval_seeds", "max_steps", "per_device_train_batch_size",
    "learning_rate", "beta", "sft_weight", "rejected_score_below", "timestep_range", "lora_rank", "lora_alpha",
    "lora_target_modules",
)  # fmt: skip


@dataclass
class StudyArguments:
    """What to run; how it is trained is said by the configuration of the sandbox experiment."""

    studies: list[str] = field(
        default_factory=lambda: list(STUDIES), metadata={"help": f"Some of {', '.join(STUDIES)}, in their order."}
    )
    arms: list[str] | None = field(default=None, metadata={"help": "Only these arms of the studies."})


def parse(argv: list[str], *further: type[Any]) -> tuple[Any, ...]:
    """
    Which studies, and the runner of their arms; then the values of further dataclasses.

    Raises:
        ValueError: There is no such study or arm.
    """
    from trl import TrlParser

    from video_trl import VideoGroupDPOConfig

    parser = TrlParser((StudyArguments, ScriptArguments, ExperimentArguments, VideoGroupDPOConfig, *further))
    study, data, experiment, args, *others = parser.parse_args_and_config(args=[*DEFAULTS, *argv])
    unknown = set(study.studies) - set(STUDIES) | set(study.arms or ()) - {BASE, *ARMS}
    if unknown:
        raise ValueError(f"Expected studies among {list(STUDIES)} and arms among {[BASE, *ARMS]}, got {unknown}.")
    return study, Runner(data, experiment, args), *others


def main(argv: list[str]) -> None:
    study, runner = parse(argv)
    runner.claim_folder()
    for name, seed in itertools.product(study.studies, runner.experiment.seeds):  # a cut study has whole seeds
        for arm in (BASE, *STUDIES[name].arms, *STUDIES[name].further):
            if arm in (study.arms or (BASE, *STUDIES[name].arms)):
                runner.run(arm, seed)
    for arm in MEASURED if "phygdpo" in study.studies and study.arms is None else ():
        runner.measure_memory(arm)


# ---- Rows -----------------------------------------------------------------------------------------------------------

# Of noise; with much less of it the base model gives the lawful clip back. Chosen on other clips.
ETA = (0.9, 0.97)


@dataclass
class StudyRows(SandboxRows):
    """
    Those of the sandbox, and "partial" and "repaint", also after "wild" or "few": losers that the base model makes of
    the winner itself. The judge scores them, as it does all others.
    """

    def of(self, kind: str) -> Any:
        winners, _, losers = kind.rpartition(" ")
        if losers not in ("partial", "repaint"):
            return list(self.of(losers))[:16] if winners == "few" else super().of(kind)
        from datasets import Dataset, load_from_disk

        path = self.folder / kind.replace(" ", "-") / "table"
        if not path.is_dir():
            of_winners = self.of({"": "judged", "few": "first 16"}.get(winners, winners))
            made = self._matched(losers, of_winners, path.parent)
            with atomic_folder(path) as partial:
                Dataset.from_list(made).save_to_disk(str(partial))
        return load_from_disk(str(path))

    def _matched(self, losers: Any, rows: Any, folder: Path) -> list[dict[str, Any]]:
        from video_trl.curation import MatchedLosers, matched_losers
        from video_trl.data.tables import load_rows
        from video_trl.data.video_io import read_video
        from video_trl.sandbox import load_sandbox

        sandbox = load_sandbox()
        call = {name: sandbox.call_kwargs[name] for name in ("num_inference_steps", "guidance_scale")}
        how = MatchedLosers(losers, eta=ETA, seeds=(0, 1, 2), fps=8, **call)
        pairs = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in rows]
        made = []
        for row in load_rows(str(matched_losers(pairs, sandbox.pipeline, folder, how)), "train"):
            videos = [read_video(video) for video in row["rejected"]]
            judged = sandbox.judge.score(videos, [row["prompt"]] * len(videos))
            scores = [{name: float(score[name]) for name in ("sa", "pc")} for score in judged]
            made.append({**row, "rejected_scores": scores})
        return made


# ---- Running --------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """Trains and evaluates arms, and finds what is there."""

    data: ScriptArguments
    experiment: ExperimentArguments
    args: "VideoGroupDPOConfig"
    arms: dict[str, Arm] = field(default_factory=lambda: ARMS)

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @cached_property
    def rows(self) -> StudyRows:
        below = self.args.rejected_score_below or 1.0
        return StudyRows(self.folder, self.experiment.found_clips, self.data.num_rejected, below)

    def claim_folder(self) -> None:
        """
        Raises:
            ValueError: The folder holds results of another setting.
        """
        values = {**vars(self.data), **vars(self.experiment), **vars(self.args)}
        found, setting = recorded(self.folder / "studies.json", {name: values[name] for name in SETTINGS})
        if found != setting:
            raise ValueError(f"{self.folder} was made with {found}, expected {setting}. Pass another --output_dir.")

    def unit(self, arm: str, seed: int) -> str:
        """Folder of an arm and seed, named as the sandbox experiment names it; the base model is not trained."""
        return BASE if arm == BASE else f"{re.sub(r'[^a-z0-9]+', '-', arm.lower())}-seed{seed}"

    def run(self, arm: str, seed: int) -> None:
        """What is there is not made again."""
        if arm != BASE and not (self.folder / self.unit(arm, seed) / RESULT).is_file():
            self._train(arm, seed)
        if self.table(arm, seed) is None:
            self._evaluate(arm, seed)
            print(f"{self.unit(arm, seed)} is whole.", flush=True)

    def table(self, arm: str, seed: int) -> "RunTable | None":
        """The scores of an arm and seed, if they are whole."""
        return stored_table(self.folder / "runs" / self.unit(arm, seed))

    def trainer(self, arm: str, seed: int, **changes: Any) -> Any:
        """The trainer of an arm, with changes. What neither says is as in the sandbox experiment."""
        from video_trl import (
            VideoGroupDPOConfig,
            VideoGroupDPOTrainer,
            VideoRegDPOConfig,
            VideoRegDPOTrainer,
            VideoSFTConfig,
            VideoSFTTrainer,
        )

        spec, args = self.arms[arm], self.args
        kinds: dict[str, tuple[Any, Any]] = {
            "sft": (VideoSFTTrainer, VideoSFTConfig),
            "group": (VideoGroupDPOTrainer, VideoGroupDPOConfig),
            "pair": (VideoRegDPOTrainer, VideoRegDPOConfig),
        }
        trainer_class, config_class = kinds[spec.method]
        known = {item.name for item in fields(config_class) if item.init}
        values = {name: value for name, value in vars(args).items() if name in known}
        values |= {
            "output_dir": str(self.folder / self.unit(arm, seed)),
            "overwrite_output_dir": True,  # an arm that was cut is trained again
            "max_steps": max(1, round(spec.steps * args.max_steps)),
            "per_device_train_batch_size": max(1, round(spec.batch * args.per_device_train_batch_size)),
            "learning_rate": spec.rate * args.learning_rate,
            "seed": seed,
            "data_seed": seed,
            "disable_tqdm": True,
        }
        return trainer_class(SANDBOX, config_class(**values | spec.options | changes), self.rows.of(spec.data))

    def _train(self, arm: str, seed: int) -> None:
        from video_trl.experiment import held_out_win_gaps

        trainer = self.trainer(arm, seed)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        trainer.save_model()
        gaps = [] if self.arms[arm].method == "sft" else held_out_win_gaps(trainer, self.rows.held_out())
        folder = self.folder / self.unit(arm, seed)
        content = {"method": arm, "seed": seed, "folder": str(folder), "cpu_seconds": seconds, "win_gaps": gaps}
        content["rows"] = len(trainer.train_dataset)
        # Last: it says that all is there.
        write_atomically(folder / RESULT, json.dumps({**content, "log_history": trainer.state.log_history}))

    def _evaluate(self, arm: str, seed: int) -> None:
        """Generate and judge the held-out videos of what was saved."""
        from video_trl.evaluation.evaluate import sandbox_prompts

        evaluate_trained(
            self.folder / "runs" / self.unit(arm, seed),
            None if arm == BASE else self.folder / self.unit(arm, seed),
            sandbox_prompts(self.experiment.eval_prompts, seed=PROMPT_DRAW),
            seeds=range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + self.experiment.eval_seeds),
            name=arm,
            training_seed=None if arm == BASE else seed,
        )

    def measure_memory(self, arm: str) -> None:
        """Bytes that tensors take at the peak of a few steps: the weights, and what training allocates on top."""
        path = self.folder / "memory" / f"{self.unit(arm, 0)}.json"
        if path.is_file():
            return
        # In a folder of its own: a trainer empties its folder of what an earlier one has left.
        trainer = self.trainer(arm, 0, max_steps=3, output_dir=str(path.with_suffix("")))
        weights = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "weights": 2 * weights if arm == COPIED else weights,  # with the copied reference
            "training": peak_of_tensors(trainer),
            "trained": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        }
        write_atomically(path, json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1:])
