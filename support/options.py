"""The command line: a flag for each field of a config, its default, its help, and what it may be.

train_small.Config has the options that a person sets, its base StudyOptions all others. Every error names the
option, its value and what was expected, before any work is done.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg, HfArgumentParser

import toy_env
from support.run_folder import first_line, settings

TINY_VLM = str(Path(__file__).resolve().parent.parent / "tiny_vlm")
WORDY = str(Path(TINY_VLM) / "wordy")  # the same model, which also knows filler words

# What an option that is not given becomes, unless train_small.ALGORITHMS says otherwise.
PAPER = dict(lr=1e-6, critic_lr=2e-6, head_lr=2e-6, max_tokens=2048,  # SAPO, Table 7
             clip_low=0.2, clip_high=0.2, micro_batch=2)  # PPO's; ours
TUNED = dict(lr=1.6e-4, critic_lr=5e-5, head_lr=2e-3, micro_batch=0)  # ours, on tiny_vlm


@dataclass
class StudyOptions:
    """Options that studies set, and nobody else needs to: --help-all shows them."""

    mini_batches: int = HfArg(default=4, help="updates per epoch over an iteration's responses (paper: 4)")
    epochs: int = HfArg(default=1, help="passes over the responses of an iteration (paper: 1)")
    critic_warmup: int = HfArg(default=5, help="first iterations, for a critic alone (ours, after VC-PPO)")
    critic_lr: float | None = HfArg(default=None, help="learning rate of the critic's pretrained part")
    head_lr: float | None = HfArg(default=None, help="learning rate of the critic's value head")
    temperature: float = HfArg(default=1.0, help="sampling temperature, also applied in scoring")
    gamma: float = HfArg(default=1.0, help="discount per segment (paper: 1)")
    lam_returns: float | None = HfArg(default=None, help="lambda of the returns, if another (VC-PPO: 1)")
    ratio: Literal["segment", "token"] = HfArg(default="segment", help="SAPO's importance ratio (Table 2)")
    value_at: Literal["start", "last"] = HfArg(
        default="start", help="V is read before this token of a segment (official code: last)")
    whiten: bool = HfArg(default=False, help="whiten advantages that come from a critic (official code)")
    contrast: Literal["blind", "blank"] = HfArg(
        default="blind", help="SRPO: score reasoning without the image, or with the readings blanked")
    weight_temperature: float = HfArg(default=1.0, help="SRPO: divides the contrasts (S4)")
    weight_clip: float = HfArg(default=0.5, help="SRPO: weights are clipped to 1 ± this (S4)")
    corruption: Literal["patches", "noise", "blur", "blank"] = HfArg(
        default="patches", help="SRPO: how images are corrupted")
    sign_aware: bool = HfArg(default=False, help="SRPO: turn weights around where the advantage is negative")
    distractors: int = HfArg(default=0, help="toy world: cells that the question does not use")
    prior: float = HfArg(default=0.0, help="toy world: share of training questions that tell the answer")
    eval_problems: int = HfArg(default=256, help="held-out problems per evaluation")


GROUPS = {  # of the options in --help
    "algorithm": "algo segments top_percent lam kl_coef clip_low clip_high",
    "run": "seed iterations responses lr eval_every device out resume save",
    "model and data": "model dataset max_tokens",
    "toy world": "operands operators openings",
    "memory": "micro_batch dtype lora checkpointing memory",
}
MAY_CHANGE = "iterations", "device", "out", "resume"  # where a run goes on
COUNTS = "iterations", "responses", "mini_batches", "epochs", "eval_every", "eval_problems"
RANGES = dict.fromkeys(COUNTS, (1, math.inf)) | dict(  # least and most; toy_env checks its own
    seed=(0, 2**32 - 1), micro_batch=(0, math.inf), critic_warmup=(0, math.inf), max_tokens=(2, math.inf),
    lr=(1e-12, 1), critic_lr=(1e-12, 1), head_lr=(1e-12, 1), temperature=(0.01, 100), top_percent=(1, 100),
    gamma=(0, 1), lam=(0, 1), lam_returns=(0, 1), kl_coef=(0, 100), clip_low=(0, 1), clip_high=(0, 100),
    weight_temperature=(0.01, 100), weight_clip=(0.01, 0.99))


# ------------------------------------------------------------------------------------------------------ parse
class Parser(HfArgumentParser):
    """Raises where argparse would exit. Its help has one line an option."""

    def error(self, message):
        raise ValueError(message)

    def format_help(self, every: bool = False) -> str:
        flags = {action.dest: action for action in self._actions if action.dest != "help"}
        groups = {title: [name for name in names.split() if name in flags] for title, names in GROUPS.items()
                  if title != "toy world" or "dataset" not in flags}
        groups["others"] = sorted(flags.keys() - sum(groups.values(), [])) if every else ["help_all"]
        lines = [self.description]
        for title, names in groups.items():
            lines += ["", title]
            lines += [f"  --{name.replace('_', '-'):20}{flags[name].help}{told(flags[name])}" for name in names]
        return "\n".join(lines) + "\n"


def told(flag) -> str:
    """The choices and the default of an option."""
    default = PAPER.get(flag.dest) if flag.default is None else flag.default
    said = [" | ".join(map(str, flag.choices))] if flag.choices else []
    if flag.dest in TUNED:
        said.append(f"default {TUNED[flag.dest]:g}; models other than tiny_vlm: {default:g}")
    elif default is not None and default is not False:
        said.append(f"default {default}")
    return f" [{'; '.join(said)}]" if said else ""


def parse_arguments(kind: type, description: str, arguments: list[str] | None = None):
    """The command line as a dataclass of this kind, a flag for each field; `resume` and `out` must be among
    them. With --resume, the settings are those in that run's folder."""
    parser = Parser(kind, description=description)
    parser.add_argument("--help-all", action="store_true", help="show all options")
    config, asked = parser.parse_args_into_dataclasses(arguments)
    if asked.help_all:
        parser.exit(message=parser.format_help(every=True))
    if config.resume is None:
        return config
    saved = {k: v for k, v in settings(config.resume).items() if k not in ("resume", "out")}
    parser.set_defaults(**saved)
    config, _ = parser.parse_args_into_dataclasses(arguments)
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)}: expected {value}, as in {config.resume}")
    return replace(config, out=config.resume)


