"""A run's folder, OUT: run.json, metrics.jsonl and checkpoints; and what a run says when something is wrong.

For train_small.py. Read in order: a folder, its checkpoints, complaints, the end of a run. Nothing here knows
the algorithms.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from statistics import fmean

import datasets
import torch
import transformers
from tqdm import tqdm

FORM = 1  # of a checkpoint
PHASES = "evaluate", "rollout", "score_all", "assign_credit", "update"  # one of them is out of memory


class Stopped(RuntimeError):
    """Why a run ends before its time."""


class NotFinite(ArithmeticError):
    """The name of a quantity that is nan or infinite."""


def check_finite(**quantities: torch.Tensor) -> None:
    for name, x in quantities.items():
        if not x.isfinite().all():
            raise NotFinite(name)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --------------------------------------------------------------------------------------------------- a folder
def check_new(out: str) -> None:
    """ValueError for a folder that is not empty."""
    path = Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"out is {out!r}, which is not an empty folder: expected a new one, or "
                         f"--resume {out} to go on with the run in it")


def begin(out: str, config: dict, resume: bool) -> None:
    """Write run.json: the config, and for each part of the run what made it. FileExistsError: of two runs
    that begin in a folder, one does."""
    file, parts = Path(out) / "run.json", []
    file.parent.mkdir(parents=True, exist_ok=True)
    if resume:
        parts = json.loads(file.read_text())["parts"]
    else:
        file.touch(exist_ok=False)
    git, here = "git describe --always --dirty", Path(__file__).parent  # nothing where there is none
    commit = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout.strip()
    device = config["device"]
    device += f" ({torch.cuda.get_device_name()})" if "cuda" in device else ""
    made = dict(command=sys.argv, commit=commit, torch=torch.__version__, device=device,
                transformers=transformers.__version__, datasets=datasets.__version__)
    _write_json(file, dict(config=config, parts=[*parts, made]))


def settings(out: str) -> dict:
    """The config in a run's folder."""
    try:
        return json.loads((Path(out) / "run.json").read_text())["config"]
    except (ValueError, OSError) as error:
        raise ValueError(f"resume is {out!r}: expected a run's folder ({first_line(error)})") from error


def _write_json(file: Path, content: dict) -> None:
    file.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
    os.replace(file.with_suffix(".tmp"), file)


def metrics(out: Path, rows: int) -> list[dict]:
    """The first rows of metrics.jsonl. Those behind, later than the checkpoint, are cut off."""
    with open(out / "metrics.jsonl", "r+") as file:
        lines = file.readlines()[:rows]
        file.seek(sum(map(len, lines)))
        file.truncate()
    return [json.loads(line) for line in lines]


def log(out: Path, row: dict) -> dict:
    """Append a row to metrics.jsonl; nan, which JSON does not know, is None. -> the row."""
    row = {k: None if v != v else v for k, v in row.items()}
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


