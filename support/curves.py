"""What a person sees of a run: metrics, curves, responses. `python -m support.curves RUN` draws RUN again."""

import math
import sys
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

import toy_env
from support.run_folder import metrics, one_line, settings
from toy_env import Problem

PANELS = [("reward", "accuracy_greedy", "accuracy_sampled", "accuracy_paper"), ("faithful",), ("entropy",),
          ("explained_variance", "explained_variance_last"), ("blame_auroc",), ("value_loss",)]


def describe(roll, scored, credit, outcome: torch.Tensor) -> dict[str, float]:
    """The metrics of an iteration that do not come from its update. Of a train_small.Rollout, Scored, Credit;
    outcome (B,)."""
    mask, marks = roll.mask, credit.ends if scored.values is None else credit.value_mask
    row = dict(
        reward=float(outcome.mean()),
        entropy=float(scored.entropy[mask].mean()),
        response_length=float(mask.sum(1).float().mean()),
        truncated=float(roll.truncated.float().mean()),
        unreadable=fmean(toy_env.parse(text) is None for text in roll.texts),
        segments_per_response=float(marks.sum(1).float().mean()),
    )
    if credit.roles is not None:  # of SRPO: responses without any get plain GRPO
        row["with_roles"] = float(credit.roles.any(1).float().mean())
    if roll.problems[0].cells:
        row["faithful"] = fmean(roll.faithful())
        found = map(toy_env.blame, roll.problems, roll.texts, roll.pieces, credit.advantages.tolist())
        found = [blame.statements for blame in found if blame]  # wrong responses with one false statement
        row["blame_auroc"] = fmean(found) if found else math.nan
    if scored.ref_log_probs is not None:  # k1 estimate of KL(policy || reference), nats per token
        row["kl_to_start"] = float((scored.log_probs - scored.ref_log_probs)[mask].mean())
    if scored.values is not None:
        both = explained_variance(scored.values, outcome, credit.value_mask)
        row["explained_variance"], row["explained_variance_last"] = both
    return row


def explained_variance(values: torch.Tensor, outcome: torch.Tensor,
                       value_mask: torch.Tensor) -> tuple[float, float]:
    """Share of the outcome's variance that the critic explains: 1 - Var(R - V) / Var(R).

    values (B, T); outcome R (B,); value_mask, bool (B, T), of segment_gae. -> over all states whose V was
    read, and over the last of each response, where nearly all is decided. 1 is perfect, 0 as good as a
    constant; nan where all outcomes are the same.

    >>> values, outcome = torch.tensor([[0.5, 1.0], [0.5, 0.0]]), torch.tensor([1.0, 0.0])
    >>> explained_variance(values, outcome, torch.ones(2, 2).bool())
    (0.5, 1.0)
    """
    target = outcome.float()[:, None].expand(values.shape)  # R, (B, T)
    if target[value_mask].unique().numel() < 2:
        return math.nan, math.nan
    last = value_mask & (value_mask.flip(1).cumsum(1).flip(1) == 1)  # (B, T)
    return tuple(float(1 - (target - values)[at].var() / target[at].var()) for at in (value_mask, last))


def show(run, history: list[dict], texts: tuple[list[str], list[str]], seconds: float) -> None:
    """All of a train_small.Run that has ended: the report, the curves, and where things are. texts: the
    responses to the held-out problems, before and after."""
    config, task = run.config, run.task
    report(task.held_out, history, *texts)
    plot(Path(config.out))
    if task.skipped:
        print(f"\n{len(task.skipped)} rows of the data set could not be read")
    print(f"\n{seconds:.0f} s on {config.device}. Metrics, curves, checkpoints: {config.out}/")
    if config.save and run.critic and task.held_out[0].cells:
        print(f"Turn the knobs of its credit: python -m results.page {config.out}")


def plot(folder: Path) -> None:
    """Draw FOLDER/metrics.jsonl as FOLDER/curves.png."""
    config, (history, _) = settings(folder, name="RUN")["config"], metrics(folder)
    title = f"{config['algo']}, seed {config['seed']}, {config.get('dataset') or config['operands']}"
    title += "" if config.get("dataset") else " operands"
    critic = any("value_loss" in row for row in history)
    warmup = config["critic_warmup"] * config["responses"] if critic else 0
    panels = [panel for panel in PANELS if any(name in row for row in history for name in panel)]
    figure = Figure(figsize=(12, 6), layout="constrained")
    figure.suptitle(title)
    for axis, panel in zip(figure.subplots(2, 3).flat, panels):
        for name in panel:
            points = [(r["responses"], r[name]) for r in history if r.get(name) is not None]
            style = "o" if name.startswith("accuracy") else "-"
            axis.plot(*zip(*points), style, label=name.replace("_", " "))
        if warmup:
            axis.axvspan(0, warmup, color="black", alpha=0.06,
                         label="critic's warm-up" if panel is panels[0] else None)
        axis.set_xlabel("responses")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.savefig(folder / "curves.png", dpi=110)


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
    with one_line("support.curves", ValueError, OSError):
        plot(Path(*sys.argv[1:2]))
