"""What is to be learned: problems and a reward. The toy world's; your own: examples/own_data.py."""

import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, SupportsFloat

from tqdm import tqdm

import toy_env
from support.options import difficulty
from toy_env import Problem

INSTRUCTION = (  # for models that do not know the format; tiny_vlm's chat template leaves it out
    "Read the numbers of all cells in reading order inside <perception></perception>, compute from left to "
    "right, one line per operation, inside <think></think>, and give the final number inside "
    "<answer></answer>. For example, green + cyan - red = ? of a picture with cyan 9, red 3 and green 4:\n"
    "<perception> cyan 9, red 3, green 4 </perception> <think> green 4 + cyan 9 = 13\n13 - red 3 = 10 "
    "</think> <answer> 10 </answer>")


class Task(NamedTuple):
    """What is to be learned. For your own data and reward see examples/real_vlm.py."""

    stream: Iterator[Problem]  # for training, endless
    held_out: list[Problem]  # for evaluation, the same for every run
    instruction: str
    reward: Callable[[Problem, str], float]  # of a problem and a response's text, from 0 to 1
    skipped: Collection = ()  # rows of a data set that could not be read
    tiles: bool = True  # a model may cut its pictures into tiles; else small ones are enlarged

    def rewards(self, problems: list[Problem], texts: list[str], truncated: list[bool]) -> list[float]:
        """Of responses, as floats: 0 for a truncated one; nan for what is no finite number, and named."""
        found = [0 if cut else self.reward(*pair) for *pair, cut in zip(problems, texts, truncated)]
        wrong = [i for i, x in enumerate(found) if not isinstance(x, SupportsFloat) or not math.isfinite(x)]
        for i in wrong[:1]:
            tqdm.write(f"reward is {found[i]!r:.50} of {texts[i]!r:.200}: expected a number", file=sys.stderr)
        return [math.nan if i in wrong else float(x) for i, x in enumerate(found)]


def take_prompts(config, task: Task) -> list[Problem]:
    """The next problems of an iteration, each `group` times in a row: as many as there are responses."""
    problems = itertools.islice(task.stream, config.responses // config.group)
    return [problem for problem in problems for _ in range(config.group)]


def toy_task(config) -> Task:
    """The toy world. `prior` holds in training problems alone."""
    seeds = itertools.count(config.seed * 10**9)
    stream = (toy_env.make_problem(i, prior=config.prior, **difficulty(config)) for i in seeds)
    held_out = toy_env.make_problems(config.eval_problems, split="eval", **difficulty(config))
    return Task(stream, held_out, INSTRUCTION, toy_env.reward, tiles=False)
