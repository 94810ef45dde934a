# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Memory and time of token relation distillation: the fused loss against the same loss as one would write it ("joint"),
as the official code does ("expanded"), and beside the form without absolute values ("squared").

    python examples/studies/trd.py
    python examples/studies/trd.py --agreement 15600

Every measurement has a process of its own, on the CPU with one thread, in float32: forward and backward, joint
weighting, margin 0.1. Peak memory is the highest resident set above that of the inputs, in a first run; time is the
median CPU time of the runs after it (of the only run with `--repeats 1`), which other programs on the machine disturb
less than they do the clock. "Kept" is what autograd holds between forward and backward. "Backward" is what value and
gradient take more than the value alone, by the time of the value. Linux only: it reads /proc.

`--agreement` compares gradients in float32 and float64. A relation within the margin has no gradient, one outside of
it has a full one, and which it is can hang on the last bit. So it counts the relations on which two computations
disagree, and forms the gradient in float64 once more with the decisions of float32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from video_trl.losses import trd_loss


# (B, F, N, D): VideoMAEv2-B on 48 frames of 160 x 240 pixels, the same with a batch, V-JEPA 2-L on 80 of 240 x 416.
SIZES = {"3600": (1, 24, 150, 768), "4x3600": (4, 24, 150, 768), "15600": (1, 40, 390, 1024)}
MARGIN = 0.1
COLUMNS = {
    "peak": ".0f", "kept": ".0f", "forward": ".2f", "seconds": ".2f", "backward": ".2f", "loss": ".7f",
    "gradient": ".6g",
}  # fmt: skip
BLOCK = 1024  # rows of relations at a time, the default of `trd_loss`


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return trd_loss(student, teacher, margin=MARGIN)[0]


def joint(student: Tensor, teacher: Tensor) -> Tensor:
    """One matrix product for all relations of a sample, and autograd."""
    x, y = (F.normalize(tokens, dim=-1).flatten(1, 2) for tokens in (student, teacher))
    return F.relu((x @ x.mT - y @ y.mT).abs() - MARGIN).mean()


def expanded(student: Tensor, teacher: Tensor) -> Tensor:
    """The official code's form: the tokens of each frame against a copy of the tokens of all frames."""

    def relations(tokens: Tensor) -> Tensor:
        tokens = F.normalize(tokens, dim=-1)
        batch_size, num_frames, num_tokens, width = tokens.shape
        everything = tokens.reshape(batch_size, 1, num_frames * num_tokens, width).expand(-1, num_frames, -1, -1)
        return torch.bmm(tokens.flatten(0, 1), everything.flatten(0, 1).mT)  # (B * F, N, F * N)

    return F.relu((relations(student) - relations(teacher)).abs() - MARGIN).mean()


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Another loss, for comparison: squared differences, which need no matrix of relations."""
    return trd_loss(student, teacher, margin=0.0, norm="l2")[0]


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fused": fused,
    "joint": joint,
    "expanded": expanded,
    "squared": squared,
}


def measure(form: str, size: str, repeats: int) -> dict[str, float]:
    """MiB kept, MiB at the peak, CPU seconds, loss and a sum over the gradient, to compare the forms by."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(*SIZES[size], generator=generator) for _ in range(2))
    student.requires_grad_()
    fused(student[:, :2, :2], teacher[:, :2, :2])  # what is loaded at the first call is no part of the peak
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in (student.data_ptr(), teacher.data_ptr()):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    forward, seconds, peak = [], [], 0.0
    for repeat in range(repeats):
        student.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # starts the record of the peak anew
        before, start = resident("VmRSS"), time.process_time()
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = FORMS[form](student, teacher)
        loss.backward()
        seconds.append(time.process_time() - start)
        if repeat == 0:
            peak = resident("VmHWM") - before
        start = time.process_time()
        with torch.no_grad():
            FORMS[form](student, teacher)
        forward.append(time.process_time() - start)
    assert student.grad is not None
    both, alone = (statistics.median(each[1:] or each) for each in (seconds, forward))
    return {
        "kept": sum(sizes.values()) / 2**20,
        "peak": peak,
        "forward": alone,
        "seconds": both,
        "backward": both / alone - 1,
        "loss": loss.item(),
        "gradient": (student.grad * teacher).sum().item(),
    }


