"""The papers' claims in miniature: `python -m results.study NAME` runs a study, or resumes it.

    python -m results.study table1 --workers 2     makes table1.csv and its table on a page
    python -m results.study all --workers 2        every study; a finished run is never repeated
    python -m results.pictures                     draws the pictures

A run is one training with train_small.py's own functions. Studies that ask for the same options share it.
Runs are made in results/runs/, a file each, and kept in results/runs/ALGO.jsonl.gz.
"""

import argparse
import csv
import functools
import gzip
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
from statistics import fmean, stdev

import torch
import transformers

import sapo
import toy_env
import train_small
from results.guards import guarded
from results.studies import (ACCURACY, BASE, CRITIC, FILLER, MADE, OWN_LAMBDA, QUANTILES, STUDIES, TUNING,
                             setting)
from support.run_folder import expect, one_line

HERE = Path(__file__).parent
PAGES = "README.md", "SRPO.md", "METHOD.md"
WORDS = {  # columns, in a table
    "accuracy_sampled": "accuracy", "accuracy_paper": "at T = 0.6", "faithful_sampled": "faithful",
    "responses_to_80": "responses to 80 %", "perception_sampled": "cells read right",
    "kl_step": "largest step"}
COLLAPSED = 0.05  # accuracy of a run that ends below it
UNCERTAIN = 0.1  # nats: a token with more could have been another
STUDENT = {4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 % of t, by seeds


# ------------------------------------------------------------------------------------------------------- runs
def command(options: dict) -> str:
    """The exact command line of a run; a guard has no flag."""
    if "guard" in options:
        return "python -m results.study clip"
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in sorted(options.items())]
    return " ".join(["python train_small.py", *flags])


