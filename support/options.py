"""The command line: a flag for each field of a config, and what its values may be.

For train_small.py. Every error names the option, its value, and what was expected.
"""

import math
from dataclasses import replace

import torch
from transformers.hf_argparser import HfArgumentParser

from support.run_folder import first_line, settings

MAY_CHANGE = "iterations", "device", "out", "resume"  # where a run goes on
COUNTS = "iterations", "responses", "mini_batches", "epochs", "eval_every", "eval_problems"
RANGES = dict.fromkeys(COUNTS, (1, math.inf)) | dict(  # least and most; toy_env checks its own
    seed=(0, 2**32 - 1), micro_batch=(0, math.inf), critic_warmup=(0, math.inf), max_tokens=(2, math.inf),
    lr=(1e-12, 1), critic_lr=(1e-12, 1), head_lr=(1e-12, 1), temperature=(0.01, 100), top_percent=(0.01, 100),
    gamma=(0, 1), lam=(0, 1), lam_returns=(0, 1), kl_coef=(0, 100), clip_low=(0, 1), clip_high=(0, 100),
    weight_temperature=(0.01, 100), weight_clip=(0.01, 0.99))


def parse_arguments(kind: type, description: str, arguments: list[str] | None = None):
    """The command line as a dataclass of this kind, a flag for each field; `resume` and `out` must be among
    them. With --resume, the settings are those in that run's folder."""
    parser = HfArgumentParser(kind, description=description)

    def refuse(message):
        raise ValueError(message)

    parser.error = refuse  # without the usage of 40 options before it
    config = parser.parse_args_into_dataclasses(arguments)[0]
    if config.resume is None:
        return config
    saved = {k: v for k, v in settings(config.resume).items() if k not in ("resume", "out")}
    parser.set_defaults(**saved)
    config = parser.parse_args_into_dataclasses(arguments)[0]
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)}: expected {value}, as in {config.resume}")
    return replace(config, out=config.resume)


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
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {config.device!r}: expected one of this machine ({first_line(error)})")


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