def resident(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def agreement(size: str) -> dict[str, float]:
    """
    Relations on which computations disagree, and differences of gradients relative to the largest entry.

    Decisions are those of the two forms, computed as they compute them, of one half of the relations, which are
    symmetric; gradients of decisions are in float64.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(*SIZES[size], generator=generator) for _ in range(2))
    single = [F.normalize(each, dim=-1).flatten(0, 2) for each in (student, teacher)]
    ours = [(each * each.norm(dim=-1, keepdim=True).reciprocal()).flatten(0, 2) for each in (student, teacher)]
    exact, target = (F.normalize(each.double(), dim=-1).flatten(0, 2) for each in (student, teacher))
    length = student.double().flatten(0, 2).norm(dim=-1, keepdim=True)
    of_decisions = {name: torch.zeros_like(exact) for name in ("double", "fused", "expanded")}
    disagree = dict.fromkeys(("fused and double", "expanded and double", "fused and expanded"), 0)
    for start in range(0, len(exact), BLOCK):
        rows, behind = slice(start, start + BLOCK), slice(start + BLOCK, None)
        differences = {
            "double": exact[rows] @ exact[start:].T - target[rows] @ target[start:].T,
            "fused": (ours[0][rows] @ ours[0][start:].T).addmm_(ours[1][rows], ours[1][start:].T, alpha=-1),
            "expanded": single[0][rows] @ single[0][start:].T - single[1][rows] @ single[1][start:].T,
        }
        signs = {name: torch.where(each.abs() > MARGIN, each.sign(), 0.0) for name, each in differences.items()}
        for name, each in signs.items():
            of_decisions[name][rows] += each.double() @ exact[start:]
            of_decisions[name][behind] += each[:, BLOCK:].double().T @ exact[rows]
        for pair in disagree:
            one, other = pair.split(" and ")
            wrong = signs[one] != signs[other]
            disagree[pair] += int(wrong[:, :BLOCK].sum()) + 2 * int(wrong[:, BLOCK:].sum())
    for each in of_decisions.values():  # through the normalisation, and the mean over all pairs
        each.sub_((each * exact).sum(dim=-1, keepdim=True) * exact).mul_(2 / len(exact) ** 2).div_(length)
    found = {f"relations on which {pair} disagree": float(number) for pair, number in disagree.items()}
    largest = of_decisions["double"].abs().max()
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        leaf = student.to(dtype, copy=True).requires_grad_()
        fused(leaf, teacher.to(dtype)).backward()
        assert leaf.grad is not None
        gradient = leaf.grad.double().flatten(0, 2)
        for other in ("double", "fused"):
            difference = (gradient - of_decisions[other]).abs().max() / largest
            found[f"gradient in {name} against decisions of {other}"] = float(difference)
    between = (of_decisions["fused"] - of_decisions["expanded"]).abs().max() / largest
    return found | {"gradients of the decisions of fused and expanded": float(between)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--agreement", choices=SIZES, help="compare gradients at this size instead")
    parser.add_argument("--measure", action="store_true", help="measure the first form and size in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.forms[0], options.sizes[0], options.repeats)))
        return
    if options.agreement is not None:
        print(json.dumps(agreement(options.agreement), indent=1))
        return
    names = (
        "tokens",
        "width",
        "form",
        "peak MiB",
        "kept MiB",
        "forward, CPU s",
        "CPU s",
        "backward",
        "loss",
        "gradient",
    )
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for size in options.sizes:
        for form in options.forms:
            command = [sys.executable, __file__, "--measure", "--sizes", size, "--forms", form]
            run = subprocess.run(
                [*command, "--repeats", str(options.repeats)], check=True, stdout=subprocess.PIPE, text=True
            )
            row = json.loads(run.stdout)
            numbers = (f"{row[key]:{spec}}" for key, spec in COLUMNS.items())
            print(f"| {size} | {SIZES[size][-1]} | {form} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