def path_of(options: dict, kind: str = "") -> Path:
    """Where the run of these options is made. All of them decide; the name shows only the first few."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{kind or options['algo']}-{options['operands']}-s{options['seed']}-{digest}.json"
    return HERE / "runs" / name


def kept(jobs: Sequence[dict], make: Callable, workers: int = 1, kind: str = "") -> list[dict]:
    """What there is for each job (options), in an archive or as a file. Where that is nothing yet,
    `make(options)` makes it first; with no workers, it is left out."""
    paths, archived = [path_of(options, kind) for options in jobs], archive(HERE)
    missing = [(make, options, path) for options, path in zip(jobs, paths)
               if path.name not in archived and not path.exists()]
    if missing and workers:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(keep, missing, chunksize=1)
    made = {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()} | archived
    return [json.loads(made[path.name]) for path in paths if path.name in made]


@functools.cache
def archive(here: Path) -> dict[str, str]:
    """Name of its file → each run of runs/*.jsonl.gz, as text."""
    lines = [line for file in sorted((here / "runs").glob("*.jsonl.gz"))
             for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    return dict(line.split("\t", 1) for line in lines)


def pack() -> None:
    """Put each run that has a file into its algorithm's archive: a line, of its name and text."""
    found = gather((path.name.rsplit("-", 3)[0], path) for path in sorted((HERE / "runs").glob("*.json")))
    for kind, paths in found.items():
        file = HERE / "runs" / f"{kind}.jsonl.gz"
        lines = gzip.decompress(file.read_bytes()).decode().splitlines() if file.exists() else []
        lines = sorted({*lines, *(f"{path.name}\t{path.read_text(encoding='utf-8')}" for path in paths)})
        file.with_suffix(".tmp").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
        file.with_suffix(".tmp").replace(file)  # a run is never in neither place
        for path in paths:
            path.unlink()
    archive.cache_clear()


def keep(make: Callable, options: dict, path: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    result = make(options)
    text = json.dumps(dict(options=dict(sorted(options.items())), **result))
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").rename(path)  # whole, or not there


def train_once(options: dict) -> dict:
    """One training: a row for the table, and the history for curves."""
    if (model := options.get("model")) in MADE and not Path(model).exists():
        raise FileNotFoundError(f"{model} is missing: {MADE[model]}")
    start, its = time.time(), {k: v for k, v in options.items() if k != "guard"}
    with tempfile.TemporaryDirectory() as out, guarded(options.get("guard", "")) as free:
        run = train_small.prepare(train_small.Config(**its, out=out, patience=0))

        def watch(*made) -> dict:
            largest = dict(free_log_ratio=max(free)) if free else {}
            free.clear()
            return look(*made) | largest

        history, (_, after) = train_small.learn(run, watch)
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
    """Train what is missing of a study; pack its runs, write its CSV and table; return the table."""
    rows = rows_of(name, runs_of(name, workers, seeds))
    pack()
    publish(name, rows, {name: table(name, rows)})
    return table(name, rows)


# ----------------------------------------------------------------------------------------------------- tables
def rows_of(name: str, runs: dict) -> list[dict]:
    """A row of a study's CSV for each run."""
    ends = ("seed", "seconds", "command", "device", "torch", "transformers")
    columns = (*STUDIES[name].columns, *(f"{column}_base" for column in ACCURACY), *ends)
    return [dict(label=label) | {column: value_of(run, column) for column in columns}
            for label, its in runs.items() for run in its]


def value_of(run: dict, column: str):
    """A number of a run. Of its history: a lift is the mean, a step the largest, `early_reward` the reward of
    the fourth iteration, `largest_fall` how far the reward was at most below the highest before it; the
    accuracy at the end, of the last policy, counts as the last reward."""
    if column.startswith("lift"):
        return round(mean_of(run["history"], column), 4)
    if column in ("kl_step", "free_log_ratio"):
        return max((row[column] for row in run["history"] if row.get(column) is not None), default=None)
    if column == "largest_fall":
        rewards = [*(row["reward"] for row in run["history"][1:]), run["row"]["accuracy_sampled"]]
        return round(max(high - x for high, x in zip(itertools.accumulate(rewards, max), rewards)), 4)
    return run["history"][4]["reward"] if column == "early_reward" else run["row"].get(column)


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
    """A study's table in Markdown: means, and what most of its pairs share less each, or each less that; or,
    if `only_pairs`, these differences alone. They are seed by seed, with a 95 % interval."""
    its, by_label = STUDIES[name], gather((row["label"], row) for row in rows)
    seeds = max(map(len, by_label.values()))
    said = f"`python -m results.study {name}`, {seeds} seed{'s' * (seeds > 1)}"
    said += f"; in brackets the {'95 % interval' if seeds > 3 else 'range'}." if its.pairs else "."
    words = [WORDS.get(column, column.replace("_", " ")) for column in its.shown]
    minus = lambda pair, column: difference(paired(*(by_label.get(label, []) for label in pair), column))
    (first, firsts), (second, seconds) = (Counter(pair[i] for pair in its.pairs).most_common(1)[0]
                                          if its.pairs else ("", 0) for i in (0, 1))
    if its.only_pairs:
        lines = {" − ".join(pair): [minus(pair, column) for column in its.shown] for pair in its.pairs}
        return markdown(said, words, lines, "difference in")
    lines = {}
    for label in (label for label in its.rows or its.runs if label in by_label):
        mine = by_label[label]
        fewer = f" ({len(mine)} seed{'s' * (len(mine) > 1)})" if len(mine) < seeds else ""
        cells = lines[label + fewer] = [level([value_in(row, c) for row in mine], c) for c in its.shown]
        if its.pairs:
            pair = (label, second) if firsts < seconds else (first, label)
            cells.append(minus(pair, its.shown[0]) if pair in its.pairs else "–")
    if its.pairs:
        words.append(f"{words[0]}: " + (f"it − {second}" if firsts < seconds else f"{first} − it"))
    return markdown(said, words, lines)


def level(values: Sequence[float | None], column: str) -> str:
    """Of a column over seeds; not every run has every column, or reaches 80 %."""
    known = [x for x in values if x is not None]
    if column == "collapsed":
        return f"{sum(known)} of {len(known)}"
    if len(known) < len(values) or not known:
        return f"{len(known)} of {len(values)} runs" if known else "–"
    return f"{fmean(known):.{0 if max(known) > 30 else 3}f}"


def value_in(row: dict, column: str):
    """Of a CSV's row, a column; or whether its run collapsed."""
    return row["accuracy_sampled"] < COLLAPSED if column == "collapsed" else row.get(column)


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


def markdown(said: str, words: Sequence[str], lines: dict[str, list[str]], corner: str = "") -> str:
    """A table: what was typed, the heads of its columns, and label → cells."""
    rows = [["", *words], *([label, *cells] for label, cells in lines.items())]
    rows[0][0] = corner
    text = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([said, "", text[0].replace("|  |", "| |", 1), "|---" * len(rows[0]) + "|", *text[1:]])


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def publish(name: str, rows: list[dict], tables: dict[str, str]) -> None:
    """Write a CSV, and put tables into their places on the pages, if they have any."""
    (HERE / f"{name}.csv").write_text(as_csv(rows), encoding="utf-8", newline="")
    for page in PAGES:
        text = (HERE / page).read_text(encoding="utf-8")
        here = {name: its for name, its in tables.items() if f"<!-- table {name} -->" in text}
        (HERE / page).write_text(with_tables(text, here), encoding="utf-8")


def with_tables(text: str, tables: dict[str, str]) -> str:
    """The text with each table between `<!-- table NAME -->` and `<!-- end -->`."""
    for name, its in tables.items():
        before, after = text.split(f"<!-- table {name} -->\n")
        text = f"{before}<!-- table {name} -->\n{its}\n<!-- end -->" + after.split("<!-- end -->", 1)[1]
    return text


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
