"""The papers' claims in miniature: `python -m results.study NAME` runs a study, resumes it, and shows what came out.

    python -m results.study table1 --workers 2     a table and a picture: results/table1.csv, results/table1.png
    python -m results.study credit --workers 2     where the credit goes: credit.py
    python -m results.study show-credit RUN        a picture: who is blamed for a slip (RUN: a folder of --save)
    python -m results.study all --workers 2        every study; finished runs are never repeated
    python -m results.study readme                 the README's section, from the CSVs

A run is one training with train_small.py's own functions; its metrics stay in results/runs/, and studies that ask for
the same run share it. Intervals are 95 %, bootstrapped over seeds. Read in order: STUDIES, runs, tables, pictures.
"""

import argparse
import csv
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import sapo
import toy_env
import train_small
from results import credit

HERE = Path(__file__).parent

# The setting of the studies: a chain long enough, and few enough responses, that nothing saturates.
SETTING = dict(operands=6, iterations=40, eval_every=40)
OFF_POLICY = dict(responses=512, iterations=10, critic_warmup=1, mini_batches=16, epochs=2)  # as many responses in all
RATES = (8e-5, 1.6e-4, 3.2e-4)  # swept for each method on seed 0 (study rates); all else at its best by accuracy_paper:
BEST = {"grpo": 1.6e-4, "gspo": 3.2e-4, "ppo": 1.6e-4, "vc-ppo": 1.6e-4, "sapo": 1.6e-4, "srpo": 1.6e-4}
OUTCOME = ("accuracy_sampled", "accuracy_greedy", "accuracy_paper", "faithful_sampled")
CRITIC = ("explained_variance_last", "blame_auroc")
CURVES = ("reward", "explained_variance_last", "blame_auroc", "entropy")
UNTAUGHT = "runs/no-truth"  # made by: python -m tiny_vlm.make --truth 0 --out runs/no-truth
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of entropy, for lift


def setting(algo, **options):
    """Options of a run; SAPO's say where V is read, since the paper and its authors' code differ there."""
    return dict(SETTING, algo=algo, lr=BEST[algo], **(dict(value_at="start") if algo == "sapo" else {})) | options


class Study(NamedTuple):
    question: str
    runs: dict  # label → options of train_small.py
    seeds: int = 5
    columns: tuple = (*OUTCOME, "responses_to_80", *CRITIC)
    curves: tuple = CURVES  # drawn over a training; or, with `against`, at its end
    against: str = ""  # the option that is drawn on the x axis instead of the number of responses


