"""The papers' claims in miniature: `python -m results.study NAME` runs a study, or resumes it, and shows it.

    python -m results.study table1 --workers 2     makes table1.csv, table1.png and the table in README.md
    python -m results.study all --workers 2        every study; a finished run is never repeated

A run is one training with train_small.py's own functions. Its options and metrics stay in results/runs/, and
studies that ask for the same options share it. Read in order: STUDIES, runs, tables, pictures.
"""

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers
from matplotlib.figure import Figure

import sapo
import train_small

HERE = Path(__file__).parent

# The setting of the studies: a chain long enough, and few enough responses, that nothing saturates.
SETTING = dict(operands=6, iterations=40, eval_every=40)
OFF_POLICY = dict(responses=512, iterations=10, critic_warmup=1, mini_batches=16, epochs=2)
RATES = (8e-5, 1.6e-4, 3.2e-4)  # tried for each method on seed 0 (study rates); the best by accuracy_paper:
BEST = {"grpo": 1.6e-4, "gspo": 3.2e-4, "ppo": 1.6e-4, "vc-ppo": 1.6e-4, "sapo": 1.6e-4, "srpo": 1.6e-4}
UNTAUGHT = "runs/no-truth"  # made by: python -m tiny_vlm.make --truth 0 --out runs/no-truth
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of entropy, for lift

ACCURACY = ("accuracy_sampled", "accuracy_greedy", "accuracy_paper", "faithful_sampled")
AT_THE_END = ("accuracy_sampled", "accuracy_paper", "faithful_sampled")
CRITIC = ("explained_variance_last", "blame_auroc")
GROUNDED = ("perception_sampled", "lucky")
RATIO = ("mean_ratio_deviation", "max_ratio_deviation", "clip_fraction")


def setting(algo: str, **options) -> dict:
    """The options of a run. One at its default is left out, so that studies which vary others share the run.

    SAPO's always say where V is read, since the paper and its authors' code differ there.
    """
    base = dict(SETTING, algo=algo, lr=BEST[algo]) | (dict(value_at="start") if algo == "sapo" else {})
    return base | {k: v for k, v in options.items() if k in base or v != getattr(train_small.Config, k)}


class Study(NamedTuple):
    question: str
    runs: dict  # label → options of train_small.py
    seeds: int = 5
    columns: tuple = (*ACCURACY, "responses_to_80", *CRITIC)  # of the table
    curves: tuple = ("reward", *CRITIC, "entropy")  # of the picture
    against: str = ""  # the option on the picture's x axis; "": the number of responses, over a training


