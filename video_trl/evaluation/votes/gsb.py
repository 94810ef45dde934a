"""Good/Same/Bad scores of human comparisons (Reg-DPO, https://huggingface.co/papers/2511.01450, A.6)."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..statistics import gsb_score, sign_test


GOOD, SAME, BAD = "good", "same", "bad"
VERDICTS = (GOOD, SAME, BAD)
_RESAMPLES_AT_ONCE = 500  # bounds the memory


@dataclass(frozen=True)
class GSB:
    """
    Votes of A against B.

    Attributes:
        good (`int`), same (`int`), bad (`int`): Items on which A is better, neither is, B is better.
        score (`float`): (good + same) / (same + bad). 1 is a draw, ties pull towards 1; `inf` when A won every item.
        net (`float`): (good - bad) / n, in [-1, 1]. 0 is a draw.
        win_rate (`float`): (good + same / 2) / n, in [0, 1].
        score_interval, net_interval (`tuple[float, float]`): Percentile bootstrap over prompts.
        p_value (`float`): Sign test over prompts: won by A against won by B.
        num_prompts (`int`): Prompts that were resampled.
        level (`float`): Confidence level of the intervals.
    """

    good: int
    same: int
    bad: int
    score: float
    net: float
    win_rate: float
    score_interval: tuple[float, float]
    net_interval: tuple[float, float]
    p_value: float
    num_prompts: int
    level: float

    @property
    def n(self) -> int:
        return self.good + self.same + self.bad

    def verdict(self, p_adjusted: float | None = None) -> str:
        """`A preferred`, `B preferred`, or that no preference is shown: the interval of `net` contains zero or, where
        several comparisons were made, the p-value adjusted by [`holm`] is above `1 - level`."""
        low, high = self.net_interval
        if low <= 0 <= high:
            return "no preference shown"
        if (self.p_value if p_adjusted is None else p_adjusted) > 1 - self.level:
            return "no preference shown after correction"
        return "A preferred" if low > 0 else "B preferred"


def gsb(
    verdicts: Sequence[str],
    prompts: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> GSB:
    """
    Sums up one verdict for each compared pair of videos.

    Args:
        verdicts (list of `str`): `"good"`, `"same"` or `"bad"` for A.
        prompts (list, *optional*): Prompt of each pair; whole prompts are resampled. Without it each pair is its own.
        level (`float`, *optional*, defaults to `0.95`): Confidence level, in (0, 1).
        num_resamples (`int`, *optional*, defaults to `10000`): Bootstrap draws.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Returns:
        [`GSB`]

    Raises:
        ValueError: If there is no verdict, one is unknown, or the prompts are not as many.
    """
    unknown = sorted(set(verdicts) - set(VERDICTS))
    if unknown or not verdicts:
        raise ValueError(f"Expected verdicts among {', '.join(VERDICTS)}, got {unknown or 'none at all'}.")
    if prompts is not None and len(prompts) != len(verdicts):
        raise ValueError(f"`prompts` must label all {len(verdicts)} verdicts, got {len(prompts)} labels.")
    labels: dict[Hashable, int] = {}
    each = range(len(verdicts)) if prompts is None else prompts
    rows = [labels.setdefault(prompt, len(labels)) for prompt in each]
    counts = np.zeros((len(labels), len(VERDICTS)))
    np.add.at(counts, (rows, [VERDICTS.index(verdict) for verdict in verdicts]), 1)

    rng, even = np.random.default_rng(seed), np.full(len(labels), 1 / len(labels))
    sizes = [min(_RESAMPLES_AT_ONCE, num_resamples - start) for start in range(0, num_resamples, _RESAMPLES_AT_ONCE)]
    # How often each prompt is drawn, times its counts: (resamples, prompts) @ (prompts, 3).
    totals = np.concatenate([rng.multinomial(len(labels), even, size) @ counts for size in sizes])
    good, same, bad = totals.T
    with np.errstate(divide="ignore"):
        scores = (good + same) / (same + bad)
    edges = [(1 - level) / 2, (1 + level) / 2]
    # Without interpolation between draws: half way to infinity is no number.
    score_low, score_high = np.quantile(scores, edges, method="inverted_cdf")
    net_low, net_high = np.quantile((good - bad) / (good + same + bad), edges)
    total = Counter(verdicts)
    number = len(verdicts)
    return GSB(
        good=total[GOOD],
        same=total[SAME],
        bad=total[BAD],
        score=gsb_score(total[GOOD], total[SAME], total[BAD]),
        net=(total[GOOD] - total[BAD]) / number,
        win_rate=(total[GOOD] + total[SAME] / 2) / number,
        score_interval=(float(score_low), float(score_high)),
        net_interval=(float(net_low), float(net_high)),
        p_value=sign_test(int((counts[:, 0] > counts[:, 2]).sum()), int((counts[:, 0] < counts[:, 2]).sum())),
        num_prompts=len(labels),
        level=level,
    )


def majority(verdicts: Sequence[str]) -> str:
    """Verdict of several raters on one pair: the one with the most votes, `"same"` where two share that place."""
    (first, count), *others = Counter(verdicts).most_common()
    return SAME if others and others[0][1] == count else first