STUDIES = {
    "rates": Study("The learning rates tried for each method, on one seed",
                   {f"{a}, {1e4 * lr:g}e-4": setting(a, lr=lr) for a in BEST for lr in RATES}, 1),
    "table1": Study("SAPO Table 1: six methods at equal numbers of responses, each at its best learning rate",
                    {a: setting(a) for a in BEST} | {"sapo, V at last": setting("sapo", value_at="last")}),
    "table2": Study("SAPO Table 2: ratio per token or per segment, off-policy: 32 updates on 512 responses; PPO and GRPO there",
                    {"token": setting("sapo", ratio="token", **OFF_POLICY),
                     "segment": setting("sapo", ratio="segment", **OFF_POLICY),
                     "ppo": setting("ppo", **OFF_POLICY), "grpo": setting("grpo", **OFF_POLICY)},
                    columns=(*OUTCOME, "responses_to_80", "mean_ratio_deviation", "max_ratio_deviation",
                             "clip_fraction"),
                    curves=("reward", "mean_ratio_deviation", "clip_fraction", "entropy")),
    "table3": Study("SAPO Table 3: where segments end",
                    {s: setting("sapo", **({} if s == "entropy" else dict(segments=s))) for s in train_small.SEGMENTS}),
    "table3-last": Study("The same with V before a segment's last token, where the official code reads it",
                         {s: setting("sapo", value_at="last", **({} if s == "entropy" else dict(segments=s)))
                          for s in train_small.SEGMENTS}, 2),
    "figure3": Study("SAPO Fig. 3: lift of large value jumps at high-entropy tokens (Eq. 12), by quantile of entropy",
                     {a: setting(a) for a in ("ppo", "vc-ppo", "sapo")}, columns=tuple(f"lift_{q}" for q in QUANTILES)),
    "figure5": Study("SAPO Fig. 5: the share of tokens that end a segment",
                     {f"{k} %": setting("sapo", **({} if k == 30 else dict(top_percent=float(k))))
                      for k in (5, 10, 20, 30, 50, 100)},
                     curves=("accuracy_sampled", "accuracy_paper", "faithful_sampled", "blame_auroc"), against="top_percent"),
    "figure6": Study("SAPO Fig. 6: value loss", {a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
                     columns=("value_loss",), curves=("value_loss", "explained_variance", "explained_variance_last")),
    "figure7": Study("SAPO Fig. 7: entropy and response length", {a: setting(a) for a in ("ppo", "sapo")},
                     columns=("entropy", "response_length"), curves=("entropy", "response_length")),
    "horizon": Study("Longer chains: does the gain grow with the horizon?",
                     {f"{a}, {n} operands": setting(a, operands=n)
                      for n in (2, 4, 6, 8) for a in ("grpo", "ppo", "sapo")},
                     3, curves=("accuracy_sampled", "accuracy_paper", "faithful_sampled"), against="operands"),
    "critic": Study("Where V is read, and lambda",
                    {"start, lambda 0.9": setting("sapo"), "last, lambda 0.9": setting("sapo", value_at="last")}
                    | {f"start, lambda {x}": setting("sapo", lam=x) for x in (0.8, 0.95, 0.99, 1.0)},
                    3),
    "features": Study("A critic without features: the same from a tiny_vlm that was never taught what is true",
                      {name: setting(name.split(",")[0], model=UNTAUGHT, **more) for name, more in
                       {"grpo": {}, "ppo": {}, "vc-ppo": {}, "sapo, lambda 0.9": {}, "sapo, lambda 0.99": dict(lam=0.99)}
                       .items()}, 3),
    "srpo": Study("SRPO's open choices",
                  {"grpo": setting("grpo"), "srpo": setting("srpo"), "blind": setting("srpo", contrast="blind"),
                   "sign-aware": setting("srpo", sign_aware=True)}
                  | {c: setting("srpo", corruption=c) for c in ("noise", "blank")},
                  columns=(*OUTCOME, "perception_sampled", "lucky", "responses_to_80"), curves=("reward", "entropy")),
    "grounding": Study("Grounding: the question alone tells the answer in 60 % of training, never in evaluation",
                       {f"{a}{', prior 0.6' if p else ''}": setting(a, **({"prior": p} if p else {}))
                        for p in (0.0, 0.6) for a in ("grpo", "srpo")},
                       columns=(*OUTCOME, "perception_sampled", "lucky"),
                       curves=("reward", "entropy")),
}


# ------------------------------------------------------------------------------------------------------------ runs


def command(options):
    """The exact command line of a run."""
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in sorted(options.items())]
    return " ".join(["python train_small.py", *flags])


def stored(name, make):
    """The JSON of results/runs/NAME.json; what `make()` returns, if there is none yet."""
    path = HERE / "runs" / f"{name}.json"
    if not path.exists():
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        result = make()
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def run(options):
    """One training: dict of row, for a table, and history, for curves."""
    name = command(options).removeprefix("python train_small.py ").replace("--", "").translate(str.maketrans(" /", "--"))
    return stored(name, lambda: train_once(options))


def train_once(options):
    start = time.time()
    with tempfile.TemporaryDirectory() as out:
        config = train_small.complete(train_small.Config(**options, out=out))
        *_, history, (_, after) = train_small.train(config, lifts)
    row = dict(command=command(options), seed=options["seed"], seconds=round(time.time() - start),
               torch=torch.__version__, transformers=transformers.__version__)
    history = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in history]
    return dict(row=summarise(config, history) | lucky_by_kind(after) | row, history=history)


def lifts(i, policy, critic, roll, scored, credit):
    """Eq. 12 at several quantiles of entropy, on the iteration's own rollout."""
    if critic is None:
        return {}
    lift = {q: sapo.lift(scored.entropy, scored.values, roll.mask, quantile=q, resamples=1)[0] for q in QUANTILES}
    return {f"lift_{q}": x for q, x in lift.items()}


def lucky_by_kind(roll):
    """Shares of responses that are right in spite of a false statement, by the kind of the first one."""
    errors = [toy_env.first_error(p, text) for p, text, r in zip(roll.problems, roll.texts, roll.rewards()) if r == 1]
    kinds = [error.kind for error in errors if error]
    return {f"lucky_{kind}": kinds.count(kind) / len(roll.texts) for kind in ("reading", "operand", "result")}


