"""Datasets of the sandbox that differ in one thing: whose winners, how many, how drawn, and against which losers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.video_io import write_video
from ..judge.judge import SandboxJudge
from ..weights.pipeline import load_sandbox
from ..world.prompts import parse_prompt
from ..world.simulate import BASE_VIOLATIONS, FPS, Rendering, simulate
from .datasets import PASSES, build_clip_dataset, build_group_dataset


HELD_OUT = 0.125  # proportion of the judged groups that nothing is trained on, for the gaps


@dataclass
class SandboxRows:
    """
    Rows of every kind, all made of one pool of clips as found, the first ones of the sandbox experiment's.

    | kind | rows |
    |---|---|
    | "found" | every clip of the pool, unjudged, without rejected videos |
    | "found groups" | every clip of the pool, unjudged, as the chosen one against a video of the base model |
    | "judged" | the clips that the judge passes, against the base model's videos |
    | "first N" | N of these |
    | "wild" | the same clips in another rendering, which the base model has never seen |
    | "twins", "wild twins" | rejected: the chosen clip's own scene with a broken law |
    | "guided", "wild guided" | rejected: made with the guidance of an evaluation |
    | "own best" | chosen: the base model's best video, if the judge passes it; rejected: its worst one |
    | "own best, own worst" | whatever they are |
    | "K of M" | M rejected videos were made, K are kept, the lawless first |

    Args:
        folder (`Path`): Where clips and tables are kept, and found again.
        found_clips (`int`): Clips in the pool.
        num_rejected (`int`): The base model's videos of a judged clip.
        below (`float`): `pc` below which a video is lawless, of "K of M".
    """

    folder: Path
    found_clips: int
    num_rejected: int
    below: float

    def of(self, kind: str) -> Any:
        """
        Rows to train on.

        Raises:
            ValueError: If there is no such kind.
        """
        if kind == "found":
            return build_clip_dataset(self.folder / "found", num_clips=self.found_clips, found=True)
        if kind == "found groups":
            return self.groups("dataset-found", num_rejected=1, judged=False)
        if match := re.fullmatch(r"first (\d+)", kind):
            return self.trained().select(range(min(int(match[1]), len(self.trained()))))
        if match := re.fullmatch(r"(\d+) of (\d+)", kind):
            groups = self.trained(f"dataset-{match[2]}", num_rejected=int(match[2]))
            return [worst_first(row, int(match[1]), self.below) for row in groups]
        if kind == "guided":
            return self.trained("dataset-guided", guidance_scale=load_sandbox().call_kwargs["guidance_scale"])
        if kind.startswith("own best"):
            rows = [own_best(row) for row in self.trained()]
            passed = [row for row in rows if row.pop("chosen_pc") >= PASSES]
            return passed if kind == "own best" else rows
        if kind == "wild guided":
            return [self._rendered("wild", index, row) for index, row in enumerate(self.of("guided"))]
        if kind in ("wild", "twins", "wild twins"):
            return [self._rendered(kind, index, row) for index, row in enumerate(self.trained())]
        if kind != "judged":
            raise ValueError(f"Expected a kind of rows that `SandboxRows` describes, got {kind!r}.")
        return self.trained()

    def groups(self, name: str = "dataset", **options: Any) -> Any:
        """All groups of a table, made where it is not there; options of `build_group_dataset`."""
        options = {"num_rejected": self.num_rejected, **options}
        return build_group_dataset(
            load_sandbox(), self.folder / name, num_groups=self.found_clips, found=True, **options
        )

    def trained(self, name: str = "dataset", **options: Any) -> Any:
        """The groups of a table that may be trained on."""
        groups = self.groups(name, **options)
        return groups.select(range(max(1, len(groups) - self._num_held_out(groups))))

    def held_out(self, *, wild: bool = False) -> Any:
        """The judged groups that nothing is trained on; their chosen clips in the other rendering where asked."""
        groups = self.groups()
        rows = groups.select(range(len(groups) - self._num_held_out(groups), len(groups)))
        return [self._rendered("wild", index, row) for index, row in enumerate(rows)] if wild else rows

    @staticmethod
    def _num_held_out(groups: Any) -> int:
        return max(1, round(HELD_OUT * len(groups)))

    def _rendered(self, kind: str, index: int, row: dict[str, Any]) -> dict[str, Any]:
        """A group whose winner is drawn anew, or gets the same scene with a broken law as its only rejected video."""
        seed, motion = int(row["provenance"].rsplit(" ", 1)[1]), parse_prompt(row["prompt"]).motion
        rendering: Rendering = "wild" if "wild" in kind else "plain"
        made = dict(row)
        if rendering == "wild":
            path = self.folder / "wild" / f"{seed}.mp4"
            made["chosen"] = str(write_video(path, simulate(seed, motion=motion, rendering="wild").video, FPS))
        if "twins" in kind:
            ways = BASE_VIOLATIONS[motion]
            twin = simulate(seed, motion=motion, violation=ways[index % len(ways)], rendering=rendering)
            (score,) = SandboxJudge().score([twin.video], [row["prompt"]])
            path = self.folder / kind.replace(" ", "-") / f"{seed}.mp4"
            made["rejected"] = [str(write_video(path, twin.video, FPS))]
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
