"""Problems to learn from: the toy world's, or those of a data set of images, questions and answers.

A problem of a data set needs an image, a question and an answer; what else the toy world's have (`cells`,
`steps`) stays empty. `load_dataset` takes a folder or a name. Geometry3K's columns are known too.
"""

import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import datasets
from tqdm import tqdm

import toy_env
from support.options import difficulty
from support.run_folder import first_line
from toy_env import Problem

INSTRUCTION = (  # for models that do not know the format; tiny_vlm's chat template leaves it out
    "Read the numbers of all cells in reading order inside <perception></perception>, compute from left to "
    "right, one line per operation, inside <think></think>, and give the final number inside "
    "<answer></answer>.")
COLUMNS = ("image", "images"), ("question", "problem"), ("answer",)


class Task(NamedTuple):
    """What is to be learned. For your own data and reward see examples/real_vlm.py."""

    stream: Iterator[Problem]  # for training, endless
    held_out: list[Problem]  # for evaluation, the same for every run
    instruction: str
    reward: Callable[[Problem, str], float]  # of a problem and a response's text, from 0 to 1
    skipped: Collection = ()  # rows of a data set that could not be read


def take_prompts(config, task: Task) -> list[Problem]:
    """The next problems of an iteration, each `group` times in a row: as many as there are responses."""
    problems = itertools.islice(task.stream, config.responses // config.group)
    return [problem for problem in problems for _ in range(config.group)]


def toy_task(config) -> Task:
    """The toy world. `prior` holds in training problems alone."""
    seeds = itertools.count(config.seed * 10**9)
    stream = (toy_env.make_problem(i, prior=config.prior, **difficulty(config)) for i in seeds)
    held_out = toy_env.make_problems(config.eval_problems, split="eval", **difficulty(config))
    return Task(stream, held_out, INSTRUCTION, toy_env.reward)


def dataset_task(config, instruction: str, reward: Callable[[Problem, str], float]) -> Task:
    """A data set with image(s), question or problem, and answer. ValueError: none to train on.

    The test or validation split is held out or, where there is none, a share of the training split. A broken
    row is named once, and skipped.
    """
    name, prompts, held_out = config.dataset, config.responses // config.group, config.eval_problems
    try:
        splits = datasets.load_dataset(name)
        columns = splits["train"].column_names
    except Exception as error:  # a library's: of any kind
        raise ValueError(f"dataset is {name!r}: expected a folder or name that load_dataset knows, with a "
                         f"split train ({first_line(error)})") from error
    for names in COLUMNS:
        if not {*names} & {*columns}:
            raise ValueError(f"dataset is {name!r}, with columns {columns}: "
                             f"expected a column {' or '.join(map(repr, names))}")
    if any(answer is None for split in splits.values() for answer in split["answer"]):
        raise ValueError(f"dataset is {name!r}, with an answer that is None: expected none")
    n = len(splits["train"])
    if n < prompts + held_out * (len(splits) == 1):
        raise ValueError(f"dataset is {name!r}, with {n} rows: expected at least {prompts}, for an "
                         f"iteration, and {held_out} to hold out if there is no other split")
    if len(splits) == 1:
        splits = splits["train"].train_test_split(test_size=held_out, seed=0)
    kept = splits.get("test", splits.get("validation")).shuffle(seed=0)
    kept = list(readable(kept.select(range(min(held_out, len(kept)))), set()))
    if not kept:
        raise ValueError(f"dataset is {name!r}: expected a row to hold out that can be read")
    rows, skipped = splits["train"].shuffle(seed=config.seed), set()

    def stream():
        while len(skipped) < len(rows):
            yield from readable(rows, skipped)
        raise ValueError(f"dataset is {name!r}: expected a row that can be read")

    return Task(stream(), kept, instruction, reward, skipped)


def readable(rows: datasets.Dataset, skipped: set[int]) -> Iterator[Problem]:
    """The problems of those rows that are not broken."""
    for i in range(len(rows)):
        if i in skipped:
            continue
        try:
            problem = from_row(rows[i])
        except Exception as error:  # of any kind: an image is decoded only here
            skipped.add(i)
            at = i if rows._indices is None else rows._indices.column(0)[i].as_py()
            tqdm.write(f"row {at} of the data set is skipped: {first_line(error)}", file=sys.stderr)
        else:
            yield problem


def from_row(row: dict) -> Problem:
    image = row["image"] if "image" in row else row["images"][0]
    question, answer = row["question"] if "question" in row else row["problem"], row["answer"]
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image.mode is {image.mode!r}: expected 8 bits a channel")
    if not isinstance(question, str) or isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"question, answer is {question!r:.50}, {answer!r:.50}: expected texts, or a number")
    answer = f"{answer:.15g}" if isinstance(answer, float) else str(answer).strip()
    return Problem(image.convert("RGB"), question.replace("<image>", "").strip(), answer)
