"""Visual arithmetic: a toy world in which every statement of a response can be checked.

A problem is an image, a grid of coloured cells with a number in each, and a question such as
"red + blue - green = ?", worked out from left to right. A response reads the cells and then computes:

    <perception> red 3, blue 7, green 5 </perception> <think> red 3 + blue 7 = 10
    10 - green 5 = 5 </think> <answer> 5 </answer>

The answer is verifiable, as in any RL from verifiable rewards. What this world adds is the truth about
each *statement*: a reading is compared with the image, an operand with what was read or computed before
it, a result with its own operands. So `first_error` knows where a response went wrong, which is the ground
truth of credit assignment that no real benchmark has.

Read in this order: make_problem → reward → statements (first_error, false_statements, faithful, perception) →
demonstration (the sloppy teacher) → make_dataset. `python toy_env.py` draws a contact sheet.
This file needs Pillow and datasets and knows nothing of the algorithms.
"""

import random
import re
import sys
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (205, 40, 40), "orange": (245, 140, 20), "yellow": (240, 220, 60), "green": (40, 150, 60),
    "cyan": (60, 200, 215), "blue": (40, 70, 200), "purple": (120, 45, 160), "pink": (245, 150, 190),
    "brown": (120, 75, 40), "white": (245, 245, 245),
}
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "×": lambda a, b: a * b}
TAGS = ("<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>")
LARGEST = 99  # true running results stay in 0 … 99


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
    behind it; they are empty for a problem that comes from a data set without such labels."""

    image: Image.Image
    question: str
    answer: str
    cells: tuple = ()
    steps: tuple = ()


# ---------------------------------------------------------------- problems


def make_problem(seed, operands=3, distractors=1, operators="+-", low=1, high=9, grid=3, cell=16, prior=0.0,
                 split="train"):
    """Draw one problem. The same arguments give the same pixels on every machine.

    seed: any int.  operands: 2 to 8 cells that the question names.  distractors: cells that it does not.
    operators: any of "+", "-", "×".  low, high: the range of the numbers.  grid: slots per side.
    cell: pixels per slot.  prior: share of problems in which each colour has its usual number (red 1,
    orange 2, …), so that the question alone tells the answer.  split: "train" or "eval"; no (cells, question) pair is
    ever in both.
    Raises ValueError for a difficulty that cannot be drawn, or hardly ever.
    """
    _check_difficulty(operands, distractors, operators, low, high, grid, cell, prior, split)
    rng = random.Random(f"{split} {seed}")
    usual = prior > 0 and rng.random() < prior
    for _ in range(100_000):
        cells = _draw_cells(rng, operands + distractors, low, high, grid)
        cells = [c._replace(number=_usual_number(c.colour, low, high)) for c in cells] if usual else cells
        asked = rng.sample(cells, operands)
        steps = _draw_steps(rng, asked, operators)
        if steps is None:
            continue
        question = " ".join([asked[0].colour] + [f"{s.operator} {s.colour}" for s in steps]) + " = ?"
        # One problem in eight belongs to the evaluation split, by a hash of what the problem says.
        held_out = zlib.crc32(repr((tuple(map(tuple, cells)), question)).encode()) % 8 == 0
        if held_out == (split == "eval"):
            image = _draw_image(rng, cells, grid, cell)
            return Problem(image, question, str(steps[-1].result), tuple(cells), tuple(steps))
    numbers = f"operators={operators!r}, low={low}, high={high}"
    raise ValueError(f"{numbers}: results of {operands} operands hardly ever stay in 0 … {LARGEST}")


def _check_difficulty(operands, distractors, operators, low, high, grid, cell, prior, split):
    if grid < 2:
        raise ValueError(f"grid={grid}: expected at least 2 slots per side")
    most = min(grid * grid, len(COLOURS))
    if not 2 <= operands <= min(8, most):
        raise ValueError(f"operands={operands}: expected 2 to {min(8, most)} for grid={grid}")
    if distractors < 0 or operands + distractors > most:
        raise ValueError(f"distractors={distractors}: expected 0 to {most - operands} beside {operands} operands")
    if not operators or set(operators) - set(OPERATORS):
        raise ValueError(f"operators={operators!r}: expected some of {''.join(OPERATORS)!r}")
    if not 0 <= low <= high <= LARGEST:
        raise ValueError(f"low={low}, high={high}: expected 0 <= low <= high <= {LARGEST}")
    if cell < 14:
        raise ValueError(f"cell={cell}: expected at least 14 pixels, or the digits cannot be read")
    if not 0 <= prior <= 1:
        raise ValueError(f"prior={prior}: expected a share from 0 to 1")
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: expected 'train' or 'eval'")


def _draw_cells(rng, n, low, high, grid):
    slots = sorted(rng.sample(range(grid * grid), n))
    colours = rng.sample(list(COLOURS), n)
    return [Cell(slot // grid, slot % grid, c, rng.randint(low, high)) for slot, c in zip(slots, colours)]


def _usual_number(colour, low, high):
    return low + list(COLOURS).index(colour) % (high - low + 1)


def _draw_steps(rng, asked, operators):
    """Operators at random, but such that every running result stays in 0 … LARGEST; None if there are none."""
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
    """Cells that differ in size, place, shade, digit size and digit place. Only integer geometry, Pillow's
    built-in bitmap font and nearest-neighbour scaling, so that pixels do not depend on a font library."""
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
        width = min(side - 2, glyphs.width * unit * rng.choice((4, 5)) // 4)
        height = min(side - 2, glyphs.height * unit * rng.choice((4, 5)) // 4)
        ink = (0, 0, 0) if sum(paint) > 3 * 115 else (255, 255, 255)
        left = x + 1 + rng.randint(0, side - 2 - width)
        top = y + 1 + rng.randint(0, side - 2 - height)
        image.paste(ink, (left, top), glyphs.resize((width, height), Image.Resampling.NEAREST))
    return image


def _glyphs(text):
    """The number as a 1-bit mask, 6 pixels a digit, 9 pixels high."""
    mask = Image.new("1", (6 * len(text), 11))
    ImageDraw.Draw(mask).text((0, 0), text, fill=1, font=ImageFont.load_default_imagefont())
    return mask.crop((0, 1, 6 * len(text), 10))


# ---------------------------------------------------------------- judging a response


def parse(response):
    """The three blocks as {"perception", "think", "answer"} → (start, end) character spans, or None unless each
    tag occurs exactly once, in order, with nothing but white space around the blocks."""
    if any(response.count(tag) != 1 for tag in TAGS):
        return None
    blocks = [f"<{name}>(?P<{name}>.*){'</' + name}>" for name in ("perception", "think", "answer")]
    found = re.fullmatch(r"\s*" + r"\s*".join(blocks) + r"\s*", response, re.DOTALL)
    return found and {name: found.span(name) for name in ("perception", "think", "answer")}


def stated_answer(response):
    """The text of the answer block, stripped, or None for a response that does not parse."""
    spans = parse(response)
    return response[slice(*spans["answer"])].strip() if spans else None


def reward(problem, response):
    """1.0 if the format parses and its one answer is, to the character, the problem's answer; else 0.0.

    >>> reward(make_problem(0), "<answer> 5 </answer>")
    0.0
    """
    return float(stated_answer(response) == problem.answer)


class Statement(NamedTuple):
    """One checkable claim of a response: its kind ("reading", "operand", "result", "answer", or "format" for text
    that states nothing checkable), its character span, whether it is true, and whether it can change the answer
    (the reading of a cell that the question does not use cannot)."""

    kind: str
    start: int
    end: int
    true: bool
    consequential: bool = True


READING = re.compile(r"(?P<colour>[a-z]+) (?P<number>[0-9]{1,18})")
LINE = re.compile(
    r"(?P<operand>(?:(?P<first>[a-z]+) )?(?P<left>-?[0-9]{1,18}) (?P<operator>[-+×])"
    r" (?P<colour>[a-z]+) (?P<right>[0-9]{1,18})) = (?P<result>-?[0-9]{1,18})"
)


def statements(problem, response):
    """Every statement of a response, in order, each judged only against the image and what was stated before
    it: what follows correctly from an earlier slip is true. `problem` has cells; then a response without a false
    statement has the right answer.

    >>> p = make_problem(0)
    >>> all(s.true for s in statements(p, demonstration(p)))
    True
    """
    spans = parse(response)
    if spans is None:
        return [Statement("format", 0, len(response), False)]
    readings, stated = _judge_readings(problem, response, *spans["perception"])
    lines, last = _judge_lines(problem, response, *spans["think"], stated)
    start, end = spans["answer"]
    text = response[start:end]
    start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    return readings + lines + [Statement("answer", min(start, end), end, text.strip() == last)]


def _pieces(response, separator, start, end):
    """The (start, end) spans of what stands between separators, stripped; blank pieces are left out."""
    for piece in response[start:end].split(separator):
        if piece.strip():
            yield start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
        start += len(piece) + len(separator)


def _judge_readings(problem, response, start, end):
    """Readings against the cells, in reading order; also what was read, as colour → number. Of two readings of a
    colour the true one counts, else the first."""
    used = {problem.question.partition(" ")[0]} | {step.colour for step in problem.steps}
    order = [cell.colour for cell in problem.cells]
    judged, stated = [], {}
    low = high = 0  # the next cell is low … high: a false reading may have stood for a cell or been one too many
    for a, b in _pieces(response, ",", start, end):
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
    """Lines of reasoning against the question, the stated readings and the line before; also the last result."""
    numbers = {cell.colour: cell.number for cell in problem.cells} | stated
    order = [step.colour for step in problem.steps]
    first = problem.question.partition(" ")[0]
    left, judged = numbers.get(first), []
    low = high = 0  # as for readings
    for a, b in _pieces(response, "\n", start, end):
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
        judged.append(Statement("result", *found.span("result"), result == OPERATORS[operator](stated_left, right)))
        first, left = None, result  # only the first line names its left operand
        low, high = at + 1 if true else low, max(high + (not true), at + 1)
    if high < len(order):  # a missing line: false where the block ends
        judged.append(Statement("operand", end, end, False))
    return judged, str(left)


def false_statements(problem, response):
    """The false statements of a response, in order; a response that does not parse is one false "format"."""
    return [statement for statement in statements(problem, response) if not statement.true]


def first_error(problem, response):
    """The first false statement, or None."""
    return next(iter(false_statements(problem, response)), None)


def faithful(problem, response):
    """True for the right answer and no false statement on the way to it."""
    return reward(problem, response) == 1.0 and not false_statements(problem, response)


def perception(problem, response):
    """Share of the problem's cells that the response reads correctly; 0.0 for a response that does not parse."""
    return sum(s.true for s in statements(problem, response) if s.kind == "reading") / len(problem.cells)


