"""A run's folder, OUT: run.json, metrics.jsonl and checkpoints; and what a run says when something is wrong.

Nothing here knows the algorithms. In order: a folder, its checkpoints, complaints, signals and errors.
"""

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from shlex import join, quote
from statistics import fmean

import datasets
import torch
import transformers
from tqdm import tqdm

with suppress(ImportError):  # transformers takes it where it is, and does not name it where that fails
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        sys.exit(f"torchvision does not fit torch {torch.__version__} ({error}): pip uninstall torchvision")

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
FORM = 2  # of a checkpoint
PHASES = "evaluate", "rollout", "score_all", "assign_credit", "update"  # one of them is out of memory
LOCKS = {}  # folder → the open file by which this process holds it


class NotFinite(ArithmeticError):
    """The name of a quantity that is nan or infinite; or, of a run that ends so, a sentence."""


class NothingToLearn(Exception):
    """All responses of several iterations had the same reward."""


def check_finite(**quantities: torch.Tensor) -> None:
    if names := [name for name, x in quantities.items() if not x.isfinite().all()]:
        raise NotFinite(names[0])


def expect(right: bool, name: str, value, what: str) -> None:
    if not right:
        raise ValueError(f"{name} is {value!r}: expected {what}")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --------------------------------------------------------------------------------------------------- a folder
def check_new(out: str) -> None:
    """ValueError for a folder that is not empty, but for what a run leaves that is killed as it begins."""
    path = Path(out)
    empty = path.is_dir() and {x.name for x in path.iterdir()} <= {"lock", "run.tmp"}
    expect(empty or not path.exists(), "out", out, f"a new folder, or --resume {quote(out)} to go on in it")


def hold(out: str) -> None:
    """ValueError where another process holds the folder. However a process ends, it holds it no longer. Not
    seen: another thread; and on Windows, or on a disk without locks, anybody."""
    LOCKS[out] = LOCKS.get(out) or open(Path(out) / "lock", "ab")
    with suppress(ImportError, OSError):
        import fcntl
        try:
            fcntl.flock(LOCKS[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            expect(False, "out", out, "a folder in which no other process is at work")


def begin(run) -> None:
    """Write run.json: command, config, and for each part of the run what made it; and restore run.state.
    ValueError: of two runs that begin in a folder, one does."""
    out, state, config = Path(run.config.out), run.state, asdict(run.config)
    out.mkdir(parents=True, exist_ok=True)
    hold(run.config.out)
    expect(config["resume"] or not (out / "run.json").exists(), "out", str(out), "a folder without run.json")
    parts = settings(out).get("parts", []) if config["resume"] else []
    if state:
        restore(run)
    git = "git describe --always --dirty"  # nothing where there is none
    commit = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    device = config["device"] + (f" ({torch.cuda.get_device_name()})" if "cuda" in config["device"] else "")
    made = dict(command=sys.argv, commit=commit, torch=torch.__version__, device=device,
                transformers=transformers.__version__, datasets=datasets.__version__)
    config |= dict(model=config["model"].removeprefix(f"{ROOT}{os.sep}"))  # a checkout may move
    content = dict(command=join(sys.orig_argv).split(" --")[0], config=config, parts=[*parts, made])
    _write(out / "run.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
    with open(out / "metrics.jsonl", "ab") as file:
        file.truncate(state["size"] if state else 0)  # what is behind the checkpoint is made again


def settings(out: str | Path, kind: type | None = None, name: str = "resume") -> dict:
    """What run.json says, the model where it is now. ValueError: it is none, or of another kind of config.
    name: of the option that is `out`."""
    try:
        made = json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))
        config, model = made["config"], made["config"]["model"]
        other = config.keys() ^ (kind.__dataclass_fields__ if kind else config).keys()
        if not Path(model).exists():  # as a checkout was moved, which held the whole path
            model = re.sub(r"^/.*/(?=tiny_vlm(/wordy)?$)", "", model)
        if (ROOT / model).exists():
            config["model"] = str(ROOT / model)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is {str(out)!r}: expected a run's folder ({type(error).__name__}: {error})")
    expect(not other, name, str(out), f"a run with this command's options ({min(other, default='')} is not "
           f"common to both), as that of {made.get('command')} --resume {quote(str(out))}")
    return made


def metrics(out: str | Path, rows: int | None = None) -> tuple[list[dict], int]:
    """The first rows of metrics.jsonl, or all, and their bytes. ValueError: one is torn, or out of place."""
    lines = (Path(out) / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:rows]
    for i, line in enumerate(lines + [b""] * ((rows or 1) - len(lines))):
        whole = re.fullmatch(rb'{"iteration": %d, .*}\r?\n' % i, line)
        expect(whole, f"line {i + 1} of {out}/metrics.jsonl", line[:40], f"that of iteration {i}, whole")
    return [*map(json.loads, lines)], sum(map(len, lines))


def log(out: Path, row: dict) -> dict:
    """Append a row to metrics.jsonl; nan, which JSON does not know, is None. -> the row."""
    row = {k: None if v != v else v for k, v in row.items()}
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())  # before a checkpoint that needs it
    return row


