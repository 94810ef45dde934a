"""
The runs of `golden_runs.py`, made in processes of their own: what a checkout's package trains, logs and saves.

Only names that the package promises to keep are used, because it may be of any layout.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from datasets import load_from_disk
from peft import LoraConfig
from safetensors import safe_open
from transformers import TrainerCallback

import video_trl
from video_trl.sandbox import build_clip_dataset, build_group_dataset, load_sandbox


STEPS, RESUME_AT = 5, 2  # three steps an epoch, the last of them a row short: resumed inside one, over its end
# Values that no two runs share: recorded is only that they are there.
_VARYING = re.compile(r".*runtime|.*_per_second|share_outside_steps|peak_memory_gib|minutes_left|seconds|joules")
VARIES = "varies from run to run"

# Weights move visibly, and every step is logged and evaluated on two rows.
SETTINGS: dict[str, Any] = {
    "output_dir": "run",  # relative, as every path that is handed over: both checkouts are told the same
    "cache_dir": "../../cache",
    "use_cpu": True,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3,
    "lora_rank": 4,
    "lora_alpha": 8,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": RESUME_AT,
    "report_to": "none",
    "disable_tqdm": True,
    "fps": 8,
}
_FULL = {"use_peft": False, "learning_rate": 1e-4}
_SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


CLASSES: dict[str, tuple[Any, Any]] = {
    "SFT": (video_trl.VideoSFTTrainer, video_trl.VideoSFTConfig),
    "REPA": (video_trl.VideoREPATrainer, video_trl.VideoREPAConfig),
    "DPO": (video_trl.VideoDPOTrainer, video_trl.VideoDPOConfig),
    "RegDPO": (video_trl.VideoRegDPOTrainer, video_trl.VideoRegDPOConfig),
    "GroupDPO": (video_trl.VideoGroupDPOTrainer, video_trl.VideoGroupDPOConfig),
}


@dataclass(frozen=True)
class Case:
    """
    One run, to be made twice.

    Attributes:
        method: of the trainer, as in its class's name.
        settings: what differs from `SETTINGS`.
        reference: "base": what the trainer chooses; "module": another transformer is handed over as `ref_model`;
            "adapter": the policy starts from an adapter, a frozen copy of which is the reference.
        two_sizes: whether the videos are of two sizes.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "base"
    two_sizes: bool = False


def cases(processes: int) -> dict[str, Case]:
    """The runs that are made by this number of processes, by name."""
    if processes > 1:
        return {
            "group_dpo-processes-concat": Case("GroupDPO", {"step_mode": "concat", **_SPLIT}),
            "group_dpo-processes-sequential": Case("GroupDPO", {"step_mode": "sequential", **_SPLIT}),
            "group_dpo-processes-full": Case("GroupDPO", _FULL),
            "group_dpo-processes-precomputed": Case("GroupDPO", {"precompute_ref_errors": 2}),
            "group_dpo-processes-group_parallel": Case("GroupDPO", {"group_parallel_size": 2}),
            "sft-processes-context_parallel": Case("SFT", {"context_parallel_size": 2}),
            "repa-processes": Case("REPA"),
        }
    found = {}
    for weights, settings in (("lora", {}), ("full", _FULL)):
        for method, name in (("SFT", "sft"), ("REPA", "repa")):
            found[f"{name}-{weights}"] = Case(method, settings)
        for method, name in (("DPO", "dpo"), ("RegDPO", "reg_dpo"), ("GroupDPO", "group_dpo")):
            for mode in ("concat", "sequential"):
                found[f"{name}-{mode}-{weights}"] = Case(method, {"step_mode": mode, **settings})
    other_noise = {"activation_checkpointing": True, "timestep_sampling": "logit_normal"}
    return found | {
        "sft-accumulated": Case("SFT", {**other_noise, **_SPLIT}),
        "sft-two_sizes": Case("SFT", {"timestep_sampling": "shifted"}, two_sizes=True),
        "repa-pixels": Case("REPA", {"precompute_teacher": False, "alignment_loss": "repa"}),
        "dpo-accumulated": Case("DPO", {"step_mode": "sequential", "shared_noise": False, **_SPLIT}),
        "reg_dpo-fixed": Case("RegDPO", {"sft_weight_mode": "fixed"}),
        "group_dpo-sum": Case("GroupDPO", {"loss_type": "sum", "step_mode": "sequential"}),
        "group_dpo-plackett_luce": Case("GroupDPO", {"loss_type": "plackett_luce"}),
        "group_dpo-precomputed": Case("GroupDPO", {"precompute_ref_errors": 2}),
        "group_dpo-ref_model": Case("GroupDPO", reference="module"),
        "group_dpo-continued": Case("GroupDPO", reference="adapter"),
    }


