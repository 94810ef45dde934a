"""The rules of the testbed, and its units: a method in a regime with a training seed each, whole or absent."""

import dataclasses
import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiment import BASE, evaluate_trained, peak_of_tensors, stored_table
from ..files import fingerprint, read_json, write_atomically
from ..load import SANDBOX
from ..methods import Method


if TYPE_CHECKING:
    from ..evaluation.runs.tables import RunTable
    from ..sandbox.data.regimes import SandboxRows

SEEDS = (0, 1, 2)
SFT = "SFT"
# Regime -> kind of rows, as in `SandboxRows`, and what a method is asked there.
REGIMES = {
    "clean": ("judged", "clips that the judge passed, against the base model's own videos"),
    "few": ("first 16", "the first sixteen of them"),
    "wild": ("wild", "the same clips in a rendering that the base model has never seen"),
    "found": ("found groups", "clips as a crawl would find them, unjudged, 57 % of them unlawful"),
    "own": ("own best", "no real clip: the base model's best video against its worst"),
}
_UNIT, _ENTRY, _GAME = "unit.json", "entry.json", "game.json"
_GAP_NOISES = 2  # of each held-out row
_TIMED_STEPS, _UNTIMED_STEPS = 10, 3  # of a training whose time is taken; the first ones are slower
_CONTROL = re.compile(r"sft(-[0-9.]+-x-updates)?")  # slugs of fine-tuning
_NOT_ENTRIES = ("", "data", "encoded", "runs")  # slugs of no entry: what the folder holds beside entries
_ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Game:
    """
    The rules in numbers. Results of other rules are not compared.

    Attributes:
        version (`int`): Raised when the same numbers mean something else.
        found_clips (`int`): Clips of the pool as found.
        num_rejected (`int`): The base model's videos of a judged clip.
        updates (`int`): Optimizer steps of a training.
        rows (`int`): Rows of each.
        lora_rank (`int`): Of the adapter on all linear layers.
        sentences (`int`): Held-out sentences of the evaluation, one video each.
        prompt_draw (`int`): Which sentences; nothing was ever chosen on them.
        noise_seed (`int`): Their noise.
    """

    version: int = 1
    found_clips: int = 320
    num_rejected: int = 3
    updates: int = 150
    rows: int = 4
    lora_rank: int = 48
    sentences: int = 60
    prompt_draw: int = 2
    noise_seed: int = 1

    def fixed(self) -> dict[str, Any]:
        """Options of a trainer's configuration that no method may change."""
        return {
            "max_steps": self.updates,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": 1,
            "use_peft": True,
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_rank,
            "lora_target_modules": "all-linear",
            "use_cpu": True,
            "bf16": False,
            "fps": 8,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": max(1, self.updates // 10),
            "disable_tqdm": True,
        }


GAME = Game()
TRIAL = Game(found_clips=40, num_rejected=3, updates=4, rows=2, lora_rank=4, sentences=10)
# Where a configuration has these fields and the method's options do not name them: the sandbox experiment's recipe.
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "timestep_range": [850, 1000],
    "rejected_score_below": 0.4,
    "sft_weight": 500.0,
    "sft_weight_mode": "fixed",
    "sft_coefficient": 500.0,
}


@dataclass(frozen=True)
class Entry:
    """
    A method in the testbed.

    Attributes:
        name (`str`): In tables.
        method (`Method`): Where its trainer is.
        options (`dict`): Its own options, over the recipe's.
        updates (`float`): Factor of the game's updates; only fine-tuning in the time of another method has one.
    """

    name: str
    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    updates: float = 1.0

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    def describe(self) -> dict[str, Any]:
        """What makes it this entry and no other, a hash of a foreign method's module with it; goes into JSON."""
        found = {"name": self.name, "path": self.method.path, "options": dict(self.options), "updates": self.updates}
        module = self.method.path.partition(":")[0]
        if module.partition(".")[0] != __name__.partition(".")[0]:
            spec = find_spec(module)
            found |= {} if spec is None or spec.origin is None else {"code": fingerprint(Path(spec.origin))}
        return found


