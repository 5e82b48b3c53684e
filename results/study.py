"""The papers' claims in miniature: `python -m results.study NAME` runs a study, resumes it, and shows what came out.

    python -m results.study table1 --workers 2     a table: results/table1.csv, results/table1.png
    python -m results.study show-credit RUN        a picture: who is blamed for a slip (RUN: a folder of --save)
    python -m results.study all                    every study; finished runs are never repeated
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
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import sapo
import srpo
import toy_env
import train_small

HERE = Path(__file__).parent
ALGORITHMS = ["grpo", "gspo", "ppo", "vc-ppo", "sapo", "srpo"]
STUDIES = {  # name → (what it asks, {label: options of train_small.py}, seeds)
    "table1": ("SAPO Table 1: six methods at equal numbers of responses", {a: dict(algo=a) for a in ALGORITHMS}, 5),
    "table2": ("SAPO Table 2: ratio per token or per segment, updates made off-policy (3 epochs, 8 mini-batches)",
               {r: dict(algo="sapo", ratio=r, epochs=3, mini_batches=8) for r in ("token", "segment")}, 5),
    "table3": ("SAPO Table 3: where segments end",
               {s: dict(algo="sapo", segments=s) for s in ("newline", "step", "probability", "entropy")}, 5),
    "figure5": ("SAPO Fig. 5: the share of tokens that end a segment",
                {f"{k} %": dict(algo="sapo", top_percent=float(k)) for k in (5, 10, 20, 30, 50, 100)}, 5),
    "horizon": ("Longer chains: does the gain grow with the horizon?",
                {f"{a}, {n} operands": dict(algo=a, operands=n)
                 for n in (2, 4, 6, 8) for a in ("grpo", "ppo", "sapo")}, 3),
    "critic": ("What the critic needs: where V is read, and lambda",
               {"start": dict(algo="sapo"), "last": dict(algo="sapo", value_at="last")}
               | {f"lambda {x}": dict(algo="sapo", lam=x) for x in (0.9, 0.95, 1.0)}, 3),
    "srpo": ("SRPO's open choices",
             {"grpo": dict(algo="grpo"), "srpo": dict(algo="srpo"), "blind": dict(algo="srpo", contrast="blind"),
              "sign-aware": dict(algo="srpo", sign_aware=True)}
             | {c: dict(algo="srpo", corruption=c) for c in ("noise", "blank")}, 5),
}
COLUMNS = ["accuracy_sampled", "accuracy_greedy", "accuracy_paper", "faithful_sampled", "responses_to_80",
           "explained_variance", "explained_variance_last", "blame_auroc"]


# ------------------------------------------------------------------------------------------------------------ runs


def command(options):
    """The exact command line of a run."""
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in sorted(options.items())]
    return " ".join(["python train_small.py", *flags])


def run(options):
    """One training, or its stored result if it has been done. Returns (row, history)."""
    name = command(options).removeprefix("python train_small.py ").replace("--", "").replace(" ", "-")
    path = HERE / "runs" / f"{name}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        return stored["row"], stored["history"]
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    start = time.time()
    with tempfile.TemporaryDirectory() as out:
        config = train_small.complete(train_small.Config(**options, out=out))
        *_, history, _ = train_small.train(config)
    final = {k: v for k, v in history[-1].items() if k.startswith(("accuracy", "faithful_"))}
    closing = train_small.summary(config, history)
    critic = {name.split(",")[0]: after for name, (before, after) in closing.items() if before is None}
    reached = (r["responses"] for r in history if r.get("accuracy_sampled", 0) >= 0.8)
    row = final | critic | dict(
        responses_to_80=next(reached, None), command=command(options), seed=options["seed"],
        seconds=round(time.time() - start), torch=torch.__version__, transformers=transformers.__version__,
    )
    history = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in history]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(row=row, history=history)))
    return row, history


def study(name, workers, seeds=None):
    """Run what is missing of a study; write its CSV and picture; return its table as text."""
    question, methods, default = STUDIES[name]
    jobs = [dict(options, seed=seed) for seed in range(seeds or default) for options in methods.values()]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = dict(zip(map(command, jobs), pool.imap(run, jobs, chunksize=1)))
    groups = {label: [results[command(dict(options, seed=seed))] for seed in range(seeds or default)]
              for label, options in methods.items()}
    with open(HERE / f"{name}.csv", "w", newline="") as file:
        names = ["label", *COLUMNS, "seed", "seconds", "command", "torch", "transformers"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(dict(row, label=label) for label, rows in groups.items() for row, _ in rows)
    picture(name, {label: [history for _, history in rows] for label, rows in groups.items()})
    return table(name)


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
    shown = [c for c in COLUMNS if any(r[c] for r in rows)]
    how = f"{seeds} seed{'s' * (seeds > 1)}, `python -m results.study {name} --seeds {seeds}`"
    lines = [f"**{STUDIES[name][0]}** ({how})", "",
             "| | " + " | ".join(c.replace("_", " ") for c in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for label in labels:
        cells = []
        for column in shown:
            values = [float(r[column]) for r in rows if r["label"] == label and r[column]]
            if len(values) < seeds:  # not every run has it: no critic, or 80 % never reached
                cells.append("–" if not values else f"{len(values)} of {seeds} runs")
                continue
            mean, low, high = interval(values)
            digits = 0 if column.startswith("responses") else 3
            cells.append(f"{mean:.{digits}f}" + (f" ({low:.{digits}f}–{high:.{digits}f})" if seeds > 1 else ""))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


MARKS = "<!-- results: python -m results.study readme -->", "<!-- end of results -->"


def with_results(text):
    """README text with its results section made anew from the CSVs."""
    before, rest = text.split(MARKS[0])
    tables = [table(name) + f"\n\n![{name}](results/{name}.png)" for name in STUDIES if (HERE / f"{name}.csv").exists()]
    return before + "\n\n".join([MARKS[0], *tables, MARKS[1]]) + rest.split(MARKS[1])[1]


# -------------------------------------------------------------------------------------------------------- pictures


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def picture(name, groups, metrics=("accuracy_sampled", "reward", "blame_auroc", "explained_variance_last")):
    """Mean over seeds against responses, with the range of the seeds shaded."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.6), layout="constrained")
    for axis, metric in zip(axes, metrics):
        for i, (label, histories) in enumerate(groups.items()):
            columns = [[(r["responses"], r[metric]) for r in h if r.get(metric) is not None] for h in histories]
            columns = [c for c in columns if len(c) == len(columns[0]) and c]
            if not columns:
                continue
            x, ys = [p[0] for p in columns[0]], list(zip(*([p[1] for p in c] for c in columns)))
            axis.plot(x, [statistics.fmean(y) for y in ys], color=f"C{i}", label=label)
            axis.fill_between(x, [min(y) for y in ys], [max(y) for y in ys], color=f"C{i}", alpha=0.15, lw=0)
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel("responses")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(STUDIES[name][0], fontsize=11)
    figure.savefig(HERE / f"{name}.png", dpi=100)
    plt.close(figure)