# ------------------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(run, **more) -> None:
    """All that what comes next depends on, in a file that is whole or not there. The one before stays.
    run: a train_small.Run. more: `iteration`, and what else is to be kept."""
    out, state = Path(run.config.out), dict(more, form=FORM, policy=run.policy.state_dict())
    state |= dict(critic=run.critic.state_dict()) if run.critic else {}
    state |= dict(optimizers=[optimizer.state_dict() for _, optimizer in run.optimizers],
                  random=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all())
    with open(out / "checkpoint.tmp", "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # on a full disk
            raise OSError(f"{file.name} could not be written ({first_line(error)})") from error
        file.flush()
        os.fsync(file.fileno())
    os.replace(out / "checkpoint.tmp", out / f"checkpoint-{more['iteration']:05}.pt")
    for old in sorted(out.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def read_checkpoint(out: str) -> dict:
    """The last one that can be read in a run's folder. What is pickled in it is never run."""
    for path in sorted(Path(out).glob("checkpoint-*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["form"] == FORM:
                return state
            error = f"form is {state['form']}: expected {FORM}"
        except Exception as wrong:  # torn or foreign: of any kind
            error = wrong
        print(f"{path} cannot be read ({first_line(error)}): the one before it is used", file=sys.stderr)
    raise ValueError(f"resume is {str(out)!r}: expected a folder with a checkpoint that can be read")


def restore(run) -> None:
    """Models, optimizers and torch's random numbers as they were at run.state, a checkpoint."""
    state = run.state
    run.policy.load_state_dict(state["policy"])
    if run.critic:
        run.critic.load_state_dict(state["critic"])
    for (_, optimizer), its in zip(run.optimizers, state["optimizers"]):
        optimizer.load_state_dict(its)
    torch.set_rng_state(state["random"])
    if torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def guarded(step: Callable, run, i: int) -> tuple:
    """What train_small.step returns. But where a number is not finite, no optimizer takes a step with it, OUT
    keeps the batch that `step` had made, and only metrics are returned, which name the number."""
    try:
        return step(run, i)
    except NotFinite as error:
        for _, optimizer in run.optimizers:
            optimizer.zero_grad()
        frames = traceback.walk_tb(error.__traceback__)
        made = next(frame.f_locals for frame, _ in frames if "scored" in frame.f_locals)
        batch = {name: getattr(made["roll"], name) for name in ("texts", "ids", "mask")}
        batch |= dict(made["scored"]._asdict(), outcome=made["outcome"], quantity=str(error))
        torch.save(batch, Path(run.config.out) / f"not-finite-{i}.pt")
        return (dict(not_finite=str(error)),)


# ------------------------------------------------------------------------------------------------- complaints
def warn(history: list[dict], warmup: int, said: set[str]) -> None:
    """Print each of `complaints` when it is first true. Stopped: nothing was finite three times in a row."""
    for sentence in set(complaints(history, warmup)) - said:
        tqdm.write(f"iteration {history[-1]['iteration']}: {sentence}", file=sys.stderr)
        said.add(sentence)
    if all("not_finite" in row for row in history[-3:]):
        raise Stopped(f"{history[-1]['not_finite']} was not finite three times in a row (the batches: OUT/"
                      "not-finite-*.pt): try a lower --lr, --critic-lr or --head-lr")


def complaints(history: list[dict], warmup: int) -> Iterator[str]:
    """What cannot learn says so."""
    rows = [row for row in history if "reward" in row]
    row, first, last = (rows or [{}])[-1], (rows or [{}])[0], rows[-5:]
    explained = [r.get("explained_variance") or 0 for r in last if r["iteration"] > warmup + 1]
    if row.get("truncated") == 1:
        yield "all responses are cut off: raise --max-tokens"
    if row.get("unreadable", 0) > 0.5:
        yield "more than half of the responses do not have the format of the instruction"
    if len(last) == 5 and {r["reward"] for r in last} in ({0}, {1}):
        yield "all rewards were equal for five iterations: there is nothing to learn from"
    if row.get("with_roles", 1) < 0.5 and row["unreadable"] <= 0.5:
        yield "more than half of the responses have no roles: SRPO is GRPO there (see srpo.split_roles)"
    if row.get("first_ratio_deviation", 0) > 1e-3:
        yield "the ratio is not 1 before the first step: scoring differs from sampling"
    if len(explained) == 5 and fmean(explained) < 0:
        yield "the critic is worse than a constant: lower --critic-lr or --head-lr"
    if row.get("entropy", 1) < first.get("entropy", 0) / 100:
        yield "the entropy fell to a hundredth: lower --lr"


# ------------------------------------------------------------------------------------------- the end of a run
def note_signals() -> Collection[int]:
    """SIGINT and SIGTERM, in what is returned when they came; the second is obeyed at once."""
    signals = []

    def note(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return signals


def leave(name: str, error: Exception, status: int, go_on: str = "", micro_batch: int = 0) -> None:
    """End the command with one line. name: of the command.  go_on: the folder of a run that can go on."""
    said = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        phase = next(phase for phase in PHASES if phase in frames)
        size = micro_batch or "all at once"
        said = f"out of memory in {phase}: halve --micro-batch (now {size}) or --max-tokens"
    said += f". Go on from the last checkpoint: python {name} --resume {go_on}" if go_on else ""
    print(f"{name}: {said}", file=sys.stderr)
    sys.exit(status)