class Shown(TrainerCallback):
    """Keeps every log as trackers and progress bars see it."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})


class Runs:
    """
    Makes the runs in this process, or in each of those that `torchrun` has started.

    Args:
        checkout: the package must come from there.
        out_dir: gets the datasets, and the runs while they are made.
        data: has the datasets to train on; `out_dir`, or one of another checkout.
    """

    def __init__(self, checkout: Path, out_dir: Path, data: Path) -> None:
        if not Path(video_trl.__file__).is_relative_to(checkout):
            raise SystemExit(f"Expected video_trl of {checkout}, got {video_trl.__file__}.")
        self.out_dir, self.data = out_dir, data
        self.rank, self.processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.read = Reader({checkout: "<checkout>", out_dir: "<out>", data: "<out>"})

    def make(self) -> dict[str, Any]:
        """The records of all cases; those of a single process come first, with the datasets and the cache."""
        made: dict[str, Any] = {}
        if self.processes == 1:
            groups = build_group_dataset(load_sandbox(), self.out_dir / "groups", num_groups=7, num_rejected=2)
            clips = build_clip_dataset(self.out_dir / "clips", num_clips=7)
            clips.save_to_disk(self.out_dir / "clips" / "table")
            made["data"] = {
                "groups": self.read.value(list(groups)),
                "clips": self.read.value(list(clips)),
                "clip files": {
                    path.name: self.read.file(path) for path in sorted((self.out_dir / "clips").glob("*.mp4"))
                },
            }
        for name, case in cases(self.processes).items():
            sys.stderr.write(f"==== {name}\n")
            made[name] = self._twice(self.out_dir / name, case)
        if self.processes == 1:
            made["cache"] = self.read.folder(self.out_dir / "cache")
        return made

    def _twice(self, folder: Path, case: Case) -> dict[str, Any]:
        """Train without a pause; then again, from the checkpoint of the step `RESUME_AT`."""
        checkpoint = Path("run", f"checkpoint-{RESUME_AT}")
        made = {"whole": self._run(folder / "whole", case, resume=False)}
        if self.rank == 0:
            made["checkpoint"] = self.read.folder(folder / "whole" / checkpoint)
            shutil.copytree(folder / "whole" / checkpoint, folder / "resumed" / checkpoint)
            shutil.rmtree(folder / "whole")  # weights and optimizer states are large
        self._wait()
        made["resumed"] = self._run(folder / "resumed", case, resume=True)
        os.chdir(self.out_dir)
        if self.rank == 0:
            shutil.rmtree(folder)
        self._wait()
        return made

    def _run(self, folder: Path, case: Case, *, resume: bool) -> dict[str, Any]:
        """Metrics and files of a run in a folder; nothing in all processes but the first."""
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        shown = Shown()
        trainer = self._trainer(case, shown)
        result = trainer.train(resume_from_checkpoint=resume or None)
        logs = list(shown.logs)
        evaluation = trainer.evaluate()
        trainer.save_model()
        self._wait()
        if self.rank:
            return {}
        metrics = {
            "log": _by_step(trainer.state.log_history),
            "shown": _by_step([log for log in logs if log["step"] > RESUME_AT]),
            "result": {"global_step": result.global_step, "training_loss": result.training_loss, **result.metrics},
            "evaluation": evaluation,
        }
        files = self.read.folder(Path("run"))
        early = f"checkpoint-{RESUME_AT}/"
        kept = {name: content for name, content in files.items() if not name.startswith(early)}
        return {**self.read.value(metrics), "files": kept}

    def _trainer(self, case: Case, shown: Shown) -> Any:
        trainer_class, config_class = CLASSES[case.method]
        args = config_class(**(SETTINGS | dict(case.settings)))
        train, held_out = self._rows(case)
        pipeline, ref_model = _models(case.reference)
        return trainer_class(pipeline, args, train, held_out, ref_model=ref_model, callbacks=[shown])

    def _rows(self, case: Case) -> tuple[Any, Any]:
        """Five rows to train on and two to evaluate on."""
        if case.two_sizes:
            rows = _clips_of_two_sizes()
            return rows[:5], rows[5:]
        folder = "clips" if case.method in ("SFT", "REPA") else "groups"
        rows = load_from_disk(self.data / folder / "table")
        return rows.select(range(5)), rows.select(range(5, 7))

    def _wait(self) -> None:
        if self.processes > 1:
            torch.distributed.barrier()


def _models(reference: str) -> tuple[Any, Any]:
    """`model` and `ref_model` of a trainer. References are not what the base model is, so that no mix-up passes."""
    if reference == "base":
        return "sandbox", None
    pipeline = load_sandbox().pipeline
    generator = torch.Generator().manual_seed(1)
    if reference == "adapter":
        pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, weight in pipeline.transformer.named_parameters():
            if reference == "module" or ".lora_" in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    return ("sandbox", pipeline) if reference == "module" else (pipeline, None)


def _clips_of_two_sizes() -> list[dict[str, Any]]:
    """Seven videos of noise, uint8 `(13, H, W, 3)`, wide and square in turn."""
    draw = np.random.default_rng(0)
    return [
        {
            "prompt": f"A red ball, {row}.",
            "video": draw.integers(256, size=(13, 64, 96 - 32 * (row % 2), 3), dtype="u1"),
        }
        for row in range(7)
    ]


def _by_step(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Logs by their step, so that a missing one does not move those behind it."""
    found: dict[str, Any] = {"entries": len(logs)}
    for entry in logs:
        found.setdefault(f"step {entry['step']}", {}).update(entry)
    return found