def show_credit(folder, path):
    """One real response with one slip, its tokens coloured by the advantage that each method gives them: the picture of
    SAPO's Fig. 1, from a run. All rows see the same response, group and critic."""
    config = train_small.complete(train_small.Config(**json.loads((Path(folder) / "config.json").read_text())))
    config = replace(config, model=str(Path(folder) / "model"), algo="sapo")
    policy, processor, critic, _ = train_small.load(config)
    critic.load_state_dict(torch.load(Path(folder) / "critic.pt", weights_only=True))
    torch.manual_seed(0)
    problems = [p for p in train_small.eval_problems(config)[:64] for _ in range(8)]
    roll = train_small.rollout(policy, processor, problems, config.max_tokens)
    rewards, mask = roll.rewards(), roll.mask
    scored = train_small.score_all(config, policy, None, critic, roll)
    chosen, slip = one_slip(roll, rewards)
    ends = {"PPO": sapo.ends_every_token(mask), "SAPO": train_small.segment_ends(config, roll, scored)}
    token_rewards = sapo.kl_rewards(rewards, scored.log_probs, scored.log_probs, mask, 0.0)
    group = srpo.group_advantages(rewards, 8)
    weights = train_small.role_weights(config, policy, processor, roll, scored, group)
    rows = {"GRPO": srpo.srpo_advantages(group, torch.ones_like(weights)), "SRPO": srpo.srpo_advantages(group, weights)}
    for name, lam in (("PPO", 0.95), ("SAPO", config.lam)):
        rows[name] = sapo.segment_gae(token_rewards, scored.values, ends[name], mask, 1.0, lam)[0]
    rows = {name: rows[name][chosen] for name in ("GRPO", "SRPO", "PPO", "SAPO")}
    draw_credit(roll, chosen, slip, rows, ends["SAPO"][chosen], path)


