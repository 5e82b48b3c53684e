"""The pictures of the studies: `python -m results.pictures` draws all, `… NAME` one, from the committed runs.

One hand: a fixed colour and marker for each method, SAPO thick; a dot is a seed, a bar the mean over seeds, a
band its 95 % bootstrap interval. forest.png is drawn by results/forest.py, credit.png by results/credit.py,
curves.png by support/curves.py.
"""

import sys
from collections.abc import Callable, Sequence
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results import forest, study
from results.studies import CLIPS, QUANTILES, STUDIES
from results.study import COLLAPSED, HERE, interval, paired, runs_of
from support.run_folder import expect, one_line

COLOURS = {"sapo": "#0072B2", "ppo": "#D55E00", "vc-ppo": "#CC79A7", "grpo": "#555555", "srpo": "#009E73",
           "gspo": "#E69F00"}  # Okabe and Ito's, which colour-blind people can tell apart
NAMES = {"sapo": "SAPO", "ppo": "PPO", "vc-ppo": "VC-PPO", "grpo": "GRPO", "srpo": "SRPO", "gspo": "GSPO"}
AXES = {"accuracy_sampled": "accuracy at T = 1", "faithful_sampled": "faithful: right, no false statement",
        "reward": "reward", "value_loss": "value loss", "entropy": "entropy, nats a token"}
CLIP_PANELS = (("", "early_reward"), (", twice the rate", "early_reward"),  # world, and what of it
               (", twice the rate", "largest_fall"), (", filler words", "largest_fall"))
PICTURES = {}  # name → what draws it


def picture(function: Callable) -> Callable:
    PICTURES[function.__name__] = function
    return function


