"""Your own data: a data set of images, questions and answers as a Task, for examples/real_vlm.py.

`load_dataset` takes a folder or a name. A row needs an image (or several), a question and an answer;
Geometry3K's columns are known too. What else the toy world's problems have (`cells`, `steps`) stays empty.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator

import datasets
from PIL import Image
from tqdm import tqdm

from support.data import Task
from support.inputs import MARK
from support.run_folder import expect, first_line
from toy_env import Problem

COLUMNS = ("image", "images"), ("question", "problem"), ("answer",)
HELD_OUT = "validation", "val", "dev", "testmini", "test"  # the first that there is, or any other split


def dataset_task(config, instruction: str, reward: Callable[[Problem, str], float],
                 make_check: Callable = lambda: id) -> Task:
    """A data set with image(s), question or problem, and answer. ValueError: none to train on. Another split
    than train is held out or, where there is none, a share of it. A row that cannot be read, or that what
    `make_check` returns refuses, is named once, and skipped."""
    name, prompts, held_out = config.dataset, config.responses // config.group, config.eval_problems
    try:
        splits = datasets.load_dataset(name)
        rows = splits["train"]
    except Exception as error:  # a library's: of any kind
        raise ValueError(f"dataset is {name!r}: expected a folder or name that load_dataset knows, with a "
                         f"split train ({first_line(error)})") from error
    other = next((split for split in (*HELD_OUT, *splits) if split in splits and split != "train"), None)
    kept = splits.get(other, rows)
    for part, names in itertools.product((rows, kept), COLUMNS):
        expect({*names} & {*part.column_names}, "dataset", name,
               f"a column {' or '.join(map(repr, names))} among {part.column_names}")
    answers = [*rows["answer"], *kept["answer"]]
    expect(None not in answers, "dataset", name, "no row with an answer that is None")
    if len(rows) < prompts + held_out * (not other):
        raise ValueError(f"dataset is {name!r}, with {len(rows)} rows: expected at least {prompts}, for an "
                         f"iteration, and {held_out} to hold out if there is no other split")
    if not other:
        rows, kept = rows.train_test_split(test_size=held_out, seed=0).values()
    kept = kept.shuffle(seed=0).select(range(min(held_out, len(kept))))  # the same for every seed
    print(f"held out, to evaluate on: {len(kept)} rows of split {other or 'train'}")
    check = make_check()
    problems = [*readable(kept, set(), check, "held-out row")]
    expect(problems, "dataset", name, "a row to hold out that can be read")
    rows, skipped = rows.shuffle(seed=config.seed), set()

    def stream():
        yield from readable(rows, skipped, check)  # the first pass tries them
        while len(skipped) < len(rows):
            yield from readable(rows, skipped)
        expect(False, "dataset", name, "a row that can be read")

    return Task(stream(), problems, instruction, reward, skipped)


def readable(rows, skipped: set[int], check: Callable = id, kind: str = "row") -> Iterator[Problem]:
    """The problems of those rows that are not broken, for `check` either."""
    names = getattr(rows.features["answer"], "int2str", lambda answer: answer)  # of a ClassLabel
    for i in range(len(rows)):
        if i in skipped:
            continue
        try:
            problem = from_row(dict(row := rows[i], answer=names(row["answer"])))
            check(problem)
        except Exception as error:  # of any kind: an image is decoded only here
            skipped.add(i)
            at = i if rows._indices is None else rows._indices.column(0)[i].as_py()
            tqdm.write(f"{kind} {at} of the data set is skipped: {first_line(error)}", file=sys.stderr)
        else:
            yield problem


def from_row(row: dict) -> Problem:
    """With a picture in front of the question; or with a tuple: several, or one whose MARK is elsewhere."""
    images, question = (row[one] if one in row else row[other] for one, other in COLUMNS[:2])
    images, answer = images if isinstance(images, list) else [images], row["answer"]
    modes = [getattr(image, "mode", "no image") for image in images]
    expect(modes and not any(mode.startswith(("I", "F", "no")) for mode in modes), "image.mode",
           ", ".join(modes), "8 bits a channel")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = f"{answer:.15g}" if isinstance(answer, float) else str(answer)
    if not (isinstance(question, str) and isinstance(answer, str) and answer.strip()):
        raise ValueError(f"question, answer is {question!r:.50}, {answer!r:.50}: expected texts, or a number")
    images = tuple(Image.alpha_composite(Image.new("RGBA", x.size, "white"), x.convert("RGBA")).convert("RGB")
                   for x in images)  # white shows through what is transparent
    alone = question.strip().removeprefix(MARK).strip()
    if len(images) == 1 and MARK not in alone:
        return Problem(images[0], alone, answer.strip())
    return Problem(images, question.strip(), answer.strip())