def sft_entry(updates: float = 1.0) -> Entry:
    """Fine-tuning on the same clips, for so many times the updates of the game."""
    name = SFT if updates == 1 else f"{SFT}, {updates:g} x updates"
    return Entry(name, Method("sft", "video_trl.trainer.sft_trainer:VideoSFTTrainer"), updates=updates)


@dataclass
class Testbed:
    """
    The units of a folder: an entry in a regime with a training seed each, whole or absent.

    Args:
        folder (`Path`): Data, adapters, videos and results.
        game ([`Game`]): The rules.
        seeds (`Sequence[int]`): Training seeds.
        regimes (`Sequence[str]`): Some of `REGIMES`.

    Raises:
        ValueError: If the folder holds results of other rules, or there is no such regime.
    """

    folder: Path
    game: Game = GAME
    seeds: Sequence[int] = SEEDS
    regimes: Sequence[str] = tuple(REGIMES)
    _clips: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.seeds or not self.regimes or not set(self.regimes) <= set(REGIMES):
            raise ValueError(
                f"Expected one or more regimes among {', '.join(REGIMES)} and training seeds, got "
                f"{list(self.regimes)} and {list(self.seeds)}."
            )
        path = self.folder / _GAME
        if not path.is_file():
            write_atomically(path, json.dumps(asdict(self.game)))
        if read_json(path) != asdict(self.game):
            raise ValueError(f"{self.folder} was made by the rules {read_json(path)}, expected {asdict(self.game)}.")

    @cached_property
    def rows(self) -> "SandboxRows":
        from ..sandbox.data.regimes import SandboxRows

        return SandboxRows(self.folder / "data", self.game.found_clips, self.game.num_rejected, below=0.4)

    def clips(self, regime: str) -> Any:
        """Rows of a regime, the same in every unit."""
        if regime not in self._clips:
            self._clips[regime] = self.rows.of(REGIMES[regime][0])
        return self._clips[regime]

    @cached_property
    def sentences(self) -> Any:
        from ..evaluation.evaluate import sandbox_prompts

        return sandbox_prompts(self.game.sentences, seed=self.game.prompt_draw)

    # ---- Entries ----

    def enter(self, entry: Entry) -> None:
        """
        Take an entry, before anything is trained.

        Raises:
            ValueError: If its trainer cannot be used, an option does not exist or is fixed, or the folder holds
                another entry of its name.
        """
        self.config(entry, 0, "unused")
        if _CONTROL.fullmatch(entry.slug) and entry.describe() != sft_entry(entry.updates).describe():
            raise ValueError(f"{entry.name!r} is the name of fine-tuning, which every method meets. Pass --name.")
        if entry.slug in _NOT_ENTRIES:
            raise ValueError(
                f"{entry.name!r} makes no folder of its own beside {', '.join(_NOT_ENTRIES[1:])}. Pass --name."
            )
        path = self.folder / entry.slug / _ENTRY
        described = json.loads(json.dumps(entry.describe()))
        if path.is_file() and read_json(path) != described:
            raise ValueError(
                f"{path.parent} holds the entry {read_json(path)}, expected {described} (`code` is a hash of the "
                "method's module). Pass --name, or delete the folder."
            )
        if not path.is_file():
            write_atomically(path, json.dumps(described))

    def config(self, entry: Entry, seed: int, output_dir: str, **changes: Any) -> Any:
        """The configuration of an entry's trainer."""
        config_class: Any = entry.method.load().config_class
        known = {item.name for item in dataclasses.fields(config_class) if item.init}
        fixed = self.game.fixed() | {
            "seed": seed,
            "data_seed": seed,
            "output_dir": output_dir,
            "cache_dir": str(self.folder / "encoded"),
        }
        if named := set(entry.options) & set(fixed):
            raise ValueError(
                f"{', '.join(sorted(named))}: fixed by the game, the same for all methods. Leave them out."
            )
        if unknown := set(entry.options) - known:
            raise ValueError(f"{config_class.__name__} has no option {', '.join(sorted(unknown))}.")
        recipe = {name: value for name, value in RECIPE.items() if name in known}
        fixed["max_steps"] = max(1, round(entry.updates * self.game.updates))
        return config_class(**recipe | dict(entry.options) | fixed | {"overwrite_output_dir": True} | changes)

    def trainer(self, entry: Entry, regime: str, seed: int, output_dir: str, **changes: Any) -> Any:
        """The trainer of a unit, with changes of its configuration."""
        from transformers import PrinterCallback

        from ..trainer.publishing.progress import ClosingLine

        args = self.config(entry, seed, output_dir, **changes)
        trainer = entry.method.load()(SANDBOX, args, self.clips(regime))
        for printed in (PrinterCallback, ClosingLine):  # a line after each unit says how far it is
            trainer.remove_callback(printed)
        return trainer

    # ---- Units ----

    def units(self) -> Iterator[tuple[str, int]]:
        yield from itertools.product(self.regimes, self.seeds)

    def run(self, entry: Entry) -> Iterator[str]:
        """Train and evaluate the units of an entry that are not whole; a line after each."""
        self.table(None)
        units = list(self.units())
        for number, (regime, seed) in enumerate(units, start=1):
            if self.unit(entry, regime, seed) is None:
                self._train(entry, regime, seed)
            pc = self.table((entry, regime, seed)).means["all"]["pc"]
            yield f"[{number}/{len(units)}] {entry.name}, {regime}, seed {seed}: pc {pc:.3f}"

    def _place(self, entry: Entry, regime: str, seed: int) -> Path:
        return self.folder / entry.slug / f"{regime}-seed{seed}"

    def unit(self, entry: Entry, regime: str, seed: int) -> dict[str, Any] | None:
        """What was measured in training, if the unit was trained to its end."""
        path = self._place(entry, regime, seed) / _UNIT
        return read_json(path) if path.is_file() else None

    def _train(self, entry: Entry, regime: str, seed: int) -> None:
        from ..evaluation.runs.run import make_room

        folder = self._place(entry, regime, seed)
        make_room(self._run_dir(folder))  # of an earlier training
        trainer = self.trainer(entry, regime, seed, str(folder))
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        trainer.save_model()
        if not (folder / _ADAPTER).is_file():
            raise ValueError(f"{type(trainer).__name__}.save_model left no {_ADAPTER} in {folder}; it is evaluated.")
        rows = self.rows.held_out(wild=regime == "wild")
        gaps = held_out_gaps(folder, rows, cache_dir=str(self.folder / "encoded"))
        content = {
            "regime": regime,
            "seed": seed,
            "updates": trainer.state.global_step,
            "rows": len(trainer.train_dataset),
            "cpu_seconds": round(seconds, 1),
            "weights": fingerprint(folder / _ADAPTER),
            **gaps,
        }
        write_atomically(folder / _UNIT, json.dumps(content))  # last: it says that all is there

    def table(self, unit: tuple[Entry, str, int] | None) -> "RunTable":
        """Scores of a unit, or of the base model (`None`); made where they are not there."""
        name, seed, weights = BASE, None, None
        if unit is not None:
            (entry, _, seed), weights = unit, self._place(*unit)
            name = entry.name
        run_dir = self._run_dir(weights)
        return stored_table(run_dir) or evaluate_trained(
            run_dir,
            weights,
            self.sentences,
            seeds=(self.game.noise_seed,),
            name=name,
            training_seed=seed,
        )

    def _run_dir(self, weights: Path | None) -> Path:
        return self.folder / "runs" / (BASE if weights is None else f"{weights.parent.name}-{weights.name}")

    # ---- Cost ----

    def cost(self, entry: Entry) -> dict[str, float]:
        """
        Time of an update in updates of fine-tuning, to the half, and bytes of tensors at the peak; measured once, and
        kept. The time is taken of one and the other in turn, because machines are not equally fast at all times.
        """
        path = self.folder / entry.slug / "cost.json"
        if not path.is_file():
            seconds: dict[str, list[float]] = {entry.name: [], SFT: []}
            for _, other in itertools.product(range(2), (entry, sft_entry())):
                seconds[other.name] += self._seconds_of_updates(other)
            ratio = statistics.median(seconds[entry.name]) / statistics.median(seconds[SFT])
            with tempfile.TemporaryDirectory() as folder:
                memory = peak_of_tensors(self.trainer(entry, self.regimes[0], 0, folder, max_steps=2))
            write_atomically(path, json.dumps({"time": max(1.0, round(2 * ratio) / 2), "memory": memory}))
        cost: dict[str, float] = read_json(path)
        return cost

    def set_time(self, entry: Entry, ratio: float) -> None:
        """Take the time of an update from other results instead of measuring it."""
        path = self.folder / entry.slug / "cost.json"
        if not path.is_file():
            write_atomically(path, json.dumps({"time": ratio, "memory": 0}))

    def _seconds_of_updates(self, entry: Entry) -> list[float]:
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            """Processor time at the end of every update."""

            def __init__(self) -> None:
                self.ends: list[float] = []

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.ends.append(time.process_time())

        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(entry, self.regimes[0], 0, folder, max_steps=_UNTIMED_STEPS + _TIMED_STEPS)
            trainer.add_callback(clock)
            trainer.train()
        ends = clock.ends[_UNTIMED_STEPS - 1 :]
        return [after - before for before, after in itertools.pairwise(ends)]


