"""The claims at a glance: `python -m results.forest` draws results/forest.png from the studies' CSVs.

A row a claim: the difference in accuracy at temperature 1 on held-out problems, seed by seed, and its 95 %
interval (Student's t); beside it the paper's own difference, where it has one.
"""

import csv
from statistics import fmean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure

from results.study import HERE, STUDENT, paired


class Claim(NamedTuple):
    says: str
    study: str
    ours: str  # labels of the study: the first minus the second
    theirs: str
    paper: float | None = None  # its difference, 7B: in Table 1 of six benchmarks, in 2 and 3 on Geometry3K


CLAIMS = [
    Claim("SAPO − GRPO (Table 1)", "table1", "sapo", "grpo", 0.4690 - 0.4596),
    Claim("SAPO − PPO (Table 1)", "table1", "sapo", "ppo", 0.4690 - 0.4239),
    Claim("SAPO − VC-PPO (Table 1)", "table1", "sapo", "vc-ppo", 0.4690 - 0.4420),
    Claim("SAPO − PPO, λ 0.99, the paper's", "choices", "sapo, lambda 0.99", "ppo"),
    Claim("SAPO − PPO, backbone not truth-aware", "features", "sapo, lambda 0.99", "ppo"),
    Claim("SAPO − GRPO, with filler words", "wordy-table1", "sapo", "grpo"),
    Claim("SAPO − PPO, with filler words", "wordy-table1", "sapo", "ppo"),
    Claim("SAPO − GRPO, off-policy", "table2", "segment", "grpo"),
    Claim("SAPO − PPO, off-policy, 10 seeds", "off-policy", "sapo, plain", "ppo, plain"),
    Claim("ratio: segment − token (Table 2)", "table2", "segment", "token", 0.5275 - 0.4792),
    Claim("ends: entropy − newline (Table 3)", "table3", "entropy", "newline", 0.5275 - 0.4160),
    Claim("ends: entropy − step (Table 3)", "table3", "entropy", "step", 0.5275 - 0.4160),
    Claim("ends: entropy − probability (Table 3)", "table3", "entropy", "probability", 0.5275 - 0.4443),
    Claim("SAPO − PPO, off-policy at half the rate", "openings",
          "sapo, off-policy at half the rate, none", "ppo, off-policy at half the rate, none"),
    Claim("SAPO − GRPO, 8 operands", "horizon", "sapo, 8 operands", "grpo, 8 operands"),
    Claim("SRPO − GRPO", "table1", "srpo", "grpo"),
    Claim("SRPO, sign-aware − GRPO, base model guesses", "guessing", "srpo, sign-aware", "grpo"),
]
STYLE = {"better": ("o", "#0072B2", "#0072B2"), "inconclusive": ("D", "#777777", "white"),
         "worse": ("s", "#D55E00", "#D55E00")}  # marker, edge, inside


def verdict(low: float, high: float) -> str:
    """Of a 95 % interval: above 0, below it, or neither."""
    return "better" if low > 0 else "worse" if high < 0 else "inconclusive"


def measured(claim: Claim) -> tuple[float, float, float]:
    """The mean difference, and its 95 % interval."""
    with open(HERE / f"{claim.study}.csv", newline="", encoding="utf-8") as file:
        rows = [row | dict(accuracy=float(row["accuracy_sampled"])) for row in csv.DictReader(file)]
    ours, theirs = ([row for row in rows if row["label"] == label] for label in (claim.ours, claim.theirs))
    found = paired(ours, theirs, "accuracy")
    half = STUDENT[len(found)] * stdev(found) / len(found) ** 0.5
    return fmean(found), fmean(found) - half, fmean(found) + half


def draw() -> Figure:
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axis = figure.subplots()
    for y, claim in enumerate(CLAIMS):
        mean, low, high = measured(claim)
        marker, edge, inside = STYLE[verdict(low, high)]
        axis.plot([low, high], [y, y], color=edge, lw=2)
        axis.plot(mean, y, marker, color=edge, markersize=8, markerfacecolor=inside)
        if claim.paper is not None:
            axis.plot(claim.paper, y, "|", color="black", markersize=14, markeredgewidth=2)
    for name, (marker, edge, inside) in STYLE.items():
        axis.plot([], [], marker, color=edge, label=name, markerfacecolor=inside)
    axis.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="the paper's, 7B")
    axis.set_yticks(range(len(CLAIMS)), [claim.says for claim in CLAIMS])
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference in accuracy at temperature 1, with its 95 % interval")
    axis.legend(loc="upper right")
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "forest.png", dpi=110)
