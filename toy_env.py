"""Visual arithmetic: a toy world in which every statement of a response can be checked.

A problem is an image, a grid of coloured cells with a number in each, and a question such as
"red + blue - green = ?", worked out from left to right. A response reads the cells and then computes:

    <perception> red 3, blue 7, green 5 </perception> <think> red 3 + blue 7 = 10
    10 - green 5 = 5 </think> <answer> 5 </answer>

A question can ask for filler words: with "? many openings" behind it, "i see red 3, so blue 7" states the
same. An opening ("i see", "so") decides nothing, like most uncertain tokens of natural language.

The answer is verifiable, as in any RL from verifiable rewards. What this world adds is the truth about each
*statement*: a reading is compared with the image, an operand with what was read or computed before it, a
result with its own operands. So it knows where a response goes wrong, and `blame` whether the advantages
(a number per token) say so: the ground truth of credit assignment, which no real benchmark has.

Read in this order: make_problem → reward → statements (first_error, false_statements, faithful, perception)
→ blame → make_dataset. `python -m tiny_vlm.teacher` shows some problems. This file needs Pillow and datasets
and knows nothing of the algorithms.
"""

import itertools
import random
import re
import zlib
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (205, 40, 40), "orange": (245, 140, 20), "yellow": (240, 220, 60), "green": (40, 150, 60),
    "cyan": (60, 200, 215), "blue": (40, 70, 200), "purple": (120, 45, 160), "pink": (245, 150, 190),
    "brown": (120, 75, 40), "white": (245, 245, 245),
}
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "×": lambda a, b: a * b}
TAGS = ("<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>")
OPENINGS = "i see", "there is", "here is", "we have", "so", "now", "then", "next we get"  # filler words
OPENED = {"none": (), "few": ("think",), "many": ("perception", "think")}  # blocks with filler words
LARGEST = 99  # true running results stay in 0 … 99
FONT = ImageFont.load_default_imagefont()  # a bitmap: digits do not depend on a font library


class Cell(NamedTuple):
    """One coloured cell of the image; rows and columns count from 0."""

    row: int
    column: int
    colour: str
    number: int


class Step(NamedTuple):
    """One line of the true derivation: `left operator right = result`, where `right` is `colour`'s number."""

    left: int
    operator: str
    colour: str
    right: int
    result: int


@dataclass(frozen=True)
class Problem:
    """An image and a question with a verifiable answer. `cells` (in reading order) and `steps` are the truth
    behind it. They are empty for a problem from a data set without such labels. `openings`: see OPENED."""

    image: Image.Image | tuple[Image.Image, ...]  # a tuple: each stands at its <image> in the question
    question: str
    answer: str
    cells: tuple[Cell, ...] = ()
    steps: tuple[Step, ...] = ()
    openings: str = "none"


# --------------------------------------------------------------------------------------------------- problems
def make_problem(seed: int, operands: int = 3, distractors: int = 1, operators: str = "+-", low: int = 1,
                 high: int = 9, grid: int = 3, cell: int = 16, prior: float = 0.0,
                 openings: str = "none", split: str = "train") -> Problem:
    """Draw one problem. The same arguments give the same pixels on every machine.

    operands: 2 to 8 cells that the question names.  distractors: cells that it does not.
    operators: any of "+", "-", "×".  low, high: the range of the numbers.  grid: slots per side.
    cell: pixels per slot.  prior: share of problems in which each colour has its usual number (red 1,
    orange 2, …), so that the question alone tells the answer.  openings: filler words: "none"; "few", before
    each line of reasoning; "many", before each reading too. The question asks for them; else nothing changes.
    split: "train" or "eval"; no (cells, question) pair is ever in both.
    Raises ValueError for a difficulty that cannot be drawn, or hardly ever.
    """
    _check_difficulty(operands, distractors, operators, low, high, grid, cell, prior, openings, split)
    rng = random.Random(f"{split} {seed}")
    usual = prior > 0 and rng.random() < prior
    for _ in range(100_000):
        cells = _draw_cells(rng, operands + distractors, low, high, grid)
        if usual:
            cells = [c._replace(number=usual_number(c.colour, low, high)) for c in cells]
        asked = rng.sample(cells, operands)
        steps = _draw_steps(rng, asked, operators)
        if steps is None:
            continue
        question = " ".join([asked[0].colour] + [f"{s.operator} {s.colour}" for s in steps]) + " = ?"
        # One problem in eight belongs to the evaluation split, by a hash of what the problem says.
        held_out = zlib.crc32(repr((tuple(map(tuple, cells)), question)).encode()) % 8 == 0
        if held_out == (split == "eval"):
            image = _draw_image(rng, cells, grid, cell)
            question += f" {openings} openings" if OPENED[openings] else ""
            return Problem(image, question, str(steps[-1].result), tuple(cells), tuple(steps), openings)
    expected = f"some that keep the results of {operands} numbers from {low} to {high} in 0 … {LARGEST}"
    raise ValueError(f"operators is {operators!r}: expected {expected}")


