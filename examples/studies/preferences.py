# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl"]
# ///
"""
What makes preference training work, on the sandbox: three studies that share recipe, clips, evaluation and arms.

- `controls`: fine-tuning against preferences at equal videos and at equal time; how many winners, whose winners, which
  losers.
- `reg_dpo`: the stability study of Reg-DPO (https://huggingface.co/papers/2511.01450, Section 4.3).
- `phygdpo`: Tables 2b to 2d of PhyGDPO (https://huggingface.co/papers/2512.24551), and how its loss is estimated.

The recipe is that of the sandbox experiment. What an arm and training seed leaves is not made again, so that a study
can be cut and goes on, and arms that studies share, or that `make bench-sandbox` has left in the folder, are taken:

    accelerate launch examples/studies/preferences.py                                # all: make study-preferences
    accelerate launch examples/studies/preferences.py --studies reg_dpo --seeds 0    # a part of it

`preferences_report.py` writes the pages of what is there.
"""

import gc
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_trl.experiment import BASE, FOUND, JUDGED, LONGER, PHYGDPO, PLAIN, REG_DPO, ExperimentArguments
from video_trl.files import read_json, write_atomically
from video_trl.load import SANDBOX, ScriptArguments


if TYPE_CHECKING:
    from video_trl import VideoGroupDPOConfig
    from video_trl.evaluation.runs.tables import RunTable

CONFIG = Path(__file__).parents[1] / "configs" / "sandbox-gdpo.yaml"
DEFAULTS = ("--config", str(CONFIG), "--output_dir", "outputs/bench", "--seeds", "0", "1", "2")