def sheet(n: int, width: float = 9, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    """A figure of n panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, n, squeeze=False)[0]
    for axis in panels:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, panels


def hand(label: str) -> dict:
    """Of a line: the colour and the width of the method that a label begins with."""
    algo = label.split(",")[0]
    return dict(color=COLOURS.get(algo, "black"), lw=2.5 if algo == "sapo" else 1.3)


def name_of(label: str) -> str:
    """A label, for people."""
    algo, *rest = label.split(", ", 1)
    return ", ".join([NAMES.get(algo, algo), *rest]).replace("lambda", "λ")


# ------------------------------------------------------------------------------------------------------ parts
def course(axis: Axes, runs: dict, metric: str, labels: Sequence[str], warmup: int = 0) -> None:
    """Of a training: means over seeds with their intervals, each line named where it ends; warm-up shaded."""
    for label in labels:
        points = study.gather((row["responses"], row.get(metric)) for run in runs[label]
                              for row in run["history"])
        x = sorted(points)
        middle, low, high = zip(*(interval(points[at]) for at in x))
        axis.plot(x, middle, **hand(label), label=name_of(label))
        axis.fill_between(x, low, high, color=hand(label)["color"], alpha=0.12, lw=0)
    if warmup:
        axis.axvspan(0, warmup, color="black", alpha=0.06, lw=0)
        axis.text(warmup / 2, 0.97, "warm-up", ha="center", va="top", fontsize=7,
                  transform=axis.get_xaxis_transform())
    axis.set(xlabel="responses", ylabel=AXES.get(metric, metric))


def strip(axis: Axes, groups: dict, colours: dict = {}) -> None:
    """A row for each label → values: a dot a seed, a bar for the mean. colours: other than the method's."""
    for y, (label, values) in enumerate(groups.items()):
        colour = colours.get(label, hand(label)["color"])
        axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axis.plot([fmean(values)], [y], "|", color=colour, markersize=18, markeredgewidth=2.5)
    axis.set_yticks(range(len(groups)), [*map(name_of, groups)])
    axis.set_ylim(len(groups) - 0.5, -0.5)


def ends_of(runs: dict, labels: Sequence[str], column: str) -> dict:
    """Label → a column of each run's row."""
    return {label: [run["row"][column] for run in runs[label]] for label in labels}


def six_methods(name: str, labels: Sequence[str], warmup: int = 640) -> Figure:
    """A training's reward, and where it ends."""
    runs, (figure, panels) = runs_of(name, workers=0), sheet(3, 12)
    course(panels[0], runs, "reward", labels, warmup)
    for axis, column in zip(panels[1:], ("accuracy_sampled", "faithful_sampled")):
        strip(axis, ends_of(runs, labels, column))
        axis.set_xlabel(AXES[column])
    panels[2].set_yticklabels([])
    panels[0].legend(fontsize=7, loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------- pictures
@picture
def table1() -> Figure:
    return six_methods("table1", ("sapo", "ppo", "vc-ppo", "grpo", "srpo", "gspo"))


@picture
def wordy_table1() -> Figure:
    return six_methods("wordy-table1", ("sapo", "ppo", "vc-ppo", "grpo", "srpo", "gspo"))


@picture
def features() -> Figure:
    return six_methods("features", ("sapo, lambda 0.99", "ppo", "vc-ppo", "grpo"))


@picture
def guessing() -> Figure:
    runs, (figure, panels) = runs_of("guessing", workers=0), sheet(2, 10, 3)
    labels = ("grpo", "srpo", "srpo, sign-aware", "ppo", "sapo")
    for axis, column in zip(panels, ("accuracy_sampled", "perception_sampled")):
        strip(axis, ends_of(runs, labels, column))
        axis.set_xlabel({"perception_sampled": "cells read right"}.get(column) or AXES[column])
    panels[1].set_yticklabels([])
    return figure


@picture
def table3() -> Figure:
    """Where segments end: accuracy and faithful responses, with and without filler words."""
    figure, panels = sheet(2, 10, 3.4)
    worlds = {"table3": "", "wordy-table3": ", filler words"}
    for axis, column in zip(panels, ("accuracy_sampled", "faithful_sampled")):
        groups = {f"{place}{words}": its for name, words in worlds.items()
                  for place, its in ends_of(runs_of(name, workers=0), STUDIES[name].runs, column).items()}
        ours = {label for label in groups if label.startswith("entropy")}
        strip(axis, groups, {label: COLOURS["sapo"] if label in ours else "#777777" for label in groups})
        axis.set_xlabel(AXES[column])
    panels[1].set_yticklabels([])
    return figure


@picture
def figure3() -> Figure:
    """Lift by quantile, and through training at the top 5 %."""
    runs, (figure, panels) = runs_of("figure3", workers=0), sheet(2)
    for label, its in runs.items():
        points = {q: [study.value_of(run, f"lift_{q}") for run in its] for q in QUANTILES}
        middle, low, high = zip(*map(interval, points.values()))
        panels[0].plot(QUANTILES, middle, **hand(label), label=name_of(label))
        panels[0].fill_between(QUANTILES, low, high, color=hand(label)["color"], alpha=0.12, lw=0)
    panels[0].set(xlabel="quantile of entropy above which a token is uncertain", ylabel="lift (Eq. 12)")
    course(panels[1], runs, "lift_0.95", runs, 640)
    panels[1].set_ylabel("lift at the top 5 %")
    for axis in panels:
        axis.axhline(1, color="black", lw=0.8)
    panels[0].legend(fontsize=8, loc="upper left")
    return figure


@picture
def figure5() -> Figure:
    """The share of tokens that end a segment, with and without filler words."""
    figure, panels = sheet(2)
    for axis, column in zip(panels, ("accuracy_sampled", "faithful_sampled")):
        for name, words, style in (("figure5", "without filler words", "-"),
                                   ("wordy-figure5", "with filler words", "--")):
            runs = runs_of(name, workers=0)
            points = {float(label[:-2]): its for label, its in ends_of(runs, runs, column).items()}
            axis.plot([*points], [*map(median, points.values())], style, color=COLOURS["sapo"], lw=2,
                      label=f"{words}, median")
            for x, its in points.items():
                axis.plot([x] * len(its), its, "o" if style == "-" else "x", color=COLOURS["sapo"], alpha=0.5,
                          markersize=5)
        axis.set(xlabel="tokens that end a segment, %", ylabel=AXES[column], xscale="log")
        axis.set_xticks([5, 10, 20, 30, 50, 100], [5, 10, 20, 30, 50, 100])
        axis.minorticks_off()
    panels[0].legend(fontsize=8, loc="lower right")
    return figure


@picture
def figure6() -> Figure:
    """Fig. 6 and 7: value loss and entropy through training."""
    runs, (figure, panels) = runs_of("figure6", workers=0), sheet(2)
    for axis, metric in zip(panels, ("value_loss", "entropy")):
        course(axis, runs, metric, runs, 640)
    panels[0].legend(fontsize=8, loc="upper right")
    return figure


@picture
def horizon() -> Figure:
    """Accuracy over the length of the chain."""
    figure, panels = sheet(2)
    for axis, name, title in ((panels[0], "horizon", "without filler words"),
                              (panels[1], "wordy-horizon", "with filler words")):
        by_algo = {}
        for label, its in runs_of(name, workers=0).items():
            algo, operands = label.split(", ")
            by_algo.setdefault(algo, {})[int(operands[0])] = [run["row"]["accuracy_sampled"] for run in its]
        for algo, points in by_algo.items():
            middle, low, high = zip(*map(interval, points.values()))
            axis.plot([*points], middle, "o-", **hand(algo), label=name_of(algo), markersize=4)
            axis.fill_between([*points], low, high, color=COLOURS[algo], alpha=0.12, lw=0)
        axis.set(xlabel="operands", ylabel=AXES["accuracy_sampled"], title=title, ylim=(0.6, 1.0))
        axis.set_xticks([2, 4, 6, 8])
    panels[0].legend(fontsize=8, loc="lower left")
    return figure


@picture
def off_policy() -> Figure:
    """SAPO less PPO, a dot a seed. A collapsed run is a cross at the edge."""
    figure, (axis,) = sheet(1, 9, 3.6)
    runs = runs_of("openings", workers=0)
    edge = -0.13
    for y, pair in enumerate(STUDIES["openings"].pairs):
        ours, theirs = ([run["row"] for run in runs.get(label, [])] for label in pair)
        found = paired(ours, theirs, "accuracy_sampled")
        shown = [x for x in found if x > edge]
        axis.plot(shown, [y] * len(shown), "o", color=COLOURS["sapo"], alpha=0.5, markersize=5)
        axis.plot([median(found)], [y], "|", color=COLOURS["sapo"], markersize=18, markeredgewidth=2.5)
        axis.plot([edge] * (len(found) - len(shown)), [y] * (len(found) - len(shown)), "X",
                  color=forest.STYLE["worse"][1], markersize=9)
    axis.axvline(0, color="black", lw=0.8)
    heads = [ours.removeprefix("sapo, ").split(", ") for ours, _ in STUDIES["openings"].pairs]
    heads = [f"{policy}, {kind.replace('none', 'no')} filler words" for policy, kind in heads]
    axis.set_yticks(range(y + 1), heads)
    axis.set(ylim=(y + 0.5, -0.5), xlim=(edge - 0.01, 0.14),
             xlabel="accuracy at T = 1: SAPO less PPO (bar: the median; cross: SAPO's run collapsed)")
    return figure


@picture
def clip() -> Figure:
    """Of each clip, how fast its runs learn and how far their reward falls: a dot a run, a cross one that
    collapsed."""
    runs, (figure, panels) = runs_of("clip", workers=0), sheet(4, 13, 3.6)
    labels = [*CLIPS]
    for axis, (world, column) in zip(panels, CLIP_PANELS):
        for y, label in enumerate(labels):
            colour = COLOURS["ppo" if label.startswith("ppo") else "sapo" if "segment" in label else "grpo"]
            for run in runs.get(label + world, []):
                look = dict(marker="o", color=colour, alpha=0.6)
                if run["row"]["accuracy_sampled"] < COLLAPSED:
                    look = dict(marker="X", color="black", markersize=8)
                axis.plot(study.value_of(run, column), y, **look)
        axis.axhline(labels.index("segment, 0.2") - 0.5, color="black", linewidth=0.8)  # above it: narrow
        axis.set_yticks(range(len(labels)), [*map(name_of, labels)] if axis is panels[0] else [])
        axis.set(xlabel=column.replace("_", " "), title=(world or ", the rate of Table 1")[2:],
                 ylim=(len(labels) - 0.5, -0.5))
    return figure


def main() -> None:
    asked = [name.replace("-", "_") for name in sys.argv[1:]]
    with one_line("results.pictures", ValueError):
        for name in asked:
            expect(name in PICTURES, "NAME", name.replace("_", "-"), f"one of {', '.join(PICTURES)}")
    for name in asked or PICTURES:
        PICTURES[name]().savefig(HERE / f"{name.replace('_', '-')}.png", dpi=110)


if __name__ == "__main__":
    main()