def usual_number(colour: str, low: int = 1, high: int = 9) -> int:
    """What `prior` makes of each colour: red 1, orange 2, …"""
    return low + list(COLOURS).index(colour) % (high - low + 1)


def _check_difficulty(operands, distractors, operators, low, high, grid, cell, prior, openings, split):
    most = min(grid * grid, len(COLOURS))
    for name, value, fine, expected in (
        ("grid", grid, grid >= 2, "at least 2 slots per side"),
        ("operands", operands, 2 <= operands <= min(8, most), f"2 to {min(8, most)} for grid {grid}"),
        ("distractors", distractors, 0 <= distractors <= most - operands, f"0 to {most - operands}"),
        ("operators", operators, operators and set(operators) <= set(OPERATORS), "some of '+-×'"),
        ("low, high", (low, high), 0 <= low <= high <= LARGEST, f"0 <= low <= high <= {LARGEST}"),
        ("cell", cell, cell >= 14, "at least 14 pixels, or the digits cannot be read"),
        ("prior", prior, 0 <= prior <= 1, "a share from 0 to 1"),
        ("openings", openings, openings in OPENED, "'none', 'few' or 'many'"),
        ("split", split, split in ("train", "eval"), "'train' or 'eval'"),
    ):
        if not fine:
            raise ValueError(f"{name} is {value!r}: expected {expected}")