def one_slip(roll, rewards):
    """The first wrong response with exactly one false statement, a group with both outcomes, and most still to come."""
    for i, (problem, text) in enumerate(zip(roll.problems, roll.texts)):
        false = toy_env.false_statements(problem, text)
        mixed = 0 < rewards[i // 8 * 8 : i // 8 * 8 + 8].sum() < 8
        early = len(false) == 1 and false[0].kind == "result" and false[0].end < 0.7 * len(text)
        if rewards[i] == 0 and mixed and early:
            return i, false[0]
    raise SystemExit("no wrong response with a single early slip: try a run with a longer chain or fewer iterations")


def draw_credit(roll, chosen, slip, rows, ends, path):
    plt = pyplot()
    pieces, problem = roll.pieces[chosen], roll.problems[chosen]
    figure, axes = plt.subplots(len(rows), 1, figsize=(15, 1.0 * len(rows) + 0.6), layout="constrained")
    for axis, (name, advantages) in zip(axes, rows.items()):
        scale, x, character, box = float(advantages.abs().max()), 0.0, 0, []
        for piece, advantage, end in zip(pieces, advantages.tolist(), ends.tolist()):
            shown, level = piece.strip(" ").replace("\n", "↵"), advantage / scale
            width = len(shown) + 0.8
            axis.barh(0, width, left=x, height=1, color=plt.get_cmap("RdBu")(0.5 + 0.4 * level))
            axis.text(x + width / 2, 0, shown, ha="center", va="center", fontsize=10,
                      color="white" if abs(level) > 0.8 else "black")
            if slip.start < character + len(piece) and character < slip.end:
                box += [x, x + width]
            x, character = x + width, character + len(piece)
            if name == "SAPO" and end:
                axis.plot([x, x], [-0.5, 0.5], color="black", lw=1)
        axis.add_patch(plt.Rectangle((box[0], -0.5), box[-1] - box[0], 1, fill=False, lw=2.5, zorder=3))
        axis.set(xlim=(0, x), ylim=(-0.55, 0.55), xticks=[], yticks=[], ylabel=name)
        axis.spines[:].set_visible(False)
    asked = problem.question[:-1] + problem.answer
    figure.suptitle(f"{asked}: who is blamed for the slip (boxed)? Red: advantage below 0, "
                    "blue: above. Lines: where SAPO's segments end", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*STUDIES, "all", "show-credit", "readme"])
    parser.add_argument("folder", nargs="?", help="for show-credit: a folder written by train_small.py --save")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--seeds", type=int, help="other than the study's own number")
    options = parser.parse_args()
    if options.name == "show-credit":
        show_credit(options.folder, HERE / "credit.png")
        return
    if options.name == "readme":
        readme = HERE.parent / "README.md"
        readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in STUDIES if options.name == "all" else [options.name]:
        print(study(name, options.workers, options.seeds), end="\n\n")


if __name__ == "__main__":
    main()