# ---------------------------------------------------------------- the sloppy teacher


LOOK_ALIKE = {"1": "7", "7": "1", "3": "8", "8": "3", "5": "6", "6": "5", "4": "9", "9": "4"}


def demonstration(problem, rng=None, misread=0.0, slip=0.0, habit=0.0):
    """A response by a sloppy teacher; without the rates, a faultless one.

    rng: a random.Random (needed for rates above 0).  misread: the chance that a number's last digit is read as its
    look-alike.  slip: the chance of a wrong result.  habit: the chance of the teacher's two habits, to read a 7 as a 1
    and to forget a carry or a borrow; above one half, imitation turns them into the greedy choice.
    What follows a slip is consistent with it.
    """
    if max(misread, slip, habit) > 0 and rng is None:
        raise ValueError("rng=None: expected a random.Random where a rate is above 0")
    happens = lambda chance: chance > 0 and rng.random() < chance
    numbers = {}
    for cell in problem.cells:
        text = str(cell.number)
        if text[-1] in LOOK_ALIKE and happens(habit if text[-1] == "7" else misread):
            text = text[:-1] + LOOK_ALIKE[text[-1]]
        numbers[cell.colour] = int(text)
    colour = problem.question.split()[0]
    left, lines = numbers[colour], []
    for step in problem.steps:
        right = numbers[step.colour]
        result = OPERATORS[step.operator](left, right)
        forgetful = without_carry(left, step.operator, right)
        if forgetful != result and happens(habit):
            result = forgetful
        elif happens(slip):
            result += rng.choice([d for d in (-10, -2, -1, 1, 2, 10) if result + d >= 0] or [1])
        lines.append(f"{'' if lines else colour + ' '}{left} {step.operator} {step.colour} {right} = {result}")
        left = result
    readings = ", ".join(f"{colour} {number}" for colour, number in numbers.items())
    body = "\n".join(lines)
    return f"<perception> {readings} </perception> <think> {body} </think> <answer> {left} </answer>"