def summarise(config, history):
    """A run in one row: the last checkpoint's evaluation, and means over the run."""
    first, last = history[0], history[-1]
    row = {k: last[k] for k in first if k not in ("iteration", "responses", "seconds")}
    row |= {f"{k}_base": first[k] for k in row}
    row["lucky"] = last["accuracy_sampled"] - last["faithful_sampled"]
    closing = train_small.summary(config, history).items()
    row |= {name.split(",")[0]: None if after != after else after for name, (before, after) in closing if before is None}
    recent = [statistics.fmean(r["reward"] for r in history[max(1, i - 4) : i + 1]) for i in range(1, len(history))]
    row["responses_to_80"] = next((r["responses"] for r, mean in zip(history[1:], recent) if mean >= 0.8), None)
    for name in ("mean_ratio_deviation", "clip_fraction", "value_loss", "entropy", "response_length"):
        values = [r[name] for r in history if r.get(name) is not None]
        row[name] = statistics.fmean(values) if values else None
    row["max_ratio_deviation"] = max((r.get("max_ratio_deviation", 0.0) for r in history), default=None)
    return row


def study(name, workers, seeds=None):
    """Run what is missing of a study; write its CSV and pictures; return its table as text."""
    _, methods, default, columns, *_ = STUDIES[name]
    if name == "features" and not Path(UNTAUGHT).exists():
        raise SystemExit(f"{UNTAUGHT} is missing: python -m tiny_vlm.make --truth 0 --out {UNTAUGHT}")
    jobs = [dict(options, seed=seed) for seed in range(seeds or default) for options in methods.values()]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = dict(zip(map(command, jobs), pool.imap(run, jobs, chunksize=1)))
    groups = {label: [results[command(dict(options, seed=seed))] for seed in range(seeds or default)]
              for label, options in methods.items()}
    with open(HERE / f"{name}.csv", "w", newline="") as file:
        bases = [f"{c}_base" for c in OUTCOME]
        names = ["label", *columns, *bases, "seed", "seconds", "command", "torch", "transformers"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result["row"] | dict(label=label, **means(result["history"], columns))
                         for label, runs in groups.items() for result in runs)
    histories = {label: [result["history"] for result in runs] for label, runs in groups.items()}
    if name == "figure3":
        figure3(histories)
    elif STUDIES[name].against:
        outcomes(name, {label: [result["row"] for result in runs] for label, runs in groups.items()})
    else:
        picture(name, histories)
    return table(name)


def means(history, columns):
    """Means of lift over a run."""
    of = {c: [row[c] for row in history if row.get(c) is not None] for c in columns if c.startswith("lift")}
    return {c: round(statistics.fmean(values), 4) for c, values in of.items()}


# ---------------------------------------------------------------------------------------------------------- tables