class Reader:
    """
    Brings values and files into a form that JSON can hold and `==` can compare.

    Args:
        places: folders, and what stands for them and the paths in them.
    """

    def __init__(self, places: Mapping[Path, str]) -> None:
        self._places = [(re.compile(rf"{re.escape(str(place))}[\w./-]*"), name) for place, name in places.items()]

    def value(self, value: Any) -> Any:
        """Floats become hexadecimal, tensors and bytes hashes; what varies from run to run becomes `VARIES`."""
        if isinstance(value, dict):
            return {str(key): VARIES if _VARYING.fullmatch(str(key)) else self.value(value[key]) for key in value}
        if isinstance(value, list | tuple):
            if len(value) > 100:  # the state of a generator
                return _hash(json.dumps(value).encode())
            return [self.value(item) for item in value]
        if isinstance(value, torch.Tensor):
            content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            size = f" norm={value.double().norm():.9g}" if value.is_floating_point() else ""
            return f"{value.dtype} {list(value.shape)}{size} {_hash(content)}"
        if isinstance(value, np.ndarray):
            return f"{value.dtype} {list(value.shape)} {_hash(value.tobytes())}"
        if isinstance(value, bytes):
            return _hash(value)
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, str):
            for pattern, name in self._places:
                value = pattern.sub(name, value)
            return value
        if value is None or isinstance(value, bool | int):
            return value
        raise TypeError(f"Expected something to compare, got {type(value).__name__}: {value!r}.")

    def folder(self, folder: Path) -> dict[str, Any]:
        """Every file below a folder, by its path."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): self.file(path) for path in files}

    def file(self, path: Path) -> Any:
        """Tensors one by one with the file's metadata, JSON by value, model cards as text, others as a hash."""
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                tensors = {name: self.value(opened.get_tensor(name)) for name in sorted(opened.keys())}
                return {"metadata": self.value(opened.metadata()), **tensors}
        if path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(_numpy_state_classes()):
                return self.value(torch.load(path, weights_only=True))
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            if "log_history" in content:
                content["log_history"] = _by_step(content["log_history"])
            return self.value(content)
        if path.suffix == ".md":
            return self.value(_sections(path.read_text()))
        return _hash(path.read_bytes())


def _hash(content: bytes) -> str:
    return f"sha256={hashlib.sha256(content).hexdigest()}"


def _numpy_state_classes() -> list[Any]:
    """What the state of numpy's generator is made of, in the files of `transformers.Trainer`."""
    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def _sections(card: str) -> dict[str, str]:
    """The parts of a model card by their headings; of the tables of time and versions only the first columns."""
    parts = re.split(r"(?m)^(## .*|Log:)\n", f"Start\n{card}")
    headings, texts = ["Start", *parts[1::2]], [parts[0].removeprefix("Start\n"), *parts[2::2]]
    found = dict(zip(headings, texts, strict=True))
    for heading in ("## Resources", "## Versions"):
        if heading in found:
            found[heading] = re.sub(r"(?m)^(\| [^|]* \|).*", r"\1", found[heading])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("name", help="of the file that gets the record")
    arguments = parser.parse_args()
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo this number, which is 0 on CPUs
    runs = Runs(arguments.checkout, arguments.out_dir, arguments.data)
    made = runs.make()
    if runs.rank == 0:
        (arguments.out_dir / arguments.name).write_text(json.dumps(made))
    if runs.processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