def without_carry(left, operator, right):
    """The result of who forgets the carry into the tens of `left` (or the borrow from them); equal to the result where
    there is none to forget.

    >>> without_carry(27, "+", 5), without_carry(32, "-", 5), without_carry(27, "×", 3), without_carry(8, "+", 5)
    (22, 37, 61, 13)
    """
    result, ones = OPERATORS[operator](left, right), OPERATORS[operator](left % 10, right % 10)
    if left < 10 or result < 0:
        return result
    return result - 10 * (ones // 10)  # ones // 10 is the carry: 1 for 7 + 5, -1 for 2 - 5, 2 for 7 × 3


# ---------------------------------------------------------------- data sets


def make_problems(n, seed=0, **difficulty):
    """n problems; different seeds give different streams. Difficulty as in make_problem."""
    return [make_problem(seed * 1_000_003 + i, **difficulty) for i in range(n)]


def make_dataset(n, seed=0, **difficulty):
    """The same n problems as a `datasets.Dataset` with image, question and answer columns, the shape of real
    visual question answering sets, so that one of those can take its place."""
    import datasets

    problems = make_problems(n, seed, **difficulty)
    columns = {name: [getattr(p, name) for p in problems] for name in ("image", "question", "answer")}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# ---------------------------------------------------------------- a look at the world


def contact_sheet(problems, responses, columns=4, scale=4):
    """A picture of problems, question above and response below, its false statements in red."""
    font = ImageFont.load_default(13)
    width = max(300, max(p.image.width for p in problems) * scale + 20)
    texts = [_marked_lines(p, r) for p, r in zip(problems, responses)]
    height = 44 + max(p.image.height for p in problems) * scale + 16 * max(map(len, texts))
    rows = -(-len(problems) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (problem, lines) in enumerate(zip(problems, texts)):
        x, y = i % columns * width + 10, i // columns * height + 8
        draw.text((x, y), f"{problem.question[:-1]}{problem.answer}".replace("×", "x"), fill="black", font=font)
        size = (problem.image.width * scale, problem.image.height * scale)
        picture = problem.image.resize(size, Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y + 22))
        for j, (text, true) in enumerate(lines):
            draw.text((x, y + 28 + picture.height + 16 * j), text, fill="black" if true else "red", font=font)
    return sheet


def _marked_lines(problem, response):
    """The response's statements as (text, true) lines."""
    lines = []
    for s in statements(problem, response):
        text = response[s.start:s.end].replace("×", "x")  # the font has no ×
        text = {"result": "   = " + text, "answer": "answer " + text}.get(s.kind, text or "(missing)")
        lines.append((text, s.true))
    return lines


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "toy_env.png"
    rng = random.Random(1)
    levels = [dict(operands=2), dict(), dict(operands=4, distractors=2), dict(operands=5, operators="+-×")]
    problems = [make_problem(i, **level) for i in (0, 1) for level in levels]
    responses = [demonstration(p, rng, misread=0.13, slip=0.1, habit=0.6) for p in problems]
    for problem, response in zip(problems[:3], responses):
        error = first_error(problem, response)
        print(f"question  {problem.question}   answer {problem.answer}\n{response}")
        print(f"reward {reward(problem, response):.0f}", end="   ")
        print(f"first error: {error.kind} {response[error.start:error.end]!r}\n" if error else "no error\n")
    contact_sheet(problems, responses).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
