"""Problems from a data set of images, questions and answers: a folder or name for `load_dataset`.

For `python train_small.py --dataset NAME`, and for your own loop. A problem needs an image, a question and an
answer, all else of the toy world's (`cells`, `steps`) stays empty. Geometry3K's columns are known too.
"""

import sys
from collections.abc import Iterator

import datasets
from tqdm import tqdm

from support.run_folder import first_line
from toy_env import Problem

COLUMNS = ("image", "images"), ("question", "problem"), ("answer",)


def problems_of(dataset: str, eval_problems: int, prompts: int,
                seed: int) -> tuple[Iterator[Problem], list[Problem], set[int]]:
    """Endless problems for training, those held out, and the training rows that had to be skipped so far.

    The test or validation split is held out or, where there is none, a share of the training split. An
    iteration takes `prompts`. A broken row is named once, and skipped. ValueError: no data set to train on.
    """
    try:
        splits = datasets.load_dataset(dataset)
        columns = splits["train"].column_names
    except Exception as error:  # a library's: of any kind
        raise ValueError(f"dataset is {dataset!r}: expected a folder or name that load_dataset knows, with a "
                         f"split train ({first_line(error)})") from error
    for names in COLUMNS:
        if not {*names} & {*columns}:
            raise ValueError(f"dataset is {dataset!r}, with columns {columns}: "
                             f"expected a column {' or '.join(map(repr, names))}")
    if any(answer is None for split in splits.values() for answer in split["answer"]):
        raise ValueError(f"dataset is {dataset!r}, with an answer that is None: expected none")
    n = len(splits["train"])
    if n < prompts + eval_problems * (len(splits) == 1):
        raise ValueError(f"dataset is {dataset!r}, with {n} rows: expected at least {prompts}, for an "
                         f"iteration, and {eval_problems} to hold out if there is no other split")
    if len(splits) == 1:
        splits = splits["train"].train_test_split(test_size=eval_problems, seed=0)
    held_out = splits.get("test", splits.get("validation")).shuffle(seed=0)
    held_out = list(readable(held_out.select(range(min(eval_problems, len(held_out)))), set()))
    if not held_out:
        raise ValueError(f"dataset is {dataset!r}: expected a row to hold out that can be read")
    rows, skipped = splits["train"].shuffle(seed=seed), set()

    def stream():
        while len(skipped) < len(rows):
            yield from readable(rows, skipped)
        raise ValueError(f"dataset is {dataset!r}: expected a row that can be read")

    return stream(), held_out, skipped


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
