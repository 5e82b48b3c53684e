"""The command line: a flag for each field of a config, its default, its help, and what it may be.

Options that an algorithm's step reads are in train_small.Config, those of a run in its base RunOptions. Every
error names the option, its value and what was expected, before any work is done.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg, HfArgumentParser

import toy_env
from support.run_folder import ROOT, expect, first_line, settings

TINY_VLM = str(ROOT / "tiny_vlm")
WORDY = str(Path(TINY_VLM) / "wordy")  # the same model, which also knows filler words

# What an option that is not given becomes, unless train_small.ALGORITHMS says otherwise.
PAPER = dict(lr=1e-6, critic_lr=2e-6, head_lr=2e-6, max_tokens=2048,  # SAPO, Table 7
             clip_low=0.2, clip_high=0.2)  # PPO's
REAL = dict(micro_tokens=8192, train_vision=False, checkpointing=True)  # ours, to fit 24 GB
TOY = dict(lr=2e-5, critic_lr=2e-5, head_lr=1e-3)  # ours, of 135 M parameters in the toy world
TINY = dict(lr=1.6e-4, critic_lr=5e-5, head_lr=2e-3,  # ours, on tiny_vlm
            micro_tokens=0, train_vision=True, checkpointing=False, dtype="float32")
ADAPTERS = dict(lr=1e-5, critic_lr=1e-5, head_lr=1e-5)  # ours


@dataclass
class RunOptions:
    """The options of a run and its problems. train_small.Config adds those of the algorithm."""

    seed: int = HfArg(default=0, help="seed of sampling, problems and mini-batches")
    iterations: int = HfArg(default=30, help="each samples, scores and updates (paper: 200)")
    patience: int = HfArg(default=5, help="stop when all rewards of so many iterations are 0, or 1; 0: never")
    eval_every: int = HfArg(default=10, help="iterations between evaluations")
    eval_problems: int = HfArg(default=256, help="held-out problems per evaluation")
    device: str | None = HfArg(default=None, help="cuda, mps or cpu (the first there is)")
    out: str | None = HfArg(default=None, help="the run's folder, a new one (runs/ALGO-SEED)")
    resume: str | None = HfArg(default=None, help="a run's folder: go on from its last checkpoint")
    save: bool = HfArg(default=False, help="save the trained model in OUT/model, its critic in OUT/critic.pt")
    model: str | None = HfArg(default=None, help="folder or hub name for from_pretrained (tiny_vlm)")
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None, help="of passes and a frozen base (bfloat16 where a GPU has it; tiny_vlm: float32)")
    lora: int = HfArg(default=0, help="rank of adapters on a frozen base; 0: train all weights")
    checkpointing: bool | None = HfArg(default=None, help="recompute activations in the backward pass")
    train_vision: bool | None = HfArg(default=None, help="train vision tower and projector too")
    operands: int = HfArg(default=4, help="numbers in a question, 2 to 8")
    distractors: int = HfArg(default=0, help="toy world: cells that the question does not use")
    operators: str = HfArg(default="+-", help="any of +-×")
    prior: float = HfArg(default=0.0, help="toy world: share of training questions that tell the answer")
    openings: Literal[tuple(toy_env.OPENED)] = HfArg(default="none", help="filler words in the responses")


GROUPS = {  # of the options in --help
    "algorithm": "algo segments top_percent lam kl_coef clip_low clip_high",
    "run": "seed iterations responses lr eval_every device out resume save",
    "model and data": "model dataset max_tokens",
    "toy world": "operands operators openings",
    "memory": "micro_tokens checkpointing",
    "large models": "dtype lora memory",
}
MAY_CHANGE = {"iterations", "patience", "device", "out", "resume"}  # where a run goes on
RANGES = dict.fromkeys(("iterations", "mini_batches", "epochs", "eval_every"), (1, math.inf)) | dict(
    seed=(0, 2**32 - 1), micro_tokens=(0, math.inf), lora=(0, 1024),  # toy_env checks its own
    critic_warmup=(0, math.inf), patience=(0, math.inf),
    responses=(1, 10_000), eval_problems=(1, 10_000),  # all in memory, and an accuracy is known to 0.005
    max_tokens=(2, 100_000), lr=(1e-12, 1), critic_lr=(1e-12, 1), head_lr=(1e-12, 1), temperature=(0.01, 100),
    top_percent=(1, 100), gamma=(0, 1), lam=(0, 1), lam_returns=(0, 1), kl_coef=(0, 100), clip_low=(0, 1),
    clip_high=(0, 100), weight_temperature=(0.01, 100), weight_clip=(0.01, 0.99))


# ------------------------------------------------------------------------------------------------------ parse
class Parser(HfArgumentParser):
    """Raises where argparse would exit. Its help has one line an option."""

    def error(self, message):
        raise ValueError(message)

    def format_help(self, every: bool = False) -> str:
        flags = {action.dest: action for action in self._actions if action.dest != "help"}
        toy = "dataset" not in flags
        groups = {title: [name for name in names.split() if name in flags] for title, names in GROUPS.items()
                  if title != ("large models" if toy else "toy world")}
        groups["others"] = sorted(flags.keys() - sum(groups.values(), [])) if every else ["help_all"]
        lines = [self.description]
        for title, names in groups.items():
            lines += ["", title]
            lines += [f"  --{name.replace('_', '-'):20}{flags[name].help}{told(flags[name], toy)}"
                      for name in names]
        return "\n".join(lines) + "\n"


def told(flag, toy: bool) -> str:
    """The choices and the default of an option, in the toy world's command or in a data set's."""
    name, defaults = flag.dest, PAPER | REAL | (TOY if toy else {})
    default = defaults.get(name) if flag.default is None else flag.default
    said = [" | ".join(map(str, flag.choices))] if flag.choices else []
    if toy and name in TINY.keys() & defaults.keys():
        said.append(f"default {TINY[name]}; models other than tiny_vlm: {default}")
    elif default not in (None, False) and not (toy and name == "max_tokens"):
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
    saved = settings(config.resume, kind)["config"]
    its = {name: str(x) for name, x in saved.items() if x is not None}  # texts, as only these are checked
    parser.set_defaults(**its | dict(resume=None, out=None))
    config, _ = parser.parse_args_into_dataclasses(arguments)
    for name, value in saved.items():
        x = getattr(config, name)
        expect(x == value or name in MAY_CHANGE, name, x, f"{value!r}, as in {config.resume}")
    return config


# --------------------------------------------------------------------------------------- complete, then check
def complete(config, algorithms: dict[str, dict]):
    """The config with every None replaced (but for GAE's, where there is no critic), or ValueError before any
    work is done. algorithms: what is peculiar to each."""
    expect(config.algo in algorithms, "algo", config.algo, f"one of {', '.join(algorithms)}")
    model = config.model or (TINY_VLM if config.openings == "none" else WORDY)
    own = str(Path(model).resolve())
    expect(own != TINY_VLM or config.openings == "none", "model", model, f"{WORDY}, which knows the openings")
    device = config.device or best_device()
    bfloat16 = device.startswith("cuda") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    defaults = PAPER | REAL | dict(device=device, dtype="bfloat16" if bfloat16 else "float32",
                                   out=config.resume or f"runs/{config.algo}-{config.seed}")
    defaults |= algorithms[config.algo] | (ADAPTERS if config.lora else {})
    if not hasattr(config, "dataset"):
        defaults |= dict(max_tokens=16 * config.operands + 40) | (TINY if is_tiny(model) else TOY)
        defaults |= dict(lam=0.9) if config.algo == "sapo" else {}  # ours, for a dozen segments a response
    defaults |= dict(train_vision=False) if config.lora else {}
    missing = {name: x for name, x in defaults.items() if getattr(config, name) is None}
    config = replace(config, model=model, **missing)
    check(config)
    return config


def is_tiny(model: str) -> bool:
    """Whether tiny_vlm.make made it: its chat template leaves the instruction out, as tiny_vlm's does."""
    its, own = (Path(folder, "chat_template.jinja") for folder in (model, TINY_VLM))
    return its.is_file() and its.read_bytes() == own.read_bytes()


def check(config) -> None:
    """ValueError for a number out of its range, for two that cannot go together, or for no such device."""
    def must(name: str, right: bool, what: str):
        expect(right, name, getattr(config, name), what)

    for name in ("lam", "lam_returns"):
        must(name, config.critic or getattr(config, name) is None, f"none, as {config.algo} has no critic")
    for name, (low, high) in RANGES.items():
        number = getattr(config, name)
        must(name, number is None or low <= number <= high, f"a number from {low:g} to {high:g}")
    must("kl_coef", config.algo != "gspo" or not config.kl_coef, "0 for gspo, which has no reference")
    must("critic_warmup", not config.critic or config.critic_warmup < config.iterations,
         f"less than the {config.iterations} iterations, or the policy never learns")
    must("train_vision", not (config.train_vision and config.lora),
         "false with lora, which adapts the language model")
    must("responses", config.responses % (config.group * config.mini_batches) == 0,
         f"a multiple of {config.mini_batches} mini-batches × {config.group} responses per prompt")
    must("out", config.resume in (None, config.out), f"none, as --resume goes on in {config.resume}")
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
