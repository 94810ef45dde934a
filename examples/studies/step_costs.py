# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Memory and arithmetic of a training step at real sizes, counted without weights: the tables of docs/trainers/memory.md.

    python examples/studies/step_costs.py                  # minutes on one core
    python examples/studies/step_costs.py --model wan-1.3b
    python examples/studies/step_costs.py --table policies --model wan-14b
    python examples/studies/step_costs.py --table quantised --model wan-14b
    python examples/studies/step_costs.py --table references --model wan-1.3b
    python examples/studies/step_costs.py --table clusters --model wan-14b
"""

import argparse
from typing import Any, get_args

from video_trl.trainer.planning.counter import StepCost, count_step
from video_trl.trainer.planning.estimate import Placement, Workload, estimate
from video_trl.trainer.setup.quantization import Quantization


WAN = {
    "_class_name": "WanTransformer3DModel",
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
COGVIDEOX = {
    "_class_name": "CogVideoXTransformer3DModel",
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "max_text_seq_length": 226,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "temporal_compression_ratio": 4,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
}
# Name -> (config.json, sizes in frames, height, width)
MODELS = {
    "wan-1.3b": (WAN | {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}, [(81, 480, 832)]),
    "wan-14b": (
        WAN | {"ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40},
        [(81, 480, 832), (81, 720, 1280)],
    ),
    "cogvideox-2b": (COGVIDEOX | {"num_attention_heads": 30, "num_layers": 30}, [(49, 480, 720)]),
    "cogvideox-5b": (
        COGVIDEOX | {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        [(49, 480, 720)],
    ),
}
# Name -> (videos, reference, step mode)
STEPS = {
    "SFT": (1, "none", "concat"),
    "pair, concat": (2, "adapter", "concat"),
    "pair, singles": (2, "adapter", "singles"),
    "pair, sequential": (2, "adapter", "sequential"),
    "group of 1 + 3, concat": (4, "adapter", "concat"),
    "group of 1 + 3, singles": (4, "adapter", "singles"),
    "group of 1 + 3, sequential": (4, "adapter", "sequential"),
}
# Name -> (videos, reference, step mode, rank of the adapter; all weights are trained without one)
REFERENCES = {
    "none, SFT": (1, "none", "concat", 48),
    "adapter off, concat": (2, "adapter", "concat", 48),
    "adapter off, sequential": (2, "adapter", "sequential", 48),
    "a copy, under LoRA, concat": (2, "copy", "concat", 48),
    "a copy, all weights, concat": (2, "copy", "concat", None),
    "a copy, all weights, sequential": (2, "copy", "sequential", None),
}


POLICIES = (None, "attention", "full", "offload")
# GPUs, engine, GPUs that share a video
CLUSTERS = [(8, "ddp", 1), (8, "fsdp2", 1), (8, "fsdp2", 4), (8, "fsdp2", 8), (64, "fsdp2", 8), (512, "fsdp2", 8)]


def latents(size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    return 16, (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8


def steps(name: str, config: dict[str, Any], size: tuple[int, int, int]) -> None:
    for step, (num_videos, reference, step_mode) in STEPS.items():
        cost = count_step(config, latents(size), num_videos=num_videos, reference=reference, step_mode=step_mode)
        say(row(name, size, step, cost))


def policies(name: str, config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """A pair, its videos one by one, for everything that can be recomputed."""
    for policy in POLICIES:
        settings = {"checkpointing": policy is not None, "checkpointing_policy": policy or "full"}
        pair = {"num_videos": 2, "reference": "adapter", "step_mode": "sequential"}
        say(row(name, size, policy or "nothing", count_step(config, latents(size), **pair, **settings)))


def quantised(name: str, config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """A pair, its videos one by one, on a frozen base in fewer and fewer bits."""
    for kind in (None, *get_args(Quantization)[::-1]):
        pair = {"num_videos": 2, "reference": "adapter", "step_mode": "sequential"}
        say(row(name, size, kind or "bf16", count_step(config, latents(size), **pair, quantization=kind)))


def references(name: str, config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """A pair with each kind of reference, next to fine-tuning."""
    for kind, (num_videos, reference, mode, rank) in REFERENCES.items():
        pair = {"num_videos": num_videos, "reference": reference, "step_mode": mode, "lora_rank": rank}
        say(row(name, size, kind, count_step(config, latents(size), **pair)))


def clusters(name: str, config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """A pair on many GPUs, and what each of them sends in a step."""
    for number, engine, sharing in CLUSTERS:
        for mode in ("concat", "sequential"):
            cost = estimate(Workload(config, latents(size), 2, "adapter"), Placement(number, engine, sharing, mode))
            shown = f"{size[0]} x {size[1]} x {size[2]}"
            cells = [name, shown, str(number), engine, str(sharing), mode, f"{cost.peak / 2**30:.1f}"]
            sent = [cost.sent.get(part, 0) / 2**30 for part in ("weights", "gradients", "tokens and heads")]
            say(f"| {' | '.join([*cells, *(f'{part:.1f}' for part in sent)])} |")


HEADERS = {
    "steps": "model | frames, size | tokens | step | weights, GiB | activations, GiB | peak, GiB | PFLOP",
    "policies": "model | frames, size | tokens | checkpointed | weights, GiB | activations, GiB | peak, GiB | PFLOP",
    "quantised": "model | frames, size | tokens | frozen base | weights, GiB | activations, GiB | peak, GiB | PFLOP",
    "references": "model | frames, size | tokens | reference | weights, GiB | activations, GiB | peak, GiB | PFLOP",
    "clusters": "model | frames, size | GPUs | engine | a video | step mode | peak, GiB | weights sent, GiB | "
    "gradients sent, GiB | tokens and heads sent, GiB",
}


TABLES = {
    "steps": steps, "policies": policies, "quantised": quantised, "references": references, "clusters": clusters,
}  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def row(name: str, size: tuple[int, int, int], step: str, cost: StepCost) -> str:
    gib = [f"{number / 2**30:.1f}" for number in (cost.weights, cost.activations, cost.peak)]
    frames, height, width = size
    cells = [name, f"{frames} x {height} x {width}", f"{cost.tokens:,}", step, *gib, f"{cost.flops / 1e15:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--table", choices=HEADERS, default="steps")
    args = parser.parse_args()
    header = HEADERS[args.table]
    say(f"| {header} |\n|{'---|' * len(header.split(' | '))}")
    for name, (config, sizes) in MODELS.items():
        if args.model in (None, name):
            for size in sizes:
                TABLES[args.table](name, config, size)


if __name__ == "__main__":
    main()
