"""Imitation first, for a model that has never seen the response format: then it can learn from reward.

    python -m examples.warm_start --model HuggingFaceTB/SmolVLM-256M-Instruct --out runs/warm
    python train_small.py --model runs/warm

On toy problems it imitates tiny_vlm's sloppy teacher, whose slips and habits are what reward is to remove.
Language model and projector learn; the vision tower, which holds Qwen-VL's projector, with --train-vision.
The loop is in tiny_vlm/imitation.py. Ran on a CPU: tiny models, and four steps of examples/smol_llava.py's.
"""

import itertools
import math
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shlex import join

import torch
import transformers
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import train_small
from support import models, options
from support.run_folder import NotFinite, expect, one_line
from tiny_vlm.imitation import TEACHER, imitate, mean_loss
from tiny_vlm.teacher import demonstration


@dataclass
class WarmConfig:
    model: str = HfArg(help="folder or hub name for from_pretrained")
    out: str = HfArg(default="runs/warm", help="folder of the new model: a new one, or an empty one")
    steps: int = HfArg(default=500, help="of imitation, unless --minutes are over before")
    minutes: float = HfArg(default=math.inf, help="of imitation, unless --steps are over before")
    batch: int = HfArg(default=64, help="demonstrations per step")
    micro_batch: int = HfArg(default=8, help="demonstrations per pass")
    lr: float = HfArg(default=2e-4, help="learning rate, falls to 0 over the last third of steps or minutes")
    projector_lr: float | None = HfArg(default=None, help="the projector's (lr; for a new one: 10 × lr)")
    train_vision: bool = HfArg(default=False, help="train the vision tower too")
    truth: float = HfArg(default=0.0, help="weight of a head that learns to spot errors, as tiny_vlm had: 1")
    operands: int = HfArg(default=4, help="numbers in a question, 2 to 8")
    max_tokens: int | None = HfArg(default=None, help="longest response (as in train_small.py)")
    eval_problems: int = HfArg(default=128, help="held-out problems, the first 64 for the held-out loss")
    seed: int = HfArg(default=0, help="seed of problems and demonstrations")
    device: str | None = HfArg(default=None, help="cuda, mps or cpu (the first there is)")


RANGES = dict(steps=(1, math.inf), minutes=(1e-3, math.inf), batch=(1, 10_000), micro_batch=(1, 10_000),
              projector_lr=(1e-12, 1), truth=(0, 1000), seed=(0, 2**32 - 1))
CARD = """{0.model} after {steps} steps of imitating a teacher with {teacher} on {0.operands} operands.
Made by `python -m examples.warm_start {options}`. Held-out loss {before:.3f} before, {after:.3f}
after. Accuracy on {0.eval_problems} held-out problems {accuracy_sampled:.3f}, greedy {accuracy_greedy:.3f}.
"""


class Parser(options.Parser):
    format_help = HfArgumentParser.format_help  # the other is for train_small's options


def complete(config: WarmConfig) -> train_small.Config:
    """Settings of RL on such problems, with a seed of its own. ValueError: one is wrong."""
    for name, (low, high) in RANGES.items():
        number = getattr(config, name)
        expect(number is None or low <= number <= high, name, number, f"a number from {low:g} to {high:g}")
    out, device = Path(config.out), config.device or options.best_device()
    expect(not out.is_file() and not any(out.glob("*")), "out", config.out, "a new folder, or an empty one")
    same = {x: getattr(config, x) for x in ("model", "lr", "operands", "max_tokens", "eval_problems")}
    return train_small.complete(train_small.Config(
        algo="grpo", kl_coef=0.0, seed=2**32 - 1 - config.seed, train_vision=True, device=device,
        checkpointing=device.startswith("cuda"), **same))


def warm_start(config: WarmConfig) -> str:
    """Imitate, measure, and write OUT, whole or not at all. -> its card."""
    run, rng, out = complete(config), random.Random(config.seed), Path(config.out)
    torch.manual_seed(config.seed)
    whole, processor = models.load_policy(run.model, run.device)
    whole.get_encoder("image").requires_grad_(config.train_vision)
    model, task = models.make_roles(run, whole)[0], train_small.toy_task(run)
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
    answered = lambda problems, rng: (problems, [demonstration(p, rng, **TEACHER) for p in problems])
    draw = lambda step: answered([*itertools.islice(task.stream, config.batch)], rng)
    held_out = answered(task.held_out[:64], random.Random(2**32))  # the same for every seed

    def measure(step: int, both=None) -> float:
        if both is None or step % 50 == 0 and step < config.steps:
            loss = mean_loss(model, head, processor, task, *held_out, config.micro_batch, run.max_tokens)
            tqdm.write(f"{step} steps: held-out loss {loss:.3f}")
            return loss

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # on the same disk
        before, made = measure(0), Path(folder) / "model"
        steps = imitate(model, head, processor, task, draw, config.steps, config.lr, config.projector_lr,
                        config.truth, config.micro_batch, config.minutes, run.max_tokens, measure)
        card = CARD.format(config, steps=steps, before=before, after=measure(steps), teacher=TEACHER,
                           options=join(sys.argv[1:]), **train_small.evaluate(run, model, processor, task)[0])
        model.save_pretrained(made)
        processor.save_pretrained(made)
        (made / "README.md").write_text(card, encoding="utf-8")
        made.rename(out)
    return card


def main(arguments: list[str] | None = None) -> None:
    transformers.utils.logging.disable_progress_bar()
    with one_line("-m examples.warm_start", ValueError, OSError, NotFinite):
        parser = Parser(WarmConfig, description=__doc__.split("\n")[0])
        [config] = parser.parse_args_into_dataclasses(arguments)
        try:
            print(warm_start(config))
        except torch.OutOfMemoryError:
            expect(False, "micro_batch", config.micro_batch, "less, as the memory is full")


if __name__ == "__main__":
    main()
