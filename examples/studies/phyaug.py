# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
What each part of PhyAugPipe is worth (PhyGDPO, https://huggingface.co/papers/2512.24551, Table 2a), on the sandbox.

Four ways to choose the same number of training groups from one pool: at random, after the filter, evenly over action
categories, and by their difficulty. Each is trained with each seed, and evaluated on held-out sentences:

    accelerate launch examples/studies/phyaug.py
    accelerate launch examples/studies/phyaug.py --report docs/benchmarks/phyaug.md

What is in `output_dir` is not made again, so a study that was stopped goes on where it was.
"""

import json
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_trl.files import write_atomically


if TYPE_CHECKING:
    import pyarrow as pa

    from video_trl.sandbox import Sandbox


BASE = "base"
ARMS = {  # name here -> name in the paper's Table 2a
    "random": "baseline (random selection)",
    "filter": "+ chain of thought",
    "cluster": "+ action clustering",
    "physics": "+ physics rewarding",
}
PROMPT_DRAW = 1  # of the held-out sentences; draw 0 chose the configuration of the training
NUM_HARD = 3  # categories that the base model does worst, by its representatives
MARKS = ("<!-- results of examples/studies/phyaug.py -->", "<!-- end of results -->")


@dataclass
class StudyArguments:
    """Size of the study; how each arm is trained stands in `train`: as in the paper, without a regulariser."""

    output_dir: str = field(default="outputs/study-phyaug", metadata={"help": "Everything the study makes."})
    arms: list[str] = field(default_factory=lambda: [BASE, *ARMS], metadata={"help": "Arms to run."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of selection and training."})
    pool_clips: int = field(default=2400, metadata={"help": "Clips in the pool."})
    num_groups: int = field(default=96, metadata={"help": "Training groups of every arm."})
    num_rejected: int = field(default=2, metadata={"help": "Rejected videos of each group."})
    representatives: int = field(default=12, metadata={"help": "Representatives of each category."})
    max_steps: int = field(default=100, metadata={"help": "Training steps."})
    batch_size: int = field(default=8, metadata={"help": "Groups of a step."})
    eval_prompts: int = field(default=84, metadata={"help": "Held-out sentences."})
    eval_seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Noises of each sentence."})
    report: str | None = field(default=None, metadata={"help": "Page to write the results into, instead of running."})

    def setting(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("output_dir", "arms", "report")}


def main(argv: list[str]) -> None:
    from trl import TrlParser

    (args,) = TrlParser((StudyArguments,)).parse_args_and_config(args=argv)
    unknown = [arm for arm in args.arms if arm not in (BASE, *ARMS)]
    if unknown:
        raise ValueError(f"Expected arms of {[BASE, *ARMS]}, got {unknown}.")
    if args.report is not None:
        write_report(Path(args.report), args)
        return
    run_study(args)


def run_study(args: StudyArguments) -> None:
    from video_trl.sandbox import load_sandbox

    sandbox = load_sandbox()
    write_result(args, "setting", args.setting())
    if BASE in args.arms and not result_path(args, BASE).is_file():
        write_result(args, BASE, {"scores": judged(sandbox, args, "base")})
    cells = [(arm, seed) for arm in ARMS for seed in args.seeds if arm in args.arms]
    if all(result_path(args, arm, seed).is_file() for arm, seed in cells):
        return
    selections = select(args, sandbox)
    for seed in args.seeds:  # a study that is stopped has whole seeds
        for arm in (arm for arm in ARMS if arm in args.arms):
            if not result_path(args, arm, seed).is_file():
                name = f"{arm}-seed{seed}"
                print(f"{name}: {len(selections[arm, seed])} groups", flush=True)
                log = train(args, name, seed, selections[arm, seed])
                sandbox.pipeline.load_lora_weights(
                    Path(args.output_dir) / name, weight_name="pytorch_lora_weights.safetensors"
                )
                scores = judged(sandbox, args, name)
                sandbox.pipeline.unload_lora_weights()
                counts = Counter(row["category"] for row in selections[arm, seed])
                write_result(args, arm, {"scores": scores, "log": log, "categories": dict(counts)}, seed)


def select(args: StudyArguments, sandbox: "Sandbox") -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The groups of every arm and seed, encoded. Clips that several of them choose have the same rejected videos."""
    from video_trl.curation.engine.manifest import Shard, kept_rows
    from video_trl.curation.phyaug.pipeline import (
        PhyAugConfig,
        Runner,
        annotate,
        cluster,
        generate,
        read_actions,
        read_pool,
        try_representatives,
    )
    from video_trl.sandbox.data.clip_pool import make_pool

    root = Path(args.output_dir).absolute()
    config = PhyAugConfig(
        output_dir=str(root),
        annotator="sandbox",
        actions="sandbox",
        embedder="sandbox",
        representatives=args.representatives,
        model="sandbox",
        model_options={"dtype": "float32", "batch_size": 16, "call_kwargs": {"guidance_scale": 1.0}},
        seeds=list(range(args.num_rejected)),
        height=64,
        width=64,
        fps=8.0,
        num_frames=13,
        judge="sandbox",
        batch_size=32,
    )
    run = Runner(config, root, Shard())
    pool = read_pool(config, [make_pool(root / "pool", num_clips=args.pool_clips)], root, run)
    rich = cluster(annotate(pool, config, run), config, read_actions("sandbox"), run)
    tried = kept_rows(try_representatives(rich, config, root, run)).to_pydict()
    scores: dict[str, list[float]] = {}
    for category, sa, pc in zip(tried["category"], tried["sa"], tried["pc"], strict=True):
        scores.setdefault(category, []).append((sa + pc) / 2)
    means = {category: sum(values) / len(values) for category, values in scores.items()}
    write_result(args, "difficulty", means)
    contents_of = {
        (arm, seed): choose(arm, seed, pool, rich, means, args.num_groups) for arm in ARMS for seed in args.seeds
    }
    all_contents = set().union(*contents_of.values())
    selection = pool.filter([content in all_contents for content in pool["content"].to_pylist()])
    clips, rejected = generate(kept_rows(selection), config, root, run)
    rows = group_rows(clips, rejected, root)
    missing = [content for content in all_contents if content not in rows]
    assert not missing, f"{len(missing)} chosen clips have no rejected videos"
    rows_encoded = encoded(args, sandbox, [rows[content] for content in sorted(all_contents)])
    of_content = dict(zip(sorted(all_contents), rows_encoded, strict=True))
    return {key: [of_content[content] for content in sorted(contents)] for key, contents in contents_of.items()}


def encoded(args: StudyArguments, sandbox: "Sandbox", rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All groups of the study as the trainer takes them, each encoded once."""
    from video_trl.data import encode_dataset
    from video_trl.models import family_for

    dataset = encode_dataset(
        rows,
        sandbox.pipeline,
        family_for(sandbox.pipeline.transformer),
        "group",
        cache_dir=Path(args.output_dir) / "encoded",
        max_sequence_length=sandbox.call_kwargs["max_sequence_length"],
        device="cpu",
    )
    return [dataset[index] | {"category": row["category"]} for index, row in enumerate(rows)]


def choose(arm: str, seed: int, pool: "pa.Table", rich: "pa.Table", scores: dict[str, float], number: int) -> set[str]:
    """Contents of the clips that an arm trains on."""
    from video_trl.curation.engine.manifest import kept_rows
    from video_trl.curation.phyaug.sampling import allocate, draw

    if arm in ("random", "filter"):
        contents = sorted(kept_rows(pool if arm == "random" else rich)["content"].to_pylist())
        return set(random.Random(seed).sample(contents, number))
    members: dict[str, list[str]] = {}
    survivors = kept_rows(rich).select(["content", "category"]).to_pydict()
    for content, category in zip(survivors["content"], survivors["category"], strict=True):
        members.setdefault(category, []).append(content)
    counts = {category: len(members[category]) for category in sorted(members)}
    tau = 0.0 if arm == "cluster" else 3.0
    # Every arm gets the same number of groups: what small categories leave over goes to the others.
    quotas = allocate(counts, scores, tau=tau, budget=number, redistribute=True)
    return {content for category in members for content in draw(members[category], quotas[category], seed)}


def group_rows(clips: "pa.Table", rejected: "pa.Table", root: Path) -> dict[str, dict[str, Any]]:
    from video_trl.curation.engine.manifest import kept_rows
    from video_trl.sandbox.world.prompts import parse_prompt

    rows: dict[str, dict[str, Any]] = {}
    for clip in kept_rows(clips).to_pylist():
        motion = parse_prompt(clip["prompt"]).motion
        row = {"prompt": clip["prompt"], "chosen": str(root / clip["video"]), "category": motion}
        rows[clip["content"]] = row | {"rejected": [], "rejected_scores": []}
    for job in rejected.to_pylist():
        if job["content"] in rows:
            rows[job["content"]]["rejected"].append(str(root / job["rejected"]))
            rows[job["content"]]["rejected_scores"].append({"sa": job["sa"], "pc": job["pc"]})
    return rows


def train(args: StudyArguments, name: str, seed: int, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer

    config = VideoGroupDPOConfig(
        output_dir=str(Path(args.output_dir) / name),
        overwrite_output_dir=True,  # an arm that was cut off is trained again
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-4,
        beta=500.0,
        timestep_sampling="shifted",
        fps=8,
        seed=seed,
        data_seed=seed,
        bf16=False,
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = VideoGroupDPOTrainer("sandbox", config, groups)
    trainer.train()
    trainer.save_model()
    return list(trainer.state.log_history)


def judged(sandbox: "Sandbox", args: StudyArguments, name: str) -> list[dict[str, Any]]:
    from video_trl.evaluation.evaluate import evaluate_pipeline, sandbox_prompts
    from video_trl.evaluation.runs.generate import VideoGenerator

    prompts = sandbox_prompts(args.eval_prompts, seed=PROMPT_DRAW)
    folder = Path(args.output_dir) / "videos" / name
    generator = VideoGenerator(sandbox.pipeline, "sandbox", fps=8, call_kwargs=dict(sandbox.call_kwargs))
    table = evaluate_pipeline(folder, generator, sandbox.judge, prompts, seeds=args.eval_seeds, name=name)
    return [{key: row[key] for key in ("prompt", "category", "seed", "pc", "sa")} for row in table.rows()]


def result_path(args: StudyArguments, arm: str, seed: int | None = None) -> Path:
    return Path(args.output_dir) / "results" / (f"{arm}.json" if seed is None else f"{arm}-seed{seed}.json")


def write_result(args: StudyArguments, arm: str, result: dict[str, Any], seed: int | None = None) -> None:
    """Whole or not at all; a folder with results of another setting is refused."""
    path = result_path(args, arm, seed)
    if arm == "setting" and path.is_file() and json.loads(path.read_text()) != result:
        raise ValueError(f"{path} holds {path.read_text()}, expected {result}. Pass another --output_dir.")
    write_atomically(path, json.dumps(result))


# ---- The report -----------------------------------------------------------------------------------------------------


def write_report(page: Path, args: StudyArguments) -> None:
    """
    Raises:
        ValueError: A result is missing, or the page has no place for the tables.
    """
    setting = json.loads(result_path(args, "setting").read_text())
    seeds = setting["seeds"]
    paths = {BASE: [result_path(args, BASE)]} | {
        arm: [result_path(args, arm, seed) for seed in seeds] for arm in ARMS if arm in args.arms
    }
    missing = [str(path) for several in paths.values() for path in several if not path.is_file()]
    text = page.read_text() if page.is_file() else ""
    if missing or any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"Expected all results (missing: {missing}) and in {page} each of the lines {MARKS} once.")
    results = {arm: [json.loads(path.read_text()) for path in several] for arm, several in paths.items()}
    difficulty = json.loads(result_path(args, "difficulty").read_text())
    block = [
        MARKS[0],
        f"Setting: {', '.join(f'{name} {value}' for name, value in setting.items())}.",
        *score_table(results, hard_motions(difficulty)),
        *step_table(results, hard_motions(difficulty)),
        *selection_table(results, difficulty),
        MARKS[1],
    ]
    before, rest = text.split(MARKS[0])
    write_atomically(page, before + "\n\n".join(block) + rest.split(MARKS[1])[1])
    print(f"{page} is written.")


def hard_motions(difficulty: dict[str, float]) -> list[str]:
    from video_trl.sandbox.world.prompts import ACTIONS

    motion_of = {action: motion for motion, action in ACTIONS.items()}
    return [motion_of[action] for action in sorted(difficulty, key=lambda name: difficulty[name])[:NUM_HARD]]


def score_table(results: dict[str, list[dict[str, Any]]], hard: list[str]) -> list[str]:
    rows = [
        [
            "arm",
            "mean pc",
            "pc over base",
            "pc over random",
            f"pc, hard ({', '.join(hard)})",
            "over random",
            "mean sa",
            "sa over random",
        ]
    ]
    for arm in results:
        label = ARMS.get(arm, "base model")
        rows.append(
            [
                f"{arm}: {label}" if arm in ARMS else label,
                f"{mean(pooled(results, arm, 'pc')):.3f}",
                compared(results, arm, BASE, "pc"),
                compared(results, arm, "random", "pc"),
                f"{mean(pooled(results, arm, 'pc', hard)):.3f}",
                compared(results, arm, "random", "pc", hard),
                f"{mean(pooled(results, arm, 'sa')):.3f}",
                compared(results, arm, "random", "sa"),
            ]
        )
    runs = len(results["random"])
    note = (
        f"{runs} seeds, each with its own selection and training, pooled ({len(pooled(results, 'random', 'pc'))} "
        "videos an arm). Paired differences, bootstrap 95 % intervals over sentences; each stands for itself."
    )
    return ["### Scores on held-out sentences", note, markdown_table(rows)]


def step_table(results: dict[str, list[dict[str, Any]]], hard: list[str]) -> list[str]:
    """Each arm against the one before it: what the paper's table adds up."""
    rows = [["step", "pc", "pc, hard", "sa"]]
    arms = [arm for arm in ARMS if arm in results]
    for before, arm in zip(arms, arms[1:], strict=False):
        columns: list[tuple[str, list[str] | None]] = [("pc", None), ("pc", hard), ("sa", None)]
        cells = [compared(results, arm, before, score, motions) for score, motions in columns]
        rows.append([f"{arm} over {before}", *cells])
    return ["### Step by step", markdown_table(rows)]


def selection_table(results: dict[str, list[dict[str, Any]]], difficulty: dict[str, float]) -> list[str]:
    from video_trl.sandbox.world.prompts import ACTIONS, MOTIONS, STILL_SCENES

    rows = [["caption's motion", "score of the base model", *ARMS]]
    for motion in MOTIONS + STILL_SCENES:
        score = difficulty.get(ACTIONS[motion])
        counts = [[run["categories"].get(motion, 0) for run in results[arm]] for arm in ARMS]
        rows.append([motion, "" if score is None else f"{score:.3f}", *(f"{mean(values):.1f}" for values in counts)])
    note = "Training groups by what their caption says, mean over seeds."
    return ["### What each arm trains on", note, markdown_table(rows)]


def pooled(
    results: dict[str, list[dict[str, Any]]], arm: str, score: str, motions: list[str] | None = None
) -> list[float]:
    """Scores, seed after seed; those of the base model once for every seed of the others."""
    runs = results[arm] * (len(results["random"]) if arm == BASE else 1)
    return [
        record[score] for run in runs for record in run["scores"] if motions is None or record["category"] in motions
    ]


def compared(
    results: dict[str, list[dict[str, Any]]], a: str, b: str, score: str, motions: list[str] | None = None
) -> str:
    from video_trl.evaluation import paired_bootstrap, verdict

    if a in (b, BASE):
        return ""
    prompts = [
        record["prompt"]
        for run in results["random"]
        for record in run["scores"]
        if motions is None or record["category"] in motions
    ]
    result = paired_bootstrap(pooled(results, a, score, motions), pooled(results, b, score, motions), clusters=prompts)
    words = verdict(result, num_seeds=len(results["random"]))
    return f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}] {words}"


def mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)


def markdown_table(rows: list[list[str]]) -> str:
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    main(sys.argv[1:])
