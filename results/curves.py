"""What a person sees of a run: curves and responses. `python -m results.curves RUN` draws the curves again.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib
import pandas

import toy_env
from toy_env import Problem

PANELS = [("reward", "accuracy_greedy", "accuracy_sampled", "accuracy_paper"), ("faithful",), ("entropy",),
          ("explained_variance", "explained_variance_last"), ("blame_auroc",), ("value_loss",)]


def show(run, history: list[dict], texts: tuple[list[str], list[str]], seconds: float) -> None:
    """All of a train_small.Run that has ended: the report, the curves, and where things are. texts: the
    responses to the held-out problems, before and after."""
    config, skipped = run.config, len(run.task.skipped)
    report(run.task.held_out, history, *texts)
    plot(Path(config.out))
    if skipped:
        print(f"\n{skipped} rows of the data set could not be read")
    print(f"\n{seconds:.0f} s on {config.device}. Metrics, curves, checkpoints: {config.out}/")
    if config.save and run.critic and not config.dataset:
        print(f"Turn the knobs of its credit: python -m results.page {config.out}")


def plot(folder: Path) -> None:
    """Draw FOLDER/metrics.jsonl as FOLDER/curves.png."""
    matplotlib.use("Agg")
    history = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    config = json.loads((folder / "run.json").read_text())["config"]
    world = config["dataset"] or f"{config['operands']} operands"
    title = f"{config['algo']}, seed {config['seed']}, {world}"
    table = pandas.DataFrame(history).set_index("responses").interpolate(limit_area="inside")
    panels = [tuple(name for name in panel if name in table) for panel in PANELS]
    panels = [panel for panel in panels if panel]  # without a critic there are fewer
    axes = table[[name for panel in panels for name in panel]].plot(
        subplots=panels, layout=(2, 3), figsize=(12, 6), title=title, grid=True, sharex=False)
    axes.flat[0].figure.tight_layout()
    axes.flat[0].figure.savefig(folder / "curves.png", dpi=110)


def report(problems: list[Problem], history: list[dict], before: list[str], after: list[str]) -> None:
    """Print what became of the held-out problems and of the critic, and three responses before and after."""
    print(f"\n{'':44}{'before':>8}{'after':>8}")
    for name in (name for name in history[0] if name not in ("iteration", "responses", "seconds")):
        print(f"{name:44}{history[0][name]:8.3f}{history[-1][name]:8.3f}")
    for name in ("explained_variance_last", "explained_variance", "blame_auroc"):
        if values := [row[name] for row in history if row.get(name) is not None]:
            print(f"{name + ', mean over the run':52}{fmean(values):8.3f}")
    for problem, *texts in zip(problems[:3], before, after):
        print(f"\n{problem.question}   answer {problem.answer}")
        for name, text in zip(("before", "after"), texts):
            print(f"{name:>7}  " + marked(problem, text).replace("\n", "\n" + 9 * " "))


def marked(problem: Problem, response: str) -> str:
    """The response with its first error between » and «."""
    error = toy_env.first_error(problem, response) if problem.cells else None
    if error is None:
        return response
    return f"{response[:error.start]}»{response[error.start:error.end]}«{response[error.end:]}"


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
