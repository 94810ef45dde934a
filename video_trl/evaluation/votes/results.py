"""Results of a study: counts of votes, scores with intervals, and agreement of the raters."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..report.page import Table
from ..statistics import Proportion, holm, proportion_of
from .agreement import krippendorff_alpha
from .gsb import BAD, GOOD, GSB, SAME, gsb, majority
from .study import QUESTIONS, Vote, VoteQuestion, open_study, read_votes


if TYPE_CHECKING:
    from datasets import Dataset

_ORDER = {BAD: 0.0, SAME: 1.0, GOOD: 2.0}


@dataclass(frozen=True)
class VoteResult:
    """
    Run `a` against run `b` in one question.

    Attributes:
        a (`str`), b (`str`), question (`str`): What was asked about.
        gsb ([`GSB`]): One verdict for each pair: that of most of its raters, `same` where they are split evenly.
        preferred ([`Proportion`]): Single votes for A among the votes for a side, as PhyGDPO's user study counts them.
            None when every vote was `same`.
        alpha (`float` or `None`): Krippendorff's alpha (ordinal) over pairs with two or more raters.
        num_pairs (`int`): Pairs of the study; `gsb.n` of them have a vote.
        num_raters (`int`), num_votes (`int`): Raters who voted, and their votes.
        p_adjusted (`float`): p-value of `gsb` after Holm's correction over all results.
    """

    a: str
    b: str
    question: str
    gsb: GSB
    preferred: Proportion | None
    alpha: float | None
    num_pairs: int
    num_raters: int
    num_votes: int
    p_adjusted: float

    @property
    def verdict(self) -> str:
        return self.gsb.verdict(self.p_adjusted)


def vote_results(
    votes_path: str | os.PathLike[str],
    run_dirs: Sequence[str | os.PathLike[str]] | None = None,
    *,
    level: float = 0.95,
) -> list[VoteResult]:
    """
    Sums up a file of votes.

    Args:
        votes_path (path): File that [`serve_votes`] wrote.
        run_dirs (list of path, *optional*): The runs; given, it is checked that the votes are about these very videos.
        level (`float`, *optional*, defaults to `0.95`): Confidence level of the intervals.

    Returns:
        `list[VoteResult]`: One for each two runs and question that have a vote.

    Raises:
        ValueError: If the file is damaged, holds no vote, or is about other runs.
    """
    header, votes = read_votes(votes_path)
    if run_dirs is not None and open_study(run_dirs, header["questions"]).header() != header:
        raise ValueError(
            f"{votes_path} holds votes about other videos than {[os.fspath(run_dir) for run_dir in run_dirs]}."
        )
    if not votes:
        raise ValueError(f"{votes_path} holds no vote yet.")
    groups = [
        (other, question, [vote for vote in votes if vote.b == other])
        for other in header["runs"][1:]
        for question in QUESTIONS[header["questions"]]
    ]
    counted = [(group, _count(group[2], group[1], level)) for group in groups if group[2]]
    adjusted = holm([result.p_value for _, result in counted])
    return [
        _result(header, other, question, group, result, p, level)
        for ((other, question, group), result), p in zip(counted, adjusted, strict=True)
    ]


def votes_table(results: Sequence[VoteResult]) -> Table:
    """The results as a table of text, one row for each pair of runs and question."""
    header = ["A vs B", "question", "pairs", "raters", "votes", "Good/Same/Bad", "score", "net", "A preferred",
              "alpha", "p (Holm)", "verdict"]  # fmt: skip
    rows = []
    for r in results:
        g = r.gsb
        (low, high), (net_low, net_high) = g.score_interval, g.net_interval
        rows.append(
            [
                f"{r.a} vs {r.b}",
                r.question,
                f"{g.n} of {r.num_pairs}",
                str(r.num_raters),
                str(r.num_votes),
                f"{g.good}/{g.same}/{g.bad}",
                f"{g.score:.2f} [{low:.2f}, {high:.2f}]",
                f"{g.net:+.3f} [{net_low:+.3f}, {net_high:+.3f}]",
                "" if r.preferred is None else str(r.preferred),
                "" if r.alpha is None else f"{r.alpha:.3f}",
                f"{r.p_adjusted:.3g}",
                r.verdict,
            ]
        )
    level = f"{100 * results[0].gsb.level:g} %" if results else ""
    note = (
        "One verdict a pair: that of most of its raters, Same where they are split. Score: (Good + Same) / (Same + "
        "Bad); net: (Good - Bad) / pairs; A preferred: single votes for A among votes for a side. Brackets: "
        f"{level} intervals over prompts. alpha: Krippendorff, ordinal, pairs with two or more raters. p: sign test "
        "over prompts."
    )
    return Table("Votes", header, rows, note)


def votes_dataset(votes_path: str | os.PathLike[str]) -> "Dataset":
    """
    The votes as a `datasets.Dataset`, for `push_to_hub` or `to_parquet`: one row for each answer, with the side that A
    stood on, the verdict about A, and the choice as the rater saw it.

    Raises:
        ValueError: If the file is damaged.
    """
    from datasets import Dataset, Features, Value

    text = ("study", "rater", "task", "prompt", "a", "b", "left", "question", "verdict", "choice", "time")
    features = Features(
        {**{name: Value("string") for name in text}, "seed": Value("int64"), "position": Value("int64"),
         "seconds": Value("float64")}
    )  # fmt: skip
    rows = []
    for vote in read_votes(votes_path)[1]:
        shared = {name: value for name, value in vars(vote).items() if name != "answers"}
        for question, verdict in vote.answers.items():
            a_side, b_side = ("left", "right") if vote.left == "a" else ("right", "left")
            choice = {GOOD: a_side, SAME: SAME, BAD: b_side}[verdict]
            rows.append({**shared, "question": question, "verdict": verdict, "choice": choice})
    return Dataset.from_list(rows, features=features)


def _count(votes: Sequence[Vote], question: VoteQuestion, level: float) -> GSB:
    by_task: dict[str, list[Vote]] = {}
    for vote in votes:
        by_task.setdefault(vote.task, []).append(vote)
    verdicts = [majority([vote.answers[question.key] for vote in group]) for group in by_task.values()]
    return gsb(verdicts, [group[0].prompt for group in by_task.values()], level=level)


def _result(
    header: Mapping[str, Any],
    other: str,
    question: VoteQuestion,
    votes: Sequence[Vote],
    counted: GSB,
    p_adjusted: float,
    level: float,
) -> VoteResult:
    by_task: dict[str, list[float]] = {}
    for vote in votes:
        by_task.setdefault(vote.task, []).append(_ORDER[vote.answers[question.key]])
    sided = [vote for vote in votes if vote.answers[question.key] != SAME]
    wins = [vote.answers[question.key] == GOOD for vote in sided]
    return VoteResult(
        a=votes[0].a,
        b=other,
        question=question.key,
        gsb=counted,
        preferred=proportion_of(wins, [vote.prompt for vote in sided], level) if sided else None,
        alpha=krippendorff_alpha(list(by_task.values()), "ordinal"),
        num_pairs=header["pairs"],
        num_raters=len({vote.rater for vote in votes}),
        num_votes=len(votes),
        p_adjusted=p_adjusted,
    )