def held_out_gaps(folder: str | Path, rows: Any, *, cache_dir: str) -> dict[str, list[float]]:
    """
    Of each held-out row: error of what was trained minus that of the base model, on its chosen and on a rejected
    video, a mean over noises. It is the same for every method, whatever it logs.

    Args:
        folder (path): Where a trainer saved its adapter.
        rows (dataset): Group rows that nothing was trained on.
        cache_dir (`str`): Where they are kept, encoded.

    Returns:
        `dict`: `win_gap` and `lose_gap`, one value a row; below 0 is better than the base model.
    """
    import torch

    from ..evaluation.runs.generate import load_generator
    from ..trainer.dpo_config import VideoDPOConfig
    from ..trainer.dpo_trainer import VideoDPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        # A reward of -gap / 2 with beta 1, over the model without its adapter; nothing is trained.
        args = VideoDPOConfig(
            scratch, use_cpu=True, bf16=False, beta=1.0, fps=8, timestep_range=RECIPE["timestep_range"],
            per_device_eval_batch_size=8, report_to="none", disable_tqdm=True, cache_dir=cache_dir,
            reference_is_base=True,
        )  # fmt: skip
        policy = load_generator(SANDBOX, adapter=str(folder), device="cpu").pipeline
        judge: Any = VideoDPOTrainer(policy, args, eval_dataset=rows)
        judge.model.eval()
        values: dict[str, list[torch.Tensor]] = {"chosen_rewards": [], "rejected_rewards": []}
        for noise in range(_GAP_NOISES):
            judge.step.seed = noise
            outputs = []
            with torch.no_grad():
                for batch in judge.get_eval_dataloader():
                    outputs.append(judge.compute_loss(judge.model, batch, return_outputs=True)[1])
            for name, found in values.items():
                found.append(torch.cat([output[name] for output in outputs]))
    gaps = {name: (-2 * torch.stack(found).mean(dim=0)).tolist() for name, found in values.items()}
    return {"win_gap": gaps["chosen_rewards"], "lose_gap": gaps["rejected_rewards"]}


@contextmanager
def one_thread() -> Iterator[None]:
    """The order of sums, and with it the last bits, depends on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