STUDIES = {
    "rates": Study("The learning rates tried for each method, on one seed", {
        f"{a}, {1e4 * lr:g}e-4": setting(a, lr=lr) for a in BEST for lr in RATES}, seeds=1),
    "table1": Study("SAPO Table 1: six methods on equally many responses, each at its best learning rate", {
        **{a: setting(a) for a in BEST}, "sapo, V at last": setting("sapo", value_at="last")}),
    "table2": Study("SAPO Table 2: ratio per token or per segment, off-policy: 32 updates on 512 responses", {
        **{ratio: setting("sapo", **OFF_POLICY) | dict(ratio=ratio) for ratio in ("token", "segment")},
        **{a: setting(a, **OFF_POLICY) for a in ("ppo", "grpo")}},
        columns=(*ACCURACY, "responses_to_80", *RATIO), curves=("reward", *RATIO, "entropy")),
    "table3": Study("SAPO Table 3: where segments end", {
        s: setting("sapo", segments=s) for s in train_small.SEGMENTS}),
    "table3-last": Study("The same with V before a segment's last token, where the official code reads it", {
        s: setting("sapo", segments=s, value_at="last") for s in train_small.SEGMENTS}, seeds=2),
    "figure3": Study("SAPO Fig. 3: lift of large value jumps at high entropy, by quantile (Eq. 12)", {
        a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
        columns=tuple(f"lift_{q}" for q in QUANTILES), curves=("lift_0.7", "lift_0.9", "lift_0.95")),
    "figure5": Study("SAPO Fig. 5: the share of tokens that end a segment", {
        f"{k} %": setting("sapo", top_percent=float(k)) for k in (5, 10, 20, 30, 50, 100)},
        curves=(*AT_THE_END, "blame_auroc"), against="top_percent"),
    "figure6": Study("SAPO Fig. 6: value loss", {a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
        columns=("value_loss",), curves=("value_loss", "explained_variance", "explained_variance_last")),
    "figure7": Study("SAPO Fig. 7: entropy and response length", {a: setting(a) for a in ("ppo", "sapo")},
        columns=("entropy", "response_length"), curves=("entropy", "response_length")),
    "horizon": Study("Longer chains: does the gain grow with the horizon?", {
        f"{a}, {n} operands": setting(a, operands=n) for n in (2, 4, 6, 8) for a in ("grpo", "ppo", "sapo")},
        seeds=3, curves=AT_THE_END, against="operands"),
    "critic": Study("Where V is read, and lambda", {
        **{f"{at}, lambda 0.9": setting("sapo", value_at=at) for at in ("start", "last")},
        **{f"start, lambda {x}": setting("sapo", lam=x) for x in (0.8, 0.95, 0.99, 1.0)}}, seeds=3),
    "features": Study("A critic without features: a tiny_vlm that was never taught what is true", {
        **{a: setting(a, model=UNTAUGHT) for a in ("grpo", "ppo", "vc-ppo")},
        "sapo, lambda 0.9": setting("sapo", model=UNTAUGHT),
        "sapo, lambda 0.99": setting("sapo", model=UNTAUGHT, lam=0.99)}, seeds=3),
    "srpo": Study("SRPO's open choices", {
        **{a: setting(a) for a in ("grpo", "srpo")}, "blind": setting("srpo", contrast="blind"),
        "sign-aware": setting("srpo", sign_aware=True),
        **{c: setting("srpo", corruption=c) for c in ("noise", "blank")}},
        columns=(*ACCURACY, *GROUNDED, "responses_to_80"), curves=("reward", "entropy")),
    "grounding": Study("Grounding: the question alone tells the answer, in 60 % of training only", {
        f"{a}{', prior 0.6' * (p > 0)}": setting(a, prior=p) for p in (0.0, 0.6) for a in ("grpo", "srpo")},
        columns=(*ACCURACY, *GROUNDED), curves=("reward", "entropy")),
}


# ------------------------------------------------------------------------------------------------------- runs
def command(options: dict) -> str:
    """The exact command line of a run."""
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in sorted(options.items())]
    return " ".join(["python train_small.py", *flags])


def path_of(options: dict, kind: str = "") -> Path:
    """Where the run of these options is kept. All of them decide; the name shows only the first few."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{kind or options['algo']}-{options['operands']}-s{options['seed']}-{digest}.json"
    return HERE / "runs" / name


def kept(jobs: Sequence[dict], make: Callable, workers: int = 1, kind: str = "") -> list[dict]:
    """What is kept for each job (options). Where that is nothing yet, `make(options)` makes it first."""
    paths = [path_of(options, kind) for options in jobs]
    missing = [(make, options, path) for options, path in zip(jobs, paths) if not path.exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(keep, missing, chunksize=1)
    return [json.loads(path.read_text()) for path in paths]


def keep(make: Callable, options: dict, path: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    result = make(options)
    path.write_text(json.dumps(dict(options=dict(sorted(options.items())), **result)))


def train_once(options: dict) -> dict:
    """One training: a row for the table, and the history for curves."""
    if options.get("model") == UNTAUGHT and not Path(UNTAUGHT).exists():
        raise FileNotFoundError(f"{UNTAUGHT} is missing: python -m tiny_vlm.make --truth 0 --out {UNTAUGHT}")
    start = time.time()
    with tempfile.TemporaryDirectory() as out:
        *_, history, _ = train_small.train(train_small.Config(**options, out=out), lifts)
    row = dict(command=command(options), seed=options["seed"], seconds=round(time.time() - start),
               torch=torch.__version__, transformers=transformers.__version__)
    history = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in history]
    return dict(row=summarise(history) | row, history=history)


def lifts(i, policy, critic, roll, scored, credit) -> dict:
    """Eq. 12 at several quantiles of entropy, on the iteration's own rollout."""
    def lift(q):
        return sapo.lift(scored.entropy, scored.values, roll.mask, quantile=q, resamples=1)[0]

    return {f"lift_{q}": lift(q) for q in QUANTILES} if critic else {}


def summarise(history: list[dict]) -> dict:
    """A run in one row: the last evaluation, and means over the run. Those that judge a critic are over a
    part of it, in which there is something to explain: from a third until the reward passes 85 %."""
    first, last = history[0], history[-1]
    row = {k: last[k] for k in first if k not in ("iteration", "responses", "seconds")}
    row |= {f"{k}_base": first[k] for k in row}
    row["lucky"] = last["accuracy_sampled"] - last["faithful_sampled"]
    if "value_loss" in last:
        passed = next((i for i, r in enumerate(history) if r.get("reward", 0) > 0.85), len(history))
        window = history[min(round((len(history) - 1) / 3), passed - 1) : passed]
        row |= {name: mean_of(window, name) for name in ("explained_variance", *CRITIC)}
    recent = [fmean(r["reward"] for r in history[max(1, i - 4) : i + 1]) for i in range(1, len(history))]
    row["responses_to_80"] = next((r["responses"] for r, x in zip(history[1:], recent) if x >= 0.8), None)
    for name in ("mean_ratio_deviation", "clip_fraction", "value_loss", "entropy", "response_length"):
        row[name] = mean_of(history, name)
    row["max_ratio_deviation"] = max(r.get("max_ratio_deviation", 0.0) for r in history)
    return row


def mean_of(history: list[dict], name: str) -> float | None:
    values = [row[name] for row in history if row.get(name) is not None]
    return fmean(values) if values else None


def runs_of(name: str, workers: int = 1, seeds: int = 0) -> dict:
    """label → a study's runs, one for each seed."""
    seeds = range(seeds or STUDIES[name].seeds)
    jobs = [(label, dict(options, seed=s)) for label, options in STUDIES[name].runs.items() for s in seeds]
    labels, options = zip(*jobs)
    return gather(zip(labels, kept(options, train_once, workers)))


def gather(pairs: Iterable[tuple]) -> dict:
    """x → values, of pairs (x, value); what has no value is left out."""
    points = {}
    for x, value in pairs:
        if value is not None:
            points.setdefault(x, []).append(value)
    return points


def study(name: str, workers: int = 1, seeds: int = 0) -> str:
    """Train what is missing of a study; write its CSV, picture and table; return the table."""
    runs = runs_of(name, workers, seeds)
    rows = rows_of(name, runs)
    publish(name, rows, {name: table(name, rows)})
    draw(name, lines(name, runs))
    return table(name, rows)


# ----------------------------------------------------------------------------------------------------- tables
def rows_of(name: str, runs: dict) -> list[dict]:
    """A row of a study's CSV for each run."""
    ends = ("seed", "seconds", "command", "torch", "transformers")
    columns = (*STUDIES[name].columns, *(f"{column}_base" for column in ACCURACY), *ends)
    return [dict(label=label) | {column: value_of(run, column) for column in columns}
            for label, its in runs.items() for run in its]


def value_of(run: dict, column: str):
    """A number of a run; a lift is the mean of its history."""
    return round(mean_of(run["history"], column), 4) if column.startswith("lift") else run["row"].get(column)


def interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over seeds; of up to three seeds, mean, minimum and maximum."""
    if len(values) <= 3:
        return fmean(values), min(values), max(values)
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return fmean(values), means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def cell(values: Sequence[float | None]) -> str:
    """Mean (interval) of a column over seeds; not every run has every column, or reaches 80 %."""
    known = [x for x in values if x is not None]
    if len(known) < len(values) or not known:
        return f"{len(known)} of {len(values)} runs" if known else "–"
    digits = 0 if max(known) > 30 else 3
    mean, low, high = (f"{x:.{digits}f}" for x in interval(known))
    return mean + (f" ({low}–{high})" if min(known) < max(known) else "")


def table(name: str, rows: list[dict]) -> str:
    """A study's table in Markdown; Table 1 begins with the base model."""
    base = {column: rows[0][f"{column}_base"] for column in ACCURACY}
    rows = [dict(base, label="base", seed=0), *rows] if name == "table1" else rows
    return markdown(f"results.study {name}", rows, STUDIES[name].columns)


def markdown(typed: str, rows: list[dict], columns: Sequence[str]) -> str:
    """A table: what was typed and on how many seeds, then a line for each label of the rows."""
    seeds = len({r["seed"] for r in rows})
    spread = {1: "1 seed", 2: "2 seeds: mean (min–max)", 3: "3 seeds: mean (min–max)"}
    lines = [f"`python -m {typed}`, {spread.get(seeds, f'{seeds} seeds: mean (95 % interval)')}.", "",
             "| | " + " | ".join(columns).replace("_", " ") + " |", "|---" * (len(columns) + 1) + "|"]
    for label in dict.fromkeys(r["label"] for r in rows):
        cells = [cell([r.get(column) for r in rows if r["label"] == label]) for column in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def publish(name: str, rows: list[dict], tables: dict[str, str]) -> None:
    """Write a CSV, and put tables into their places in README.md."""
    (HERE / f"{name}.csv").write_text(as_csv(rows), newline="")
    readme = HERE / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8"), tables), encoding="utf-8")


def with_tables(text: str, tables: dict[str, str]) -> str:
    """The text with each table between `<!-- table NAME -->` and `<!-- end -->`."""
    for name, its in tables.items():
        before, after = text.split(f"<!-- table {name} -->\n")
        text = f"{before}<!-- table {name} -->\n{its}\n<!-- end -->" + after.split("<!-- end -->", 1)[1]
    return text


# --------------------------------------------------------------------------------------------------- pictures
def lines(name: str, runs: dict) -> dict:
    """What a study's picture shows: panel → line → x → values over seeds."""
    against, metrics = STUDIES[name].against, STUDIES[name].curves
    if not against:  # the course of training
        return {metric: {label: gather((row["responses"], row.get(metric))
                                       for run in mine for row in run["history"])
                         for label, mine in runs.items()} for metric in metrics}
    by_algo = gather((run["options"]["algo"], run) for mine in runs.values() for run in mine)
    return {metric: {algo: gather((getattr(train_small.Config(**run["options"]), against), run["row"][metric])
                                  for run in mine) for algo, mine in by_algo.items()} for metric in metrics}


def draw(name: str, panels: dict) -> None:
    """A study's picture, from its lines: means over seeds, with their intervals shaded."""
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, its) in zip(axes, panels.items()):
        for i, (label, points) in enumerate(its.items()):
            if points:
                middle, low, high = zip(*(interval(points[at]) for at in sorted(points)))
                axis.plot(sorted(points), middle, color=f"C{i}", label=label)
                axis.fill_between(sorted(points), low, high, color=f"C{i}", alpha=0.15, lw=0)
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel(STUDIES[name].against.replace("_", " ") or "responses")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(STUDIES[name].question, fontsize=11)
    figure.savefig(HERE / f"{name}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*STUDIES, "all"])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--seeds", type=int, default=0, help="other than the study's own number")
    options = parser.parse_args()
    for name in STUDIES if options.name == "all" else [options.name]:
        print(study(name, options.workers, options.seeds), end="\n\n")


if __name__ == "__main__":
    main()
