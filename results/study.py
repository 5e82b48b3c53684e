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
import itertools
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import torch
import transformers
from matplotlib.figure import Figure

import sapo
import toy_env
import train_small
from support.run_folder import expect, one_line

HERE = Path(__file__).parent

# The setting of the studies: a chain long enough, and few enough responses, that nothing saturates.
SETTING = dict(operands=6, iterations=40, eval_every=40)
TUNING = (100, 101)  # the seeds that decide λ and rates; seeds 0 to 4 are reported
FILLER = dict(openings="many")
OFF_POLICY = dict(responses=512, iterations=10, critic_warmup=1, mini_batches=16, epochs=2)
POLICIES = {"on-policy": {}, "off-policy": OFF_POLICY,
            "off-policy at half the rate": OFF_POLICY | dict(lr=8e-5)}
SEGMENT = dict(ratio="segment")  # given where Table 2's ablation is made
RATE = {"grpo": 1.6e-4, "gspo": 3.2e-4, "ppo": 1.6e-4, "vc-ppo": 1.6e-4, "sapo": 1.6e-4, "srpo": 1.6e-4}
OWN_LAMBDA = {"sapo": 0.9, "ppo": 0.95, "vc-ppo": 0.99}  # the studies', in each world
LAMBDAS = {"sapo": (0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
           **dict.fromkeys(("ppo", "vc-ppo"), (0.8, 0.9, 0.95, 0.99, 1.0))}
BEST = {"grpo": dict(lr=3.2e-4), "ppo": dict(lam=0.99), "sapo": dict(lam=0.8)}  # on TUNING, if another
RATES = dict.fromkeys(RATE, (8e-5, 1.6e-4, 3.2e-4)) | {  # tried, at the best λ
    "grpo": (8e-5, 1.6e-4, 3.2e-4, 6.4e-4), "gspo": (1.6e-4, 3.2e-4, 6.4e-4)}
SAID = {"sapo": dict(value_at="start"), "srpo": dict(contrast="blind")}
WORDY = "tiny_vlm/wordy"  # for "none" too, where kinds of filler words are compared
NO_TRUTH, GUESSER = "runs/no-truth", "runs/guesser"
MADE = {NO_TRUTH: "python -m tiny_vlm.make --truth 0 --out " + NO_TRUTH,
        GUESSER: "python -m tiny_vlm.make --base tiny_vlm --steps 800 --lr 7e-4 --guess 0.6 --out " + GUESSER}
GUESS = dict(model=GUESSER, prior=0.6, operands=4)
UNCERTAIN = 0.1  # nats: a token with more could have been another
STUDENT = {4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 % of t, by seeds
X_LABELS = {"": "responses", "idle": "share of the uncertain tokens that decide nothing"}
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of entropy, for lift

ACCURACY = ("accuracy_sampled", "accuracy_greedy", "accuracy_paper", "faithful_sampled")
AT_THE_END = ("accuracy_sampled", "accuracy_paper", "faithful_sampled")
CRITIC = ("explained_variance_last", "blame_auroc")
BASE = ("idle", "precision", "recall", "chance")  # of the base model
GROUNDED = ("perception_sampled", "lucky")
RATIO = ("mean_ratio_deviation", "max_ratio_deviation", "clip_fraction")


def setting(algo: str, **options) -> dict:
    """The options of a run. One at its default is left out, so that studies which vary others share the run.

    SAPO's always say where V is read, since the paper and its authors' code differ there; SRPO's, which
    contrast. With filler words λ is always given, and for a model of MADE so is all that train_small.py
    would set to the paper's values.
    """
    base = dict(SETTING, algo=algo, lr=RATE[algo]) | SAID.get(algo, {})
    if "openings" in options and algo in OWN_LAMBDA:
        base |= dict(lam=OWN_LAMBDA[algo])
    if options.get("model") in MADE:
        base |= dict(max_tokens=16 * options.get("operands", SETTING["operands"]) + 40)
        if algo in OWN_LAMBDA:
            base |= dict(lam=OWN_LAMBDA[algo], critic_lr=5e-5, head_lr=2e-3)
    return base | {k: v for k, v in options.items() if k in base or v != getattr(train_small.Config, k)}


BOUNDS = {"temperature 2": dict(weight_temperature=2.0), "clip 0.2": dict(weight_clip=0.2),
          "clip 0.8": dict(weight_clip=0.8)}  # (S4) has 1 and 0.5
VARIANTS = {  # of SRPO; those that were removed from srpo.py are in *-removed.csv
    **{contrast: dict(contrast=contrast) for contrast in ("blind", "blank")},
    **{f"blind, {bound}": its for bound, its in BOUNDS.items()},
    "blind, sign-aware": dict(sign_aware=True), "blank, sign-aware": dict(contrast="blank", sign_aware=True),
    **{f"blind, {bound}, sign-aware": dict(its, sign_aware=True) for bound, its in BOUNDS.items()}}


class Study(NamedTuple):
    question: str
    runs: dict  # label → options of train_small.py
    seeds: Sequence[int] = range(5)
    columns: tuple = (*ACCURACY, "responses_to_80", *CRITIC)  # of the table
    curves: tuple = ("reward", *CRITIC, "entropy")  # of the picture
    pairs: tuple = ()  # (label, label): the first minus the second, seed by seed
    against: str = ""  # x of the picture: an option; "": responses, over a training; "idle": pairs over that


def horizon(**world) -> dict:
    """Of a Study: three methods on chains of four lengths."""
    lengths = [f"{n} operands" for n in (2, 4, 6, 8)]
    return dict(runs={f"{a}, {n}": setting(a, **world, operands=int(n[0]))
                      for n in lengths for a in ("grpo", "ppo", "sapo")},
                pairs=tuple((f"sapo, {n}", f"{a}, {n}") for a in ("grpo", "ppo") for n in lengths),
                curves=AT_THE_END, against="operands")


STUDIES = {
    "rates": Study("The learning rates tried for each method at its best λ, on separate seeds", {
        f"{a}, {1e4 * lr:g}e-4": setting(a, **BEST.get(a, {}) | dict(lr=lr))
        for a, rates in RATES.items() for lr in rates}, seeds=TUNING),
    "table1": Study("SAPO Table 1: six methods on equally many responses", {
        **{a: setting(a) for a in RATE}, "grpo, tuned": setting("grpo", **BEST["grpo"]),
        "srpo, clip 0.2": setting("srpo", weight_clip=0.2)},
        pairs=(*(("sapo", a) for a in ("ppo", "vc-ppo", "grpo", "grpo, tuned")),
               ("srpo", "grpo"), ("srpo", "grpo, tuned"), ("srpo, clip 0.2", "grpo"))),
    "choices": Study("Table 1 with V as in the official code, the paper's λ, or tuned on other seeds", {
        **{a: setting(a) for a in ("grpo", "ppo", "vc-ppo", "sapo")},
        "sapo, V at last": setting("sapo", value_at="last"),
        "sapo, lambda 0.99": setting("sapo", lam=0.99),
        **{f"{a}, tuned": setting(a, **BEST[a]) for a in ("ppo", "sapo")}},
        pairs=(*(("sapo, lambda 0.99", a) for a in ("ppo", "vc-ppo", "grpo")),
               *(("sapo, tuned", a) for a in ("ppo, tuned", "vc-ppo", "grpo")))),
    "table2": Study("SAPO Table 2: ratio per token or per segment, off-policy: 32 updates on 512 responses", {
        **{ratio: setting("sapo", **OFF_POLICY) | dict(ratio=ratio) for ratio in ("token", "segment")},
        **{a: setting(a, **OFF_POLICY) for a in ("ppo", "grpo")}},
        columns=(*ACCURACY, "responses_to_80", *RATIO), curves=("reward", *RATIO, "entropy"),
        pairs=tuple(("segment", other) for other in ("token", "ppo", "grpo"))),
    "table3": Study("SAPO Table 3: where segments end", {
        s: setting("sapo", segments=s) for s in train_small.SEGMENTS},
        pairs=tuple(("entropy", other) for other in train_small.SEGMENTS[1:])),
    "wordy-table3": Study("SAPO Table 3 with filler words", {
        s: setting("sapo", **FILLER, segments=s) for s in train_small.SEGMENTS},
        pairs=tuple(("entropy", other) for other in train_small.SEGMENTS[1:])),
    "table3-last": Study("The same with V before a segment's last token, where the official code reads it", {
        s: setting("sapo", segments=s, value_at="last") for s in train_small.SEGMENTS}, seeds=range(2)),
    "figure3": Study("SAPO Fig. 3: lift of large value jumps at high entropy, by quantile (Eq. 12)", {
        a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
        columns=tuple(f"lift_{q}" for q in QUANTILES), curves=("lift_0.7", "lift_0.9", "lift_0.95")),
    "figure5": Study("SAPO Fig. 5: the share of tokens that end a segment", {
        f"{k} %": setting("sapo", top_percent=float(k)) for k in (5, 10, 20, 30, 50, 100)},
        curves=(*AT_THE_END, "blame_auroc"), against="top_percent",
        pairs=tuple(("30 %", f"{k} %") for k in (5, 10, 20, 50, 100)) + (("50 %", "100 %"),)),
    "wordy-figure5": Study("SAPO Fig. 5 with filler words", {
        f"{k} %": setting("sapo", **FILLER, top_percent=float(k)) for k in (5, 10, 30, 50, 100)},
        curves=(*AT_THE_END, "blame_auroc"), against="top_percent"),
    "figure6": Study("SAPO Fig. 6: value loss", {a: setting(a) for a in ("ppo", "vc-ppo", "sapo")},
        columns=("value_loss",), curves=("value_loss", "explained_variance", "explained_variance_last")),
    "figure7": Study("SAPO Fig. 7: entropy and response length", {
        a: setting(a) for a in ("ppo", "sapo")}, columns=("entropy", "response_length"),
        curves=("entropy", "response_length")),
    "horizon": Study("Longer chains: does the gain grow with the horizon?", seeds=range(4),
                     **horizon()),
    "features": Study("A critic without features: tiny_vlm without the truth-aware backbone", {
        **{a: setting(a, model=NO_TRUTH) for a in ("grpo", "ppo", "vc-ppo")},
        "sapo, lambda 0.9": setting("sapo", model=NO_TRUTH),
        "sapo, lambda 0.99": setting("sapo", model=NO_TRUTH, lam=0.99)},
        pairs=(("sapo, lambda 0.9", "ppo"), *(("sapo, lambda 0.99", a) for a in ("ppo", "vc-ppo", "grpo")))),
    "srpo": Study("SRPO's open choices", {
        **{a: setting(a) for a in ("grpo", "srpo")}, "blank": setting("srpo", contrast="blank"),
        "blank, sign-aware": setting("srpo", contrast="blank", sign_aware=True),
        **{f"blank, {c} image": setting("srpo", contrast="blank", corruption=c) for c in ("noise", "blank")}},
        columns=(*ACCURACY, *GROUNDED, "responses_to_80"), curves=("reward", "entropy"),
        pairs=tuple((variant, "grpo") for variant in ("srpo", "blank", "blank, sign-aware"))),
    "srpo-forms": Study("SRPO: contrasts, and weights of them, on separate seeds", {
        "grpo": setting("grpo"), **{label: setting("srpo", **form) for label, form in VARIANTS.items()}},
        seeds=TUNING, columns=(*ACCURACY, *GROUNDED, "responses_to_80"), curves=("reward", "entropy")),
    "guessing": Study("A base model that guesses; the guess is right in 60 % of training, then never", {
        **{a: setting(a, **GUESS) for a in ("grpo", "srpo")},
        "srpo, sign-aware": setting("srpo", **GUESS, sign_aware=True),
        "srpo, sign-aware, clip 0.2": setting("srpo", **GUESS, sign_aware=True, weight_clip=0.2),
        **{a: setting(a, **GUESS) for a in ("ppo", "sapo")}},
        seeds=range(10), columns=(*ACCURACY, *GROUNDED), curves=("reward", "entropy"),
        pairs=tuple((a, "grpo") for a in ("srpo", "srpo, sign-aware", "srpo, sign-aware, clip 0.2", "sapo"))),
    "guessing-forms": Study("A base model that guesses: SRPO's contrasts and weights, on separate seeds", {
        "grpo": setting("grpo", **GUESS), "grpo, 3.2e-4": setting("grpo", **GUESS, lr=3.2e-4),
        **{label: setting("srpo", **GUESS, **form) for label, form in VARIANTS.items()}},
        seeds=TUNING, columns=(*ACCURACY, *GROUNDED), curves=("reward", "entropy")),
    "lambda": Study("The λ tried for each method with a critic, on separate seeds", {
        f"{a}, lambda {x}": setting(a, **{} if x == own else dict(lam=x))
        for a, own in OWN_LAMBDA.items() for x in LAMBDAS[a]}, seeds=TUNING,
        curves=(*AT_THE_END, "blame_auroc"), against="lam"),
    "wordy-lambda": Study("With filler words: the λ tried for each method with a critic", {
        f"{a}, lambda {x}": setting(a, **FILLER, lam=x) for a in OWN_LAMBDA for x in LAMBDAS[a]},
        seeds=TUNING, curves=(*AT_THE_END, "blame_auroc"), against="lam"),
    "wording": Study("No, few or many filler words: how many uncertain tokens decide nothing at first", {
        kind: setting("grpo", openings=kind, model=model, iterations=1)
        for kind, model in zip(toy_env.OPENED, (WORDY, None, None))},
        seeds=range(3), columns=(*BASE, "entropy", "response_length"), curves=("idle", "recall")),
    "openings": Study("SAPO minus PPO: when do segments pay?", {
        f"{a}, {policy}, {kind}": setting(a, **how, **more) | (SEGMENT if a == "sapo" and how else {})
        for policy, how in POLICIES.items()
        for kind, more in (("none", {}), ("few", dict(openings="few")), ("many", FILLER))
        for a in ("ppo", "sapo")},
        columns=(*ACCURACY, "responses_to_80"), against="idle",
        curves=("accuracy_sampled", "accuracy_greedy", "faithful_sampled"),
        pairs=tuple((f"sapo, {policy}, {kind}", f"ppo, {policy}, {kind}")
                    for policy in POLICIES for kind in toy_env.OPENED)),
    "wordy-table1": Study("SAPO Table 1 with filler words", {
        **{a: setting(a, **FILLER) for a in RATE},
        "grpo, twice the rate": setting("grpo", **FILLER, **BEST["grpo"]),
        **{f"{a}, lambda {x}": setting(a, **FILLER, lam=x)
           for a, x in (("ppo", 0.9), ("vc-ppo", 0.95), ("sapo", 0.8), ("sapo", 0.99))}},
        columns=(*ACCURACY, "perception_sampled", "responses_to_80", *CRITIC),
        pairs=(*(("sapo", a) for a in ("ppo", "vc-ppo", "grpo", "grpo, twice the rate", "ppo, lambda 0.9")),
               *(("sapo, lambda 0.8", a) for a in ("ppo", "vc-ppo, lambda 0.95")),
               *(("sapo, lambda 0.99", a) for a in ("ppo", "vc-ppo", "grpo")), ("srpo", "grpo"))),
    "wordy-falls": Study("What saves the two runs of wordy-figure5 that collapse on seed 1", {
        f"{k} %, {label}": setting("sapo", **FILLER, top_percent=float(k), **more) for k in (5, 50)
        for label, more in (("as it is", {}), ("half the rate", dict(lr=8e-5)),
                            ("token ratio", dict(ratio="token")),
                            ("returns with lambda 1", dict(lam_returns=1.0)))},
        seeds=(1,), columns=(*ACCURACY, "responses_to_80", *RATIO),
        curves=("reward", "kl_step", "explained_variance")),
    "wordy-horizon": Study("Longer chains with filler words", **horizon(**FILLER)),
    "wordy-table2": Study("SAPO Table 2 with filler words: 32 updates on 512 responses", {
        **{x: setting("sapo", **FILLER, **OFF_POLICY) | dict(ratio=x) for x in ("token", "segment")},
        **{a: setting(a, **FILLER, **OFF_POLICY) for a in ("ppo", "grpo")},
        "segment, half the rate": setting("sapo", **FILLER, **OFF_POLICY, lr=8e-5) | SEGMENT,
        "ppo, half the rate": setting("ppo", **FILLER, **OFF_POLICY, lr=8e-5)},
        columns=(*ACCURACY, "responses_to_80", *RATIO), curves=("reward", *RATIO, "entropy"),
        pairs=(("segment", "token"), ("segment", "ppo"), ("segment, half the rate", "ppo, half the rate"))),
    "off-policy": Study("SAPO minus PPO off-policy, on ten seeds", {
        f"{a}, {world}": setting(a, **OFF_POLICY, **its) | (SEGMENT if a == "sapo" else {})
        for world, its in (("plain", {}), ("with words at half the rate", FILLER | dict(lr=8e-5)))
        for a in ("ppo", "sapo")}, seeds=range(10), columns=(*ACCURACY, "responses_to_80"),
        pairs=tuple((f"sapo, {x}", f"ppo, {x}") for x in ("plain", "with words at half the rate"))),
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
    """What is kept for each job (options). Where that is nothing yet, `make(options)` makes it first; with no
    workers, it is left out."""
    paths = [path_of(options, kind) for options in jobs]
    missing = [(make, options, path) for options, path in zip(jobs, paths) if not path.exists()]
    if missing and workers:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(keep, missing, chunksize=1)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def keep(make: Callable, options: dict, path: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    result = make(options)
    path.write_text(json.dumps(dict(options=dict(sorted(options.items())), **result)), encoding="utf-8")


def train_once(options: dict) -> dict:
    """One training: a row for the table, and the history for curves."""
    if (model := options.get("model")) in MADE and not Path(model).exists():
        raise FileNotFoundError(f"{model} is missing: {MADE[model]}")
    start = time.time()
    with tempfile.TemporaryDirectory() as out:
        run = train_small.prepare(train_small.Config(**options, out=out, patience=0))
        history, (_, after) = train_small.learn(run, look)
    on = torch.cuda.get_device_name() if run.config.device == "cuda" else run.config.device
    row = dict(command=command(options), seed=options["seed"], seconds=round(time.time() - start), device=on,
               torch=torch.__version__, transformers=transformers.__version__)
    greedy = train_small.rollout(run.policy, run.processor, run.task, run.task.held_out,
                                 run.config.max_tokens, greedy=True).texts
    row |= dict(errors_sampled=errors(run.task, after), errors_greedy=errors(run.task, greedy))
    history = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in history]
    return dict(row=summarise(history) | row, history=history)


def errors(task: train_small.Task, texts: list[str]) -> dict[str, float]:
    """Of the responses to the held-out problems the share that goes wrong first in a statement of a kind."""
    wrong = [toy_env.false_statements(p, text) for p, text in zip(task.held_out, texts)
             if task.reward(p, text) < 1]
    kinds = Counter(next((s.kind for s in false if s.consequential), "none") for false in wrong)
    return {kind: round(n / len(texts), 4) for kind, n in sorted(kinds.items())}


def look(i, policy, critic, roll, scored, credit) -> dict:
    """Logged in each iteration, of its own rollout: of the uncertain tokens the share that decides nothing;
    precision and recall of SAPO's ends at decisions, and the precision of chance; and Eq. 12 at several
    quantiles of entropy."""
    places = lambda marked: set(map(tuple, (marked & roll.mask).nonzero().tolist()))
    uncertain, decide = places(scored.entropy > UNCERTAIN), decisions(roll)
    ends = places(sapo.ends_by_entropy(scored.entropy, roll.mask) & ~sapo.ends_once(roll.mask))
    share = lambda part, whole: len(part) / max(1, len(whole))
    found = dict(idle=share(uncertain - decide, uncertain), precision=share(ends & decide, ends),
                 recall=share(ends & decide, decide), chance=share(decide, places(roll.mask)))
    if critic:
        its = (scored.entropy, scored.values, roll.mask)
        found |= {f"lift_{q}": sapo.lift(*its, quantile=q, resamples=1)[0] for q in QUANTILES}
    return found


def digits(roll: train_small.Rollout) -> Iterator[tuple]:
    """(row, token, kind of statement) of each token with a digit that is a part of a statement."""
    for row, (problem, text, pieces) in enumerate(zip(roll.problems, roll.texts, roll.pieces)):
        for s in toy_env.statements(problem, text):
            yield from ((row, t, (s.kind, s.true)) for t in toy_env.tokens_of(s, pieces)
                        if any(c.isdigit() for c in pieces[t]))


def decisions(roll: train_small.Rollout) -> set[tuple]:
    """(row, token) of the digits of readings and results: all else is copied, or said one way or another."""
    return {(row, t) for row, t, (kind, _) in digits(roll) if kind in ("reading", "result")}


def summarise(history: list[dict]) -> dict:
    """A run in one row: the last evaluation, and means over the run. Those that judge a critic are over a
    part of it, in which there is something to explain: from a third until the reward passes 85 %."""
    first, last = history[0], history[-1]
    row = {k: last[k] for k in first if k not in ("iteration", "responses", "seconds")}
    row |= {f"{k}_base": first[k] for k in row}
    row |= {k: history[1][k] for k in BASE if k in history[1]}
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


def jobs_of(name: str, seeds: int = 0) -> list[tuple[str, dict]]:
    """(label, options) of a study's runs. Seeds that decide are evaluated on 256 problems, as train_small.py
    does it; what is reported on 1,024: one of them is 0.001."""
    its = STUDIES[name]
    wide = {} if its.seeds == TUNING else dict(eval_problems=1024)
    return [(label, dict(options, seed=seed, **wide)) for label, options in its.runs.items()
            for seed in its.seeds[: seeds or None]]


def runs_of(name: str, workers: int = 1, seeds: int = 0) -> dict:
    """label → a study's runs, one for each seed."""
    jobs = jobs_of(name, seeds)
    runs = {path_of(run["options"]): run for run in kept([its for _, its in jobs], train_once, workers)}
    return gather((label, runs.get(path_of(its))) for label, its in jobs)


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
    ends = ("seed", "seconds", "command", "device", "torch", "transformers")
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
    rows = [dict(base, label="base", seed=0), *rows] if name in ("table1", "wordy-table1") else rows
    lines = [markdown(f"results.study {name}", rows, STUDIES[name].columns)]
    for pair in STUDIES[name].pairs:
        its = [[r for r in rows if r["label"] == label] for label in pair]
        cells = [difference(paired(*its, column)) for column in STUDIES[name].columns]
        if set(cells) != {"–"}:
            lines.append(f"| {' − '.join(pair)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(ours: list[dict], theirs: list[dict], column: str) -> list[float]:
    """Ours minus theirs on each seed that both have, if all have the column."""
    theirs = {row["seed"]: row.get(column) for row in theirs}
    both = [(row.get(column), theirs[row["seed"]]) for row in ours if row["seed"] in theirs]
    return [] if any(None in pair for pair in both) else [a - b for a, b in both]


def difference(differences: list[float]) -> str:
    """Their mean with its 95 % interval by Student's t, or min–max of up to three."""
    if not differences:
        return "–"
    n, digits = len(differences), 0 if max(map(abs, differences)) > 30 else 3
    mean, low, high = fmean(differences), min(differences), max(differences)
    if n > 3:
        half = STUDENT[n] * stdev(differences) / n**0.5
        low, high = mean - half, mean + half
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def markdown(typed: str, rows: list[dict], columns: Sequence[str]) -> str:
    """A table: what was typed and on how many seeds, then a line for each label of the rows."""
    seeds = len({r["seed"] for r in rows})
    spread = {1: "1 seed", 2: "2 seeds: mean (min–max)", 3: "3 seeds: mean (min–max)"}
    lines = [f"`python -m {typed}`, {spread.get(seeds, f'{seeds} seeds: mean (95 % interval)')}.", "",
             "| | " + " | ".join(columns).replace("_", " ") + " |", "|---" * (len(columns) + 1) + "|"]
    for label in dict.fromkeys(r["label"] for r in rows):
        its = [r for r in rows if r["label"] == label]
        fewer = f" ({len(its)} of {seeds} seeds)" if len(its) < seeds and label != "base" else ""
        cells = [cell([r.get(column) for r in its]) for column in columns]
        lines.append(f"| {label}{fewer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def publish(name: str, rows: list[dict], tables: dict[str, str]) -> None:
    """Write a CSV, and put tables into their places in README.md."""
    (HERE / f"{name}.csv").write_text(as_csv(rows), encoding="utf-8", newline="")
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
    if against == "idle":
        idle = {kind: fmean(run["row"]["idle"] for run in its) for kind, its in runs_of("wording", 0).items()}
        gains = {}
        for metric, pair in itertools.product(metrics, STUDIES[name].pairs):
            _, policy, kind = pair[0].split(", ")
            ours, theirs = ([run["row"] for run in runs.get(label, [])] for label in pair)
            if differences := paired(ours, theirs, metric):
                gains.setdefault(metric, {}).setdefault(policy, {})[idle[kind]] = differences
        return gains
    by_algo = gather((run["options"]["algo"], run) for mine in runs.values() for run in mine)
    at = lambda run: getattr(train_small.complete(train_small.Config(**run["options"])), against)
    return {metric: {algo: gather((at(run), run["row"][metric]) for run in mine)
                     for algo, mine in by_algo.items()} for metric in metrics}


def draw(name: str, panels: dict) -> None:
    """A study's picture, from its lines: means over seeds, with their intervals shaded."""
    against = STUDIES[name].against
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, its) in zip(axes, panels.items()):
        for i, (label, points) in enumerate(its.items()):
            if against == "idle":  # each seed by itself, as one may be far away
                aside = 0.008 * (i - 1)  # beside those of the other lines
                seeds = [(x + aside, y) for x, ys in points.items() for y in ys]
                axis.plot(*zip(*seeds), "o", color=f"C{i}", alpha=0.6)
                middles = [(x + aside, median(points[x])) for x in sorted(points)]
                axis.plot(*zip(*middles), "_-", color=f"C{i}", markersize=14, label=f"{label}, median")
            elif points:
                middle, low, high = zip(*(interval(points[at]) for at in sorted(points)))
                axis.plot(sorted(points), middle, "-" if len(points) > 1 else "o", color=f"C{i}", label=label)
                axis.fill_between(sorted(points), low, high, color=f"C{i}", alpha=0.15, lw=0)
        if against == "idle":
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_yticks([-1, -0.1, 0, 0.1], ["-1", "-0.1", "0", "0.1"])
            axis.axhline(0, color="black", lw=0.8)
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel(X_LABELS.get(against, against.replace("_", " ")))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(STUDIES[name].question, fontsize=11)
    figure.savefig(HERE / f"{name}.png", dpi=100)


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message):
        raise ValueError(message)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*STUDIES, "all"])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one core each; 0: none")
    parser.add_argument("--seeds", type=int, default=0, help="the first few alone")
    with one_line("results.study", ValueError):
        options = parser.parse_args()
        expect(options.workers >= 0 and options.seeds >= 0, "workers, seeds",
               (options.workers, options.seeds), "0 or more")
    for name in STUDIES if options.name == "all" else [options.name]:
        print(study(name, options.workers, options.seeds), end="\n\n")


if __name__ == "__main__":
    main()
