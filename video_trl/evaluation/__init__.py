"""
Evaluate models: statistics with intervals, paired comparisons, votes, and an HTML report.

The names below are statistics and tables. Runs, benchmarks and the voting page are submodules: `evaluate`, `run`,
`comparison`, `videophy`, `videophy2`, `phygenbench`, `vbench`, `voting_server`, `voting_results`, `physion`.
"""

from video_trl.evaluation.report.page import Column, Comparison, Curve, Sample, Table, summary_table, write_report
from video_trl.evaluation.statistics import (
    PairedDifference,
    Proportion,
    gsb_score,
    holm,
    mcnemar,
    paired_bootstrap,
    prompt_sign_test,
    proportion_of,
    rank_points,
    rank_total_score,
    sign_test,
    verdict,
    wilson_interval,
)
from video_trl.evaluation.votes.agreement import krippendorff_alpha
from video_trl.evaluation.votes.gsb import GSB, gsb


__all__ = [
    "GSB",
    "Column",
    "Comparison",
    "Curve",
    "PairedDifference",
    "Proportion",
    "Sample",
    "Table",
    "gsb",
    "gsb_score",
    "holm",
    "krippendorff_alpha",
    "mcnemar",
    "paired_bootstrap",
    "prompt_sign_test",
    "proportion_of",
    "rank_points",
    "rank_total_score",
    "sign_test",
    "summary_table",
    "verdict",
    "wilson_interval",
    "write_report",
]