def _write(path: Path, write: Callable) -> None:
    """A file that is whole or not there, even after a power cut."""
    with open(path.with_name(path.stem.rstrip("-0123456789") + ".tmp"), "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # of torch.save, on a full disk
            raise OSError(f"{file.name} could not be written ({first_line(error)})") from error
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


# ------------------------------------------------------------------------------------------------ checkpoints
def checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """(iteration, file), in order. A file of any other name is somebody's own."""
    return sorted((int(path.stem[11:]), path) for path in Path(out).glob("checkpoint-*.pt")
                  if re.fullmatch("[0-9]{5,}", path.stem[11:]))


def save_checkpoint(run, **more) -> None:
    """All that what comes next depends on, in a file that is whole or not there. The one before stays.
    run: a train_small.Run. more: `iteration`, and what else is to be kept."""
    config, i = run.config, more["iteration"]
    state = dict(more, form=FORM, algo=config.algo, out=config.out, policy=run.policy.state_dict(),
                 critic=run.critic and run.critic.state_dict(), random=random_numbers(),
                 optimizers=[optimizer.state_dict() for _, optimizer in run.optimizers])
    _write(Path(config.out) / f"checkpoint-{i:05}.pt", lambda file: torch.save(state, file))
    for _, old in [each for each in checkpoints(config.out) if each[0] <= i][:-2]:
        old.unlink()


def read_checkpoint(out: str) -> dict | None:
    """The last one that can be read in a run's folder, and the `history` up to it; None: the run was stopped
    before its first. What is pickled in it is never run."""
    hold(out)
    for i, path in reversed(found := checkpoints(out)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            expect((state["form"], state["iteration"]) == (FORM, i), "form", state["form"], f"{FORM}, of {i}")
        except Exception as error:  # torn or foreign: of any kind
            print(f"{path} cannot be read ({first_line(error)}): the one before it is used", file=sys.stderr)
        else:
            history, size = metrics(out, rows=i + 1)
            return state | dict(history=history, size=size)
    rows = [line for file in Path(out).glob("metrics.jsonl") for line in file.open("rb")]
    expect(not found and len(rows) < 2, "resume", str(out), "a folder with a checkpoint that can be read")


def restore(run) -> None:
    """Models, optimizers and random numbers as they were at run.state, a checkpoint."""
    state = run.state
    run.policy.load_state_dict(state.pop("policy"))  # not kept twice
    if run.critic:
        run.critic.load_state_dict(state.pop("critic"))
    for (_, optimizer), its in zip(run.optimizers, state.pop("optimizers")):
        optimizer.load_state_dict(its)
    random_numbers(state["random"])


def random_numbers(then: dict = {}) -> dict:
    """The states of torch's, on the CPU and on GPUs. They become `then`, where it has one."""
    places = {f"cuda:{i}": (torch.cuda, i) for i in range(torch.cuda.device_count())} | {"cpu": (torch,)}
    places |= {"mps": (torch.mps,)} if torch.backends.mps.is_available() else {}
    now = {name: module.get_rng_state(*at) for name, (module, *at) in places.items()}
    for name in now.keys() & then.keys():
        places[name][0].set_rng_state(then[name], *places[name][1:])
    return now


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
        _write(Path(run.config.out) / f"not-finite-{i}.pt", lambda file: torch.save(batch, file))
        return (dict(not_finite=str(error)),)


# ------------------------------------------------------------------------------------------------- complaints
def warn(history: list[dict], config, said: set[str]) -> None:
    """Print each of `complaints` when it is first true. NotFinite: three times in a row. NothingToLearn."""
    for sentence in set(complaints(history, config.warmup)) - said:
        tqdm.write(f"iteration {history[-1]['iteration']}: {sentence}", file=sys.stderr)
        said.add(sentence)
    if all("not_finite" in row for row in history[-3:]):
        raise NotFinite(f"{history[-1]['not_finite']} was not finite three times in a row (the batches: "
                        f"{config.out}/not-finite-*.pt): try a lower --lr, --critic-lr or --head-lr")
    rewards = {row.get("reward") for row in history[-config.patience:]}
    if 0 < config.patience < len(history) and rewards in ({0}, {1}):
        raise NothingToLearn(
            f"all rewards of {config.patience} iterations were {rewards.pop():g}: warm-start the model "
            "(python -m examples.warm_start), raise --max-tokens, or take another reward; --patience 0 "
            "goes on")


def complaints(history: list[dict], warmup: int) -> Iterator[str]:
    """What cannot learn says so."""
    rows = [row for row in history if "reward" in row]
    row, first, last = (rows or [{}])[-1], (rows or [{}])[0], rows[-5:]
    explained = [r.get("explained_variance") or 0 for r in last if r["iteration"] > warmup + 1]
    if row.get("truncated") == 1:
        yield "all responses are cut off: raise --max-tokens"
    if row.get("unreadable", 0) > 0.5:
        yield "more than half of the responses do not have the format of the instruction"
    if row.get("with_roles", 1) < 0.5 and row["unreadable"] <= 0.5:
        yield "more than half of the responses have no roles: SRPO is GRPO there (see srpo.split_roles)"
    if row.get("first_ratio_deviation", 0) > 1e-3:
        yield "the ratio is not 1 before the first step: scoring differs from sampling"
    if len(explained) == 5 and fmean(explained) < 0:
        yield "the critic is worse than a constant: lower --critic-lr or --head-lr"
    if row.get("entropy", 1) < first.get("entropy", 0) / 100:
        yield "the entropy fell to a hundredth: lower --lr"


# ------------------------------------------------------------------------------------------- the end of a run
@contextmanager
def signals(noted: list | None = None) -> Iterator[None]:
    """SIGINT and SIGTERM are KeyboardInterrupts, but the first goes into `noted`, an empty list. In the main
    thread, which alone gets any; afterwards they are what they were."""
    def handle(number, _):
        if noted != []:
            raise KeyboardInterrupt("stopped")
        noted.append(number)

    with ExitStack() as back:
        with suppress(ValueError):  # raised in another thread
            for number in (signal.SIGINT, signal.SIGTERM):
                back.callback(signal.signal, number, signal.signal(number, handle) or signal.SIG_DFL)
        yield


@contextmanager
def one_line(name: str, *errors: type, status: int = 2, go_on: str = "", micro_tokens: int = 0) -> Iterator:
    """These errors, too little memory, and signals end a command with one line. name: of the command. go_on:
    the folder of a run that can go on."""
    getattr(sys.stdout, "reconfigure", lambda errors: None)(errors="replace")  # it may know ASCII alone
    try:
        with signals():
            yield
    except (*errors, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        said = first_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            phase = next((phase for phase in PHASES if phase in frames), "load")
            size = micro_tokens or "all at once"
            said = f"out of memory in {phase}: halve --micro-tokens (now {size}) or --max-tokens"
        said += f". Go on from the last checkpoint: python {name} --resume {quote(go_on)}" if go_on else ""
        print(f"{name}: {said}", file=sys.stderr)
        LOCKS.clear()  # in a notebook the process lives on
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else status)