def _draw_cells(rng, n, low, high, grid):
    slots = sorted(rng.sample(range(grid * grid), n))
    colours = rng.sample(list(COLOURS), n)
    return [Cell(slot // grid, slot % grid, c, rng.randint(low, high)) for slot, c in zip(slots, colours)]


def _draw_steps(rng, asked, operators):
    """Random operators that keep every running result in 0 … LARGEST; None if there are none."""
    steps, left = [], asked[0].number
    for cell in asked[1:]:
        possible = [op for op in operators if 0 <= OPERATORS[op](left, cell.number) <= LARGEST]
        if not possible:
            return None
        operator = rng.choice(possible)
        result = OPERATORS[operator](left, cell.number)
        steps.append(Step(left, operator, cell.colour, cell.number, result))
        left = result
    return steps


def _draw_image(rng, cells, grid, cell):
    """Cells that differ in size, place, shade, digit size and digit place. Only integer geometry, a bitmap
    font and nearest-neighbour scaling, so that the same arguments give the same pixels everywhere."""
    floor = rng.randint(15, 70)
    image = Image.new("RGB", (grid * cell, grid * cell), (floor, floor, floor))
    unit = cell // 14
    for row, column, colour, number in cells:
        side = rng.randint(cell * 13 // 16, cell)
        x = column * cell + rng.randint(0, cell - side)
        y = row * cell + rng.randint(0, cell - side)
        shade = rng.randint(80, 104)
        paint = tuple(min(255, value * shade // 100) for value in COLOURS[colour])
        image.paste(paint, (x, y, x + side, y + side))
        glyphs = _glyphs(str(number))
        width, height = (min(side - 2, n * unit * rng.choice((4, 5)) // 4) for n in glyphs.size)
        ink = (0, 0, 0) if sum(paint) > 3 * 115 else (255, 255, 255)
        left = x + 1 + rng.randint(0, side - 2 - width)
        top = y + 1 + rng.randint(0, side - 2 - height)
        image.paste(ink, (left, top), glyphs.resize((width, height), Image.Resampling.NEAREST))
    return image


def _glyphs(text):
    """The number as a 1-bit mask, 6 pixels a digit, 9 pixels high."""
    mask = Image.new("1", (6 * len(text), 11))
    ImageDraw.Draw(mask).text((0, 0), text, fill=1, font=FONT)
    return mask.crop((0, 1, 6 * len(text), 10))


# ----------------------------------------------------------------------------------------- judging a response
def parse(response: str) -> dict[str, tuple[int, int]] | None:
    """Where each block's text is: {"perception": (start, end), "think": …, "answer": …}. None unless each tag
    occurs exactly once, in order, with nothing but white space around the blocks."""
    if any(response.count(tag) != 1 for tag in TAGS):
        return None
    blocks = [f"<{name}>(?P<{name}>.*)</{name}>" for name in ("perception", "think", "answer")]
    found = re.fullmatch(r"\s*" + r"\s*".join(blocks) + r"\s*", response, re.DOTALL)
    return found and {name: found.span(name) for name in ("perception", "think", "answer")}


def stated_answer(response: str) -> str | None:
    """The text of the answer block, stripped; None for a response that does not parse."""
    spans = parse(response)
    return response[slice(*spans["answer"])].strip() if spans else None


def reward(problem: Problem, response: str) -> float:
    """1.0 if the format parses and its one answer is, to the character, the problem's answer; else 0.0."""
    stated = stated_answer(response)
    return float(stated is not None and stated == problem.answer)


class Statement(NamedTuple):
    """One checkable claim of a response: its kind, its character span and whether it is true."""

    kind: str  # "reading", "operand", "result", "answer", or "format": text that states nothing checkable
    start: int
    end: int
    true: bool
    consequential: bool = True  # False: the reading of a cell that the question does not use


OPENING = re.compile(f"(?:{'|'.join(OPENINGS)}) ")
READING = re.compile(r"(?P<colour>[a-z]+) (?P<number>[0-9]{1,18})")
LINE = re.compile(
    r"(?P<operand>(?:(?P<first>[a-z]+) )?(?P<left>-?[0-9]{1,18}) (?P<operator>[-+×])"
    r" (?P<colour>[a-z]+) (?P<right>[0-9]{1,18})) = (?P<result>-?[0-9]{1,18})"
)


def statements(problem: Problem, response: str) -> list[Statement]:
    """Every statement of a response, in order. Each is judged only against the image and what was stated
    before it: what follows correctly from an earlier slip is true.

    problem: one with cells. A response to it without a false statement has the right answer.

    >>> problem = make_problem(0, operands=2, distractors=0)  # brown + red = ?, with brown 9 and red 9
    >>> slip = ("<perception> brown 9, red 9 </perception> <think> brown 9 + red 9 = 28 </think>"
    ...         " <answer> 28 </answer>")
    >>> [(s.kind, slip[s.start : s.end], s.true) for s in statements(problem, slip)][2:]
    [('operand', 'brown 9 + red 9', True), ('result', '28', False), ('answer', '28', True)]
    """
    spans = parse(response)
    if spans is None:
        return [Statement("format", 0, len(response), False)]
    readings, stated = _judge_readings(problem, response, *spans["perception"])
    lines, last = _judge_lines(problem, response, *spans["think"], stated)
    start, end = spans["answer"]
    start, end = next(_parts(response, "</answer>", start, end), (start, start))  # the whole, or it is blank
    return readings + lines + [Statement("answer", start, end, response[start:end] == last)]


def _parts(response, separator, start, end, opened=False):
    """The (start, end) spans of what stands between separators, stripped, and without its opening where it
    may have one; blank parts are left out."""
    for part in response[start:end].split(separator):
        if part.strip():
            a, b = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
            opening = OPENING.match(response, a, b) if opened else None
            yield opening.end() if opening else a, b
        start += len(part) + len(separator)


def _judge_readings(problem, response, start, end):
    """Readings against the cells, in reading order; also what was read, as colour → number. Of two readings
    of a colour the true one counts, else the first."""
    used = {problem.question.partition(" ")[0]} | {step.colour for step in problem.steps}
    order = [cell.colour for cell in problem.cells]
    judged, stated = [], {}
    low = high = 0  # the next cell is one of low … high: a false reading may have stood for one, or for none
    for a, b in _parts(response, ",", start, end, "perception" in OPENED[problem.openings]):
        if not (found := READING.fullmatch(response, a, b)):
            judged.append(Statement("format", a, b, False))
            high += 1
            continue
        colour, number = found["colour"], int(found["number"])
        at = order.index(colour) if colour in order else -1
        true = (placed := low <= at <= high) and number == problem.cells[at].number
        if true or colour not in stated:
            stated[colour] = number
        about = {colour} if placed else {colour, *order[low : high + 1]}
        judged.append(Statement("reading", a, b, true, bool(used & about)))
        low, high = at + 1 if true else low, max(high + (not true), at + 1)
    if high < len(order):  # a cell that was not read: false where the block ends
        judged.append(Statement("reading", end, end, False, bool(used & set(order) - set(stated))))
    return judged, stated


def _judge_lines(problem, response, start, end, stated):
    """Lines of reasoning against the question, the readings and the line before; also the last result."""
    numbers = {cell.colour: cell.number for cell in problem.cells} | stated
    order = [step.colour for step in problem.steps]
    first = problem.question.partition(" ")[0]
    left, judged = numbers.get(first), []
    low = high = 0  # as for readings
    for a, b in _parts(response, "\n", start, end, "think" in OPENED[problem.openings]):
        if not (found := LINE.fullmatch(response, a, b)):
            judged.append(Statement("format", a, b, False))
            high += 1
            continue
        colour, operator = found["colour"], found["operator"]
        stated_left, right, result = (int(found[name]) for name in ("left", "right", "result"))
        at = order.index(colour) if colour in order else -1
        true = low <= at <= high and (found["first"], stated_left, operator, right) == (
            first, left, problem.steps[at].operator, numbers[colour])
        judged.append(Statement("operand", *found.span("operand"), true))
        computed = OPERATORS[operator](stated_left, right)
        judged.append(Statement("result", *found.span("result"), result == computed))
        first, left = None, result  # only the first line names its left operand
        low, high = at + 1 if true else low, max(high + (not true), at + 1)
    if high < len(order):  # a missing line: false where the block ends
        judged.append(Statement("operand", end, end, False))
    return judged, str(left)


def false_statements(problem: Problem, response: str) -> list[Statement]:
    """The false statements of a response, in order; a response that does not parse is one false "format"."""
    return [statement for statement in statements(problem, response) if not statement.true]


def first_error(problem: Problem, response: str) -> Statement | None:
    """The first false statement, or None."""
    return next(iter(false_statements(problem, response)), None)


def faithful(problem: Problem, response: str) -> bool:
    """True for the right answer and no false statement on the way to it."""
    return reward(problem, response) == 1.0 and not false_statements(problem, response)


def perception(problem: Problem, response: str) -> float:
    """Share of the problem's cells that the response reads correctly; 0.0 for one that does not parse. Behind
    a skipped cell, the next reading is a false *statement*, but not a wrong number: here it counts."""
    spans = parse(response)
    stated = _judge_readings(problem, response, *spans["perception"])[1] if spans else {}
    return fmean(stated.get(cell.colour) == cell.number for cell in problem.cells)


# ------------------------------------------------------------------------------------------- blaming the slip
class Blame(NamedTuple):
    """How well advantages A point at the slip of a response, from 0 to 1. AUROC, the area under the ROC
    curve, is the chance that the slip's A is the lower of two: 0.5 knows nothing."""

    tokens: float  # AUROC of the slip's tokens against all others
    statements: float  # AUROC of the slip's mean A against the means of the other statements
    top1: float  # is the slip's mean the lowest of all? 1 / k where k share the lowest


def tokens_of(statement: Statement, pieces: list[str]) -> list[int]:
    """Indices of the tokens that overlap a statement's characters. An empty piece overlaps nothing.

    >>> tokens_of(Statement("result", 4, 6, True), ["2 ", "+ ", "", "1", "3", " "])
    [3, 4]
    """
    ends = itertools.accumulate(map(len, pieces))
    spans = [(end - len(piece), end) for piece, end in zip(pieces, ends)]
    return [t for t, (a, b) in enumerate(spans) if max(a, statement.start) < min(b, statement.end)]


def blame(problem: Problem, response: str, pieces: list[str], advantages: list[float]) -> Blame | None:
    """Do the advantages point at the slip of a wrong response, its one false statement?

    pieces: the text of each token.  advantages: one for each.  -> Blame, or None: the response is right, has
    another number of false statements, or no text for its one or for any true one.
    """
    judged = statements(problem, response) if problem.cells else []
    false = [s for s in judged if not s.true]
    tokens = {s: found for s in judged if (found := tokens_of(s, pieces))}
    if reward(problem, response) == 1.0 or len(false) != 1 or false[0] not in tokens or len(tokens) < 2:
        return None
    slip = tokens[false[0]]
    others = [advantages[t] for t in range(len(pieces)) if t not in slip]
    means = {s: fmean(advantages[t] for t in found) for s, found in tokens.items()}
    mean, rest = means.pop(false[0]), [*means.values()]
    return Blame(
        tokens=_auroc([advantages[t] for t in slip], others),
        statements=_auroc([mean], rest),
        top1=(mean <= min(rest)) / (1 + rest.count(mean)),
    )


def _auroc(low, high):
    """The chance that one of `low` is below one of `high`; ties count half."""
    return fmean((a < b) + (a == b) / 2 for a in low for b in high)


# -------------------------------------------------------------------------------------------------- data sets
def make_problems(n: int, seed: int = 0, **difficulty) -> list[Problem]:
    """n problems; different seeds give different streams. Difficulty as in make_problem."""
    return [make_problem(seed * 1_000_003 + i, **difficulty) for i in range(n)]


def make_dataset(n: int, seed: int = 0, **difficulty) -> "datasets.Dataset":
    """The same n problems as a data set with the columns image, question and answer. Real sets for visual
    question answering have this shape, so that one of them can take its place."""
    import datasets

    problems = make_problems(n, seed, **difficulty)
    columns = {name: [getattr(p, name) for p in problems] for name in ("image", "question", "answer")}
    return datasets.Dataset.from_dict(columns)