# --------------------------------------------------------------------------------------- complete, then check
def complete(config, algorithms: dict[str, dict]):
    """The config with every None replaced (but for GAE's, where there is no critic), or ValueError before any
    work is done. algorithms: what is peculiar to each."""
    if config.algo not in algorithms:
        raise ValueError(f"algo is {config.algo!r}: expected one of {', '.join(algorithms)}")
    if config.model is None:
        config = replace(config, model=TINY_VLM if config.openings == "none" else WORDY)
    own = str(Path(config.model).resolve())
    if own == TINY_VLM and config.openings != "none":
        raise ValueError(f"model is {config.model!r}: expected {WORDY}, which knows the openings")
    defaults = PAPER | dict(device=best_device(), out=f"runs/{config.algo}-{config.seed}")
    defaults |= algorithms[config.algo]
    if own in (TINY_VLM, WORDY):
        defaults |= TUNED | dict(max_tokens=16 * config.operands + 40)
        defaults |= dict(lam=0.9) if config.algo == "sapo" else {}  # ours, for a dozen segments a response
    missing = {name for name, value in asdict(config).items() if value is None}
    config = replace(config, **{name: x for name, x in defaults.items() if name in missing})
    check(config)
    return config


def check(config) -> None:
    """ValueError for a number out of its range, for two that cannot go together, or for no such device."""
    for name in ("lam", "lam_returns"):
        if not config.critic and getattr(config, name) is not None:
            raise ValueError(f"{name} is {getattr(config, name)}: expected none, as {config.algo} has no "
                             "critic")
    for name, (low, high) in RANGES.items():
        number = getattr(config, name)
        if number is not None and not low <= number <= high:
            raise ValueError(f"{name} is {number}: expected a number from {low:g} to {high:g}")
    if config.algo == "gspo" and config.kl_coef:
        raise ValueError(f"kl_coef is {config.kl_coef}: expected 0 for gspo, which has no reference")
    if config.critic and config.critic_warmup >= config.iterations:
        raise ValueError(f"critic_warmup is {config.critic_warmup}: expected 0 or more, and less than the "
                         f"{config.iterations} iterations, or the policy never learns")
    if config.responses % (config.group * config.mini_batches):
        raise ValueError(f"responses is {config.responses}: expected a multiple of {config.mini_batches} "
                         f"mini-batches × {config.group} responses per prompt")
    for prior in (config.prior, 0.0, float(config.prior > 0)):  # raises for one that cannot be drawn
        toy_env.make_problem(0, prior=prior, **difficulty(config))
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {config.device!r}: expected one of this machine ({first_line(error)})")


def difficulty(config) -> dict:
    """Of the toy world's problems, as toy_env.make_problem takes it."""
    return dict(operands=config.operands, distractors=config.distractors, operators=config.operators,
                openings=config.openings)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