def interval(values, resamples=2000):
    """Mean and 95 % bootstrap interval over seeds."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.fmean(values), means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def table(name):
    """A study's table in Markdown, from its CSV."""
    with open(HERE / f"{name}.csv") as file:
        rows = list(csv.DictReader(file))
    labels, seeds = list(dict.fromkeys(r["label"] for r in rows)), len({r["seed"] for r in rows})
    shown = [c for c in STUDIES[name].columns if any(r[c] for r in rows)]
    fewer = "" if seeds == STUDIES[name].seeds else f" --seeds {seeds}"
    lines = [f"`python -m results.study {name}{fewer}`, {seeds} seed{'s' * (seeds > 1)}: mean (95 % interval).", "",
             "| | " + " | ".join(c.replace("_", " ") for c in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    if name == "table1":
        bases = [rows[0].get(f"{column}_base") for column in shown]
        lines.append("| base | " + " | ".join(f"{float(x):.3f}" if x else "" for x in bases) + " |")
    for label in labels:
        mine = [r for r in rows if r["label"] == label]
        lines.append(f"| {label} | " + " | ".join(cell([r[c] for r in mine]) for c in shown) + " |")
    return "\n".join(lines)


def cell(texts):
    """Mean (interval) of a column over seeds; not every run has every column, or reaches 80 %."""
    values = [float(x) for x in texts if x not in ("", None)]
    if len(values) < len(texts):
        return "–" if not values else f"{len(values)} of {len(texts)} runs"
    digits = 0 if max(values) > 30 else 3
    mean, low, high = (f"{x:.{digits}f}" for x in interval(values))
    return mean + (f" ({low}–{high})" if min(values) < max(values) else "")


MARKS = "<!-- results: python -m results.study readme -->", "<!-- end of results -->"


def with_results(text):
    """README text with its results section made anew from the CSVs: three tables open, the others folded."""
    before, rest = text.split(MARKS[0])
    blocks = [block(STUDIES[name].question, table(name), name, opened=name in ("table1", "table2", "horizon"))
              for name in STUDIES if (HERE / f"{name}.csv").exists()]
    if (HERE / "credit.csv").exists():
        blocks.append(block("Where the credit goes: blame, values, borders, roles", credit.table(), "credit_study"))
    return before + "\n\n".join([MARKS[0], *blocks, MARKS[1]]) + rest.split(MARKS[1])[1]


def block(title, tables, picture, opened=False):
    return (f"<details{' open' * opened}>\n<summary><b>{title}</b></summary>\n\n{tables}\n\n"
            f"![{picture}](results/{picture}.png)\n\n</details>")


# -------------------------------------------------------------------------------------------------------- pictures


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def band(axis, x, at, i, label):
    """A line of means, with the interval (mean, low, high) shaded."""
    middle, low, high = zip(*at)
    axis.plot(x, middle, color=f"C{i}", label=label)
    axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, lw=0)


def panels(metrics, x):
    """A figure with one panel for each metric, and its axes."""
    size = (4.2 * len(metrics), 3.6)
    figure, axes = pyplot().subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel(x.replace("_", " "))
        axis.grid(alpha=0.3)
    return figure, axes[0]


def finish(figure, name):
    figure.suptitle(STUDIES[name].question, fontsize=11)
    figure.savefig(HERE / f"{name}.png", dpi=100)
    pyplot().close(figure)


def picture(name, groups):
    """The course of training: mean over seeds against responses, with the range of the seeds shaded."""
    metrics = STUDIES[name].curves
    figure, axes = panels(metrics, "responses")
    for axis, metric in zip(axes, metrics):
        for i, (label, histories) in enumerate(groups.items()):
            points = {}
            for row in (row for history in histories for row in history if row.get(metric) is not None):
                points.setdefault(row["responses"], []).append(row[metric])
            if not points:
                continue
            x, ys = zip(*sorted(points.items()))
            band(axis, x, [(statistics.fmean(y), min(y), max(y)) for y in ys], i, label)
    axes[0].legend(fontsize=7)
    finish(figure, name)


def outcomes(name, groups):
    """The end of training against an option: mean over seeds, with its interval shaded, one line per algorithm."""
    _, methods, _, _, metrics, option = STUDIES[name]
    figure, axes = panels(metrics, option)
    for axis, metric in zip(axes, metrics):
        for i, algo in enumerate(dict.fromkeys(options["algo"] for options in methods.values())):
            points = sorted((getattr(train_small.Config(**options), option), interval(values))
                            for label, options in methods.items() if options["algo"] == algo
                            if (values := [row[metric] for row in groups[label] if row[metric] is not None]))
            band(axis, *zip(*points), i, algo)
    axes[0].legend(fontsize=7)
    finish(figure, name)


def figure3(groups):
    """SAPO Fig. 3: lift against the quantile of entropy, early, middle and late in training; mean and interval."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), layout="constrained", sharey=True)
    for axis, (label, histories) in zip(axes, groups.items()):
        third = -(-(len(histories[0]) - 1) // 3)
        for i, when in enumerate(("early", "middle", "late")):
            rows = [history[1:][i * third : (i + 1) * third] for history in histories]
            at = [interval([means(part, [f"lift_{q}"])[f"lift_{q}"] for part in rows]) for q in QUANTILES]
            band(axis, QUANTILES, at, i, when)
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xlabel="quantile of entropy", title=f"critic of {label}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("lift of large value jumps (Eq. 12)")
    axes[0].legend()
    finish(figure, "figure3")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*STUDIES, "credit", "all", "show-credit", "readme"])
    parser.add_argument("folder", nargs="?", help="for show-credit: a folder written by train_small.py --save")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--seeds", type=int, help="other than the study's own number")
    options = parser.parse_args()
    if options.name == "show-credit":
        credit.show_credit(options.folder, HERE / "credit.png")
        return
    if options.name == "readme":
        readme = HERE.parent / "README.md"
        readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in [*STUDIES, "credit"] if options.name == "all" else [options.name]:
        if name == "credit":
            print(credit.credit(options.workers, options.seeds))
        else:
            print(study(name, options.workers, options.seeds), end="\n\n")


if __name__ == "__main__":
    main()