@dataclass(frozen=True)
class Arm:
    """
    How an arm differs from PhyGDPO in the sandbox experiment.

    Attributes:
        method: "sft", "group" (PhyGDPO's trainer), or "pair" (Reg-DPO's, which is plain DPO with r = 0).
        data: kind of its rows, as in `Rows`.
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


@dataclass(frozen=True)
class Study:
    """Arms in the order of their table, and the comparisons, which were fixed before there were results."""

    page: str
    arms: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]


def regularised() -> tuple[str, ...]:
    """Arms of Reg-DPO with r > 0, fixed ones first, each kind by its strength."""
    named = [name for name in ARMS if name.startswith("r = ")]
    return (*named[:4], REG_DPO, *named[4:])


CONTROLS = tuple(itertools.takewhile(lambda name: name != "r = 25", ARMS))
ESTIMATES = tuple(itertools.dropwhile(lambda name: name != VIDEO_DPO, ARMS))
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
}  # fmt: skip
MEASURED = (JUDGED, COPIED, PLAIN)  # memory, as in PhyGDPO's Table 2d
PROMPT_DRAW, NOISE_SEED = 1, 1  # those of the sandbox experiment, on which nothing was chosen
HELD_OUT = 0.125  # as there: proportion of the groups that no arm is trained on
PASSES = 0.8  # as there: `pc` of a winner
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
        for arm in (BASE, *STUDIES[name].arms):
            if study.arms is None or arm in study.arms:
                runner.run(arm, seed)
    for arm in MEASURED if "phygdpo" in study.studies and study.arms is None else ():
        runner.measure_memory(arm)


# ---- Rows -----------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """
    Rows of every kind, all of them made of the groups of the sandbox experiment. Kinds: "found" (unjudged video rows);
    "judged" (groups of a winner and the base model's videos); "first N" of these; "wild" (the winners in another
    rendering); "twins", "wild twins" (rejected: the winner's scene with a broken law); "guided" (rejected: made with
    guidance); "own best" (chosen: the base model's own best video, if the judge passes it; rejected: its others);
    "own best, own worst" (whatever they are); "K of M" (M rejected videos were made, K are kept, the lawless first).
    """

    folder: Path
    found_clips: int
    num_rejected: int
    below: float

    def of(self, kind: str) -> Any:
        """Rows to train on."""
        from video_trl.sandbox import build_clip_dataset

        if kind == "found":
            return build_clip_dataset(self.folder / "found", num_clips=self.found_clips, found=True)
        if match := re.fullmatch(r"first (\d+)", kind):
            return self.trained().select(range(min(int(match[1]), len(self.trained()))))
        if match := re.fullmatch(r"(\d+) of (\d+)", kind):
            groups = self.trained(f"dataset-{match[2]}", num_rejected=int(match[2]))
            return [worst_first(row, int(match[1]), self.below) for row in groups]
        if kind == "guided":
            from video_trl.sandbox import load_sandbox

            return self.trained("dataset-guided", guidance_scale=load_sandbox().call_kwargs["guidance_scale"])
        if kind.startswith("own best"):
            rows = [own_best(row) for row in self.trained()]
            passed = [row for row in rows if row.pop("chosen_pc") >= PASSES]
            return passed if kind == "own best" else rows
        if kind in ("wild", "twins", "wild twins"):
            return [self._rendered(kind, index, row) for index, row in enumerate(self.trained())]
        assert kind == "judged", kind
        return self.trained()

    def groups(self, name: str = "dataset", **options: Any) -> Any:
        from video_trl.sandbox import build_group_dataset, load_sandbox

        options = {"num_rejected": self.num_rejected, **options}
        return build_group_dataset(
            load_sandbox(), self.folder / name, num_groups=self.found_clips, found=True, **options
        )

    def trained(self, name: str = "dataset", **options: Any) -> Any:
        groups = self.groups(name, **options)
        return groups.select(range(max(1, len(groups) - self._num_held_out(groups))))

    def held_out(self) -> Any:
        groups = self.groups()
        return groups.select(range(len(groups) - self._num_held_out(groups), len(groups)))

    @staticmethod
    def _num_held_out(groups: Any) -> int:
        return max(1, round(HELD_OUT * len(groups)))

    def _rendered(self, kind: str, index: int, row: dict[str, Any]) -> dict[str, Any]:
        """A group whose winner is drawn anew, or gets the same scene with a broken law as its only rejected video."""
        from video_trl.data.video_io import write_video
        from video_trl.sandbox import SandboxJudge, simulate
        from video_trl.sandbox.world.prompts import parse_prompt
        from video_trl.sandbox.world.simulate import BASE_VIOLATIONS

        seed, motion = int(row["provenance"].rsplit(" ", 1)[1]), parse_prompt(row["prompt"]).motion
        rendering = "wild" if "wild" in kind else "plain"
        made = dict(row)
        if rendering == "wild":
            path = self.folder / "wild" / f"{seed}.mp4"
            made["chosen"] = str(write_video(path, simulate(seed, motion=motion, rendering="wild").video, 8))
        if "twins" in kind:
            ways = BASE_VIOLATIONS[motion]
            twin = simulate(seed, motion=motion, violation=ways[index % len(ways)], rendering=rendering)
            (score,) = SandboxJudge().score([twin.video], [row["prompt"]])
            path = self.folder / kind.replace(" ", "-") / f"{seed}.mp4"
            made["rejected"] = [str(write_video(path, twin.video, 8))]
            made["rejected_scores"] = [{name: float(score[name]) for name in ("sa", "pc")}]
        return made


def worst_first(row: dict[str, Any], number: int, below: float) -> dict[str, Any]:
    """A group with `number` of its rejected videos, those below the bound first, as they were drawn otherwise."""
    scores = row["rejected_scores"]
    kept = sorted(range(len(scores)), key=lambda index: scores[index]["pc"] >= below)[:number]
    return {**row, **{name: [row[name][index] for index in kept] for name in ("rejected", "rejected_scores")}}


def own_best(row: dict[str, Any]) -> dict[str, Any]:
    """The best of a group's rejected videos against its worst one, by `pc`."""
    scores = [score["pc"] for score in row["rejected_scores"]]
    best, worst = scores.index(max(scores)), len(scores) - 1 - scores[::-1].index(min(scores))
    return {
        "prompt": row["prompt"],
        "chosen": row["rejected"][best],
        "rejected": [row["rejected"][worst]],
        "rejected_scores": [row["rejected_scores"][worst]],
        "chosen_pc": scores[best],
    }


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
    def rows(self) -> Rows:
        below = self.args.rejected_score_below or 1.0
        return Rows(self.folder, self.experiment.found_clips, self.data.num_rejected, below)

    def claim_folder(self) -> None:
        """
        Raises:
            ValueError: The folder holds results of another setting.
        """
        values = {**vars(self.data), **vars(self.experiment), **vars(self.args)}
        setting = json.loads(json.dumps({name: values[name] for name in SETTINGS}))
        path = self.folder / "studies.json"
        if not path.is_file():
            write_atomically(path, json.dumps(setting))
        if read_json(path) != setting:
            raise ValueError(
                f"{self.folder} was made with {read_json(path)}, expected {setting}. Pass another --output_dir."
            )

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
        from video_trl.evaluation.runs.run import RUN_FILE
        from video_trl.evaluation.runs.tables import tabulate

        folder = self.folder / "runs" / self.unit(arm, seed)
        if not (folder / RUN_FILE).is_file():
            return None
        try:
            return tabulate(folder)
        except ValueError:  # cut while it was made
            return None

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
        # Last: it says that all is there.
        write_atomically(folder / RESULT, json.dumps({**content, "log_history": trainer.state.log_history}))

    def _evaluate(self, arm: str, seed: int) -> None:
        """Generate and judge the held-out videos of what was saved, loaded the way a user will load it."""
        from video_trl.evaluation.evaluate import evaluate_pipeline, sandbox_prompts
        from video_trl.evaluation.runs.generate import load_generator
        from video_trl.load import load_judge

        weights = self.folder / self.unit(arm, seed)
        whole = (weights / "transformer").is_dir()  # all weights were trained
        generator = load_generator(SANDBOX, adapter=None if arm == BASE or whole else str(weights), device="cpu")
        if whole:
            transformer = generator.pipeline.transformer
            generator.pipeline.transformer = type(transformer).from_pretrained(weights / "transformer").eval()
            generator = replace(generator, model=f"sandbox with {weights}", revision=None)  # None: hash what is there
        evaluate_pipeline(
            self.folder / "runs" / self.unit(arm, seed),
            generator,
            load_judge(SANDBOX),
            sandbox_prompts(self.experiment.eval_prompts, seed=PROMPT_DRAW),
            seeds=range(NOISE_SEED, NOISE_SEED + self.experiment.eval_seeds),
            name=arm,
            training_seed=None if arm == BASE else seed,
        )

    def measure_memory(self, arm: str) -> None:
        """Bytes that tensors take at the peak of a few steps: the weights, and what training allocates on top."""
        from torch.profiler import ProfilerActivity, profile

        path = self.folder / "memory" / f"{self.unit(arm, 0)}.json"
        if path.is_file():
            return
        # In a folder of its own: a trainer empties its folder of what an earlier one has left.
        trainer = self.trainer(arm, 0, max_steps=3, output_dir=str(path.with_suffix("")))
        weights = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
        gc.collect()  # what is freed later must not count as freed by training
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train()
        path.parent.mkdir(parents=True, exist_ok=True)
        trace = path.with_suffix(".trace")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
        trace.unlink()
        events.sort(key=lambda event: event["ts"])
        content = {
            "weights": 2 * weights if arm == COPIED else weights,  # with the copied reference
            "training": max(itertools.accumulate(event["args"]["Bytes"] for event in events)),
            "trained": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        }
        write_atomically(path, json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1:])
