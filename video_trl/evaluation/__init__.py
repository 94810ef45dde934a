"""From scores to claims: intervals, paired comparisons, vote and rank arithmetic, and the report a person looks at."""

from video_trl.evaluation.report import Column, Comparison, Curve, Sample, Table, summary_table, write_report
from video_trl.evaluation.statistics import (
    PairedDifference,
    gsb_score,
    paired_bootstrap,
    rank_points,
    rank_total_score,
    verdict,
    wilson_interval,
)


__all__ = [
    "Column",
    "Comparison",
    "Curve",
    "PairedDifference",
    "Sample",
    "Table",
    "gsb_score",
    "paired_bootstrap",
    "rank_points",
    "rank_total_score",
    "summary_table",
    "verdict",
    "wilson_interval",
    "write_report",
]
