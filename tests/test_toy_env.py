"""toy_env.py: the oracles are the question's text read from left to right, slow loops, and hands."""

import dataclasses
import doctest
import hashlib
import itertools
import random
import re
import sys
from fractions import Fraction
from operator import add, mul, sub

import datasets
import pytest
from PIL import Image

import toy_env
from tiny_vlm import teacher
from tiny_vlm.teacher import demonstration, without_carry

LEVELS = [
    *(dict(operands=n, distractors=min(2, 9 - n), operators="+-×"[:k]) for n in range(2, 9) for k in (2, 3)),
    dict(operands=2, distractors=0, operators="×", low=0, high=99, grid=2, cell=14),
    dict(operands=3, distractors=7, operators="+", low=10, high=40, grid=4, cell=32),
    dict(operands=8, operators="×", low=0, high=99), dict(operators="-", low=0, high=99),
]
LINE = re.compile(r"(-?\d+) ([-+×]) [a-z]+ (\d+) = (-?\d+)")
COMPUTE = {"+": add, "-": sub, "×": mul}
USUAL = {colour: i % 9 + 1 for i, colour in enumerate(toy_env.COLOURS)}  # what a colour's number is by prior


def chain(problem):
    """The lines and the answer, worked out from the question's text and the cells alone."""
    number = {colour: n for _, _, colour, n in problem.cells}
    first, *rest = problem.question.split(" = ?")[0].split(" ")
    left, lines = number[first], []
    for operator, colour in zip(rest[::2], rest[1::2]):
        result = COMPUTE[operator](left, number[colour])
        lines.append(f"{left} {operator} {colour} {number[colour]} = {result}")
        left = result
    return [f"{first} {lines[0]}", *lines[1:]], left


def spoken(problem, lines, answer):
    readings, body = ", ".join(f"{c.colour} {c.number}" for c in problem.cells), "\n".join(lines)
    return f"<perception> {readings} </perception> <think> {body} </think> <answer> {answer} </answer>"


# --------------------------------------------------------------------------------------------------- problems
def test_same_seed_same_problems_and_pixels_on_every_machine():
    seen = hashlib.sha256()
    for split in "train", "eval":
        for p in toy_env.make_problems(20, seed=7, operands=5, operators="+-×", prior=0.5, split=split):
            seen.update(repr((p.question, p.answer, p.cells)).encode() + p.image.tobytes())
    assert seen.hexdigest().startswith("9a96d57a0cbfe1bdc04de59d")  # the world that the results come from


@pytest.fixture
def blank(monkeypatch):
    """Problems without a picture, which takes most of the time."""
    monkeypatch.setattr(toy_env, "_draw_image", lambda *_: None)


def test_splits_are_disjoint(blank):
    level = dict(operands=2, distractors=0, grid=2, high=2)  # few enough problems for chance to repeat them
    draw = lambda split, n, seed: toy_env.make_problems(n, seed, split=split, **level)
    said = lambda *stream: {(p.cells, p.question) for p in draw(*stream)}
    train = said("train", 2500, 0)
    assert not train & said("eval", 700, 0) and len(train & said("train", 700, 1)) > 50


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_difficulty_holds_and_the_answer_is_right(level):
    d = dict(operands=3, distractors=1, operators="+-", low=1, high=9, grid=3, cell=16) | level
    seen, numbers = set(), set()
    for p in toy_env.make_problems(60, **level):
        lines, answer = chain(p)
        results = [int(line.split(" = ")[1]) for line in lines]
        assert p.answer == str(answer) and all(0 <= r <= 99 for r in results)
        assert len(lines) == d["operands"] - 1 and len(p.cells) == d["operands"] + d["distractors"]
        steps = [f"{s.left} {s.operator} {s.colour} {s.right} = {s.result}" for s in p.steps]
        assert [f"{p.question.split()[0]} {steps[0]}", *steps[1:]] == lines
        places = [cell[:2] for cell in p.cells]
        assert len({c.colour for c in p.cells}) == len(p.cells) and places == sorted(set(places))
        assert p.image.size == (d["grid"] * d["cell"],) * 2
        assert all(0 <= x < d["grid"] for place in places for x in place)
        seen |= set(p.question) & set("+-×")
        numbers |= {c.number for c in p.cells}
        response = spoken(p, lines, answer)
        assert demonstration(p) == response and toy_env.faithful(p, response)
    assert seen == set(d["operators"])
    assert d["low"] <= min(numbers) <= d["low"] + 2 and max(numbers) <= d["high"]


def test_prior_makes_the_question_tell_the_answer(blank):
    for prior in (0.0, 0.6, 1.0):
        problems = toy_env.make_problems(600, prior=prior)
        told = sum(all(c.number == USUAL[c.colour] for c in p.cells) for p in problems)
        assert abs(told / 600 - prior) <= 0.06 * (prior == 0.6)  # three standard errors


def test_image_shows_the_cells():
    for cell, seed in itertools.product((14, 16, 23, 32), range(6)):  # no two numbers look alike, wherever
        cells = ([toy_env.Cell(1, 0, "cyan", n)] for n in range(100))
        assert len({toy_env._draw_image(random.Random(seed), c, 2, cell).tobytes() for c in cells}) == 100
    for p in toy_env.make_problems(20, operands=5, distractors=2):
        filled = {c[:2]: c.colour for c in p.cells}
        for row, column in itertools.product(range(3), range(3)):
            slot = p.image.crop((column * 16, row * 16, column * 16 + 16, row * 16 + 16))
            paint = max(slot.getcolors())[1]  # the commonest colour of the slot
            named = {c for c, rgb in toy_env.COLOURS.items() for shade in range(80, 105)
                     if paint == tuple(min(255, v * shade // 100) for v in rgb)}
            assert named == {filled.get((row, column))} - {None}


@pytest.mark.parametrize("name, value, expected, others", [
    ("operands", 1, "2 to 8", {}), ("operands", 9, "2 to 8", {}), ("operands", 5, "2 to 4 for", dict(grid=2)),
    ("distractors", -1, "0 to 6", {}), ("distractors", 3, "0 to 2", dict(operands=8, grid=4)),
    ("grid", 1, "at least 2", {}), ("grid", -3, "at least 2", {}), ("cell", 13, "at least 14", {}),
    ("operators", "", "some of '+-×'", {}), ("operators", "+/", "some of '+-×'", {}),
    ("low, high", (-1, 9), "0 <= low", {}), ("low, high", (5, 4), "0 <= low <= high <= 99", {}),
    ("low, high", (1, 100), "0 <= low", {}), ("prior", -0.1, "a share", {}), ("prior", 1.5, "a share", {}),
    ("split", "test", "'train' or 'eval'", {}), ("openings", "all", "'none', 'few' or 'many'", {}),
    ("operators", "×", "some that keep the results of 3 numbers from 10 to 20 in", dict(low=10, high=20)),
])
def test_bad_difficulty_is_an_error(name, value, expected, others, few_tries):
    level = dict(zip(name.split(", "), value)) if ", " in name else {name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}: expected {expected}")):
        toy_env.make_problem(0, **level, **others)


# --------------------------------------------------------------------------------------------------- judging
CELLS = [(0, 0, "red", 27), (0, 2, "white", 4), (1, 1, "blue", 5), (2, 0, "green", 2)]  # white is not used
STEPS = [(27, "+", "blue", 5, 32), (32, "-", "green", 2, 30)]
PROBLEM = toy_env.Problem(None, "red + blue - green = ?", "30", tuple(toy_env.Cell(*c) for c in CELLS),
                          tuple(toy_env.Step(*s) for s in STEPS))
READ, A, B = "red 27, white 4, blue 5, green 2", "red 27 + blue 5 = 32", "32 - green 2 = 30"
GOOD = f"<perception> {READ} </perception> <think> {A}\n{B} </think> <answer> 30 </answer>"
RIGHT = ["30", " 30 ", "\n\t30\u00a0\n"]
WRONG = ["", " ", "+30", "030", "30.0", "-30", "3 0", "30 31", "30\n31", "٣٠", "３０", "3⁰", "30\u200b", "30\0",
         "0x1e", "3e1", "9" * 9999, "thirty", "None", "30 </answer> <answer> 31", "31 </answer> <answer> 30",
         "<answer>30</answer>", "<think>30</think>", "31 </answer> 30", "30 </answer> </answer>",
         "<perception> </perception> <think> </think> <answer> 30"]


@pytest.mark.parametrize("old, new, expected", [
    *(("> 30 <", f">{answer}<", answer in RIGHT) for answer in RIGHT + WRONG),
    (READ, "anything", 1), (A, "", 1), ("</perception> <", "</perception>\n\n<", 1), (GOOD, "30", 0),
    ("answer>", "ANSWER>", 0), ("<answer>", "< answer>", 0), ("</answer>", "", 0), ("<think>", "", 0),
    ("</answer>", "</answer> 30", 0), ("<perception>", "I see <perception>", 0), ("<answer>", "<Answer>", 0),
    (A, "<answer> 30 </answer>", 0), (f"<perception> {READ} </perception>", "", 0), (READ, GOOD, 0),
    ("<perception>", "<think>", 0), ("</think>", "</think> so", 0), (GOOD, "", 0), (GOOD, GOOD * 2, 0),
    (GOOD, "<answer> 30 </answer> <think> </think> <perception> </perception>", 0),
])
def test_reward_reads_one_answer_to_the_character_and_needs_the_format(old, new, expected):
    assert old in GOOD and toy_env.reward(PROBLEM, GOOD.replace(old, new)) == expected


# Kinds of the false statements ("-": of no consequence) | replacements in GOOD | …, where « » marks what is
# false, ¶ a new line, R, A and B the readings and lines. What follows a slip is consistent with it, and true.
SLIPS = """
 | blue 5, → blue 05,
 | R → red 27,white 4,,¶blue 5 , green 2 , | A¶B → ¶ A ¶¶ ¶B¶
reading- | white 4 → «white 9»
reading- | white 4 → «pink 4»
reading- | 27, w → 27, «pink 3», w
reading- | green 2 < → green 2, «pink 3» <
reading | green 2 < → green 2, «red 8» <
reading | blue 5, → blue 5, «blue 5»,
reading | red 27, → «red 21», red 27,
reading | white 4, blue 5, → «blue 5»,
reading | white 4, blue 5, → «blue 5», white 4,
reading | blue 5, → «white 5»,
reading | , green 2 < →  «»<
reading | <perception> R < → <perception>«»<
reading | blue 5, → «blue 6», | A¶B → red 27 + blue 6 = 33¶33 - green 2 = 31 | > 30 → > 31
reading- reading operand | white 4, blue 5 → «white 9», «blue 6» | A → «red 27 + blue 5» = 32
reading reading- | red 27, white 4 → «red 2», «white 9» | A¶B → red 2 + blue 5 = 7¶7 - green 2 = 5 | 30 → 5
reading operand | blue 5, → «blue 6», | A → «red 27 + blue 5» = 32
format | white 4, b → white 4, «?», b
format | white 4 → «white ٤»
format | white 4 → «white -4»
format | white 4 → «white 4444444444444444444»
operand | A → «blue 27 + blue 5» = 32
operand | A¶B → «red 21 + blue 5» = 26¶26 - green 2 = 24 | > 30 → > 24
operand | 32 - green 2 → «red 32 - green 2»
operand | B → «33 - green 2» = 31 | > 30 → > 31
operand | B → «32 + green 2» = 34 | > 30 → > 34
operand | B → «32 - white 4» = 28 | > 30 → > 28
operand | B → «32 - green 3» = 29 | > 30 → > 29
operand | B → B¶«30 - green 2» = 28 | > 30 → > 28
operand | B → «32 + white 4» = 36¶36 - green 2 = 34 | > 30 → > 34
operand | ¶B < →  «»< | > 30 → > 32
operand | A¶B → «red 27 - green 2» = 25 | > 30 → > 25
operand | A¶B → «red 27 - green 2» = 25¶25 + blue 5 = 30
operand | <think> A¶B < → <think>«»< | > 30 → > 27
result | A¶B → red 27 + blue 5 = «31»¶31 - green 2 = 29 | > 30 → > 29
result | A¶B → red 27 + blue 5 = «-1»¶-1 - green 2 = -3 | > 30 → > -3
result | A¶B → red 27 + blue 5 = «9999999999»¶9999999999 - green 2 = 9999999997 | > 30 → > 9999999997
result | B → 32 - green 2 = «28» | > 30 → > 28
result answer | B → 32 - green 2 = «28» | > 30 → > «30»
format | B → «so far so good»¶B
format | B → «B indeed» | > 30 → > 32
format operand | A¶B → «so far»¶«32 - green 2» = 30
answer | > 30 → > «31»
answer | > 30 < → >«» <
format | <perception> R </perception> <think> A¶B </think> <answer> 30 </answer> → «»
"""


def slipped(row):
    """The kinds of a row of SLIPS, and GOOD with its replacements, « » and all."""
    for short, long in zip("RAB", (READ, A, B)):
        row = re.sub(rf"\b{short}\b", long, row)
    kinds, *replacements = row.split(" | ")
    marked = GOOD.replace("\n", "¶")
    for old, new in (r.split(" → ") for r in replacements):
        assert marked.count(old) == 1
        marked = marked.replace(old, new)
    return kinds.split(), marked.replace("¶", "\n")


SAY = ["i see", "there is", "here is", "we have", "so", "now", "then", "next we get"]


@pytest.mark.parametrize("row", SLIPS[1:-1].split("\n"))
def test_each_slip_is_one_false_statement_and_an_opening_changes_no_judgement(row):
    kinds, marked = slipped(row)
    spans = [(m.start() - 2 * i, m.end() - 2 * i - 2) for i, m in enumerate(re.finditer("«[^»]*»", marked))]
    response = re.sub("[«»]", "", marked)
    false = toy_env.false_statements(PROBLEM, response)
    found = [(s.kind + "-" * (not s.consequential), s.start, s.end) for s in false]
    assert found == [(kind, *span) for kind, span in zip(kinds, spans, strict=True)]
    assert toy_env.first_error(PROBLEM, response) == next(iter(false), None)
    assert toy_env.faithful(PROBLEM, response) == (not spans)

    judge = lambda problem, text: [(s.kind, text[s.start : s.end], s.true, s.consequential)
                                   for s in toy_env.statements(problem, text)]
    for kind in ("few", "many"):  # what stands between separators has an opening; what was false still is
        rng, wordy = random.Random(0), response
        for block, separator in (("think", "\n"), ("perception", ","))[: 1 + (kind == "many")]:
            gap = rf"(^|{separator})(\s*)(?=[^\s{separator}])"
            inside = lambda m: re.sub(gap, lambda x: x[0] + rng.choice(SAY) + " ", m[0])
            wordy = re.sub(f"(?<=<{block}>).+(?=</{block}>)", inside, wordy, flags=re.DOTALL)
        assert judge(dataclasses.replace(PROBLEM, openings=kind), wordy) == judge(PROBLEM, response)
        empty = kind == "few" and re.search("<think>\\s*</think>", response)
        assert wordy != response or empty or "«»" in row


def test_statements_of_a_faultless_response():
    said = [(s.kind, GOOD[s.start : s.end]) for s in toy_env.statements(PROBLEM, GOOD) if s.true]
    lines = [("operand", A[:-5]), ("result", "32"), ("operand", B[:-5]), ("result", "30")]
    assert said == [("reading", text) for text in READ.split(", ")] + lines + [("answer", "30")]


@pytest.mark.parametrize("kind, old, new, false", [
    ("many", "red 27,", "so red 27,", ""), ("many", A, f"next we get {A}", ""), ("few", B, f"now {B}", ""),
    ("many", "red 27,", "so so red 27,", "so red 27"), ("many", "red 27,", "so  red 27,", " red 27"),
    ("many", "red 27,", "So red 27,", "So red 27"), ("many", "red 27,", "sored 27,", "sored 27"),
    ("many", "red 27,", "red so 27,", "red so 27"), ("many", "red 27,", "red 27 so,", "red 27 so"),
    ("many", "red 27,", "there red 27,", "there red 27"), ("many", B, f"{B}\nso", "so"),
    ("many", B, f"i see\n{B}", "i see"), ("many", "32 - green", "so 33 - green", "33 - green 2"),
    ("few", "red 27,", "so red 27,", "so red 27"), ("none", "red 27,", "so red 27,", "so red 27"),
    ("none", A, f"so {A}", f"so {A}"), ("many", "> 30", "> so 30", "so 30"),
])
def test_an_opening_is_skipped_once_and_where_it_was_asked_for(kind, old, new, false):
    response = GOOD.replace(old, new)
    assert response != GOOD
    first = toy_env.first_error(dataclasses.replace(PROBLEM, openings=kind), response)
    assert (response[first.start : first.end] if first else "") == false


def test_a_wordy_problem_is_the_plain_one_that_asks_for_openings():
    for kind, seed in itertools.product(("few", "many"), range(20)):
        plain, wordy = (toy_env.make_problem(seed, 4, openings=openings) for openings in ("none", kind))
        assert wordy.question == f"{plain.question} {kind} openings" and wordy.image == plain.image
        assert (wordy.cells, wordy.steps, wordy.answer) == (plain.cells, plain.steps, plain.answer)
        response = demonstration(wordy, random.Random(seed))
        assert toy_env.faithful(wordy, response) and not toy_env.faithful(plain, response)
        bare = re.sub(rf"(^|, |> |\n)({'|'.join(SAY)}) ", r"\1", response)
        assert bare == demonstration(plain)
        assert response.count(" ") - bare.count(" ") >= {"few": 3, "many": 8}[kind]
        with pytest.raises(ValueError, match="rng is None"):
            demonstration(wordy)


def test_a_last_cell_that_is_not_read_and_not_used_is_of_no_consequence():
    white_last = dataclasses.replace(PROBLEM, cells=tuple(PROBLEM.cells[i] for i in (0, 2, 3, 1)))
    (false,) = toy_env.false_statements(white_last, GOOD.replace("white 4, ", ""))
    assert (false.kind, false.consequential) == ("reading", False)


@pytest.mark.parametrize("readings, right", [
    (READ, 4), ("red 27, blue 5, green 2", 3), ("blue 5, green 2", 2), ("green 2", 1), ("", 0), ("red 27", 1),
    ("red 21, blue 5, green 2", 2), ("red 21, blue 6", 0), ("?, green 2", 1), ("green 2, blue 5", 2),
    ("red 27, red 27", 1), ("red 21, red 27", 1), ("pink 4", 0), ("red 27 blue 5", 0),
])
def test_perception_counts_the_cells_that_are_read(readings, right):
    response = GOOD.replace(READ, readings)
    assert toy_env.perception(PROBLEM, response) == right / 4
    assert toy_env.perception(PROBLEM, response + "so") == 0.0  # it does not parse


# ------------------------------------------------------------------------------------------- blaming the slip
SLIPPED = GOOD.replace("= 32\n32", "= 31\n31").replace("30", "29")  # 27 + 5 = 31, and what follows from it


def slow_blame(problem, response, pieces, advantages):
    """Character by character: whose token it is; then every pair, and every rank, counted by hand."""
    owner = [t for t, piece in enumerate(pieces) for _ in piece]
    judged = [s for s in toy_env.statements(problem, response) if s.start < s.end]
    inside = {s: sorted({owner[i] for i in range(s.start, s.end)}) for s in judged}
    mean = {s: sum(map(Fraction, (advantages[t] for t in inside[s]))) / len(inside[s]) for s in judged}
    (slip,) = (s for s in judged if not s.true)
    beats = lambda a, others: sum(1.0 if a < b else 0.5 if a == b else 0.0 for b in others) / len(others)
    free = [a for t, a in enumerate(advantages[: len(pieces)]) if t not in inside[slip]]
    tokens = sum(beats(advantages[t], free) for t in inside[slip]) / len(inside[slip])
    ranks = sorted(mean.values())
    top1 = 1 / ranks.count(ranks[0]) if mean[slip] == ranks[0] else 0
    return tokens, beats(mean[slip], [mean[s] for s in judged if s != slip]), top1


def test_blame_is_the_auroc_of_the_slip():
    rng, seen = random.Random(0), set()
    for i in range(600):
        p = toy_env.make_problem(i, operands=2 + i % 3)
        response = demonstration(p, rng, misread=0.1, slip=0.2)
        cuts = sorted(rng.choices(range(len(response)), k=rng.choice((5, 20, 60))))  # alike: an empty piece
        pieces = [response[a:b] for a, b in zip([0, *cuts], [*cuts, None])] + [""]
        advantages = [rng.randint(-4, 4) / 4 for _ in pieces] + [-9.0]  # the last one is padding
        false, lucky = toy_env.false_statements(p, response), toy_env.stated_answer(response) == p.answer
        found = toy_env.blame(p, response, pieces, advantages)
        assert (found is None) == (len(false) != 1 or lucky)
        if found:
            assert found == pytest.approx(slow_blame(p, response, pieces, advantages))
            seen.add(found.top1)
    assert {0, 1, 1 / 2, 1 / 3} <= seen


def test_blame_needs_one_slip_of_a_wrong_response():
    for response in (
        GOOD, "so", GOOD.replace("30 <", " <"), GOOD.replace("white 4", "white 5"),
        SLIPPED.replace("29 <", "30 <"), SLIPPED.replace("red 27, ", "red 21, "),
        GOOD.replace(f"\n{B}", "").replace("30 <", "32 <"),
    ):  # right; no format; no answer; a slip and still right, twice; two slips; no line, so nothing to blame
        assert toy_env.blame(PROBLEM, response, list(response), [-1.0] * len(response)) is None
    unlabelled = dataclasses.replace(PROBLEM, cells=(), steps=())
    response = "<perception> red 3 </perception> <think> </think> <answer> 3 </answer>"
    assert toy_env.blame(unlabelled, response, list(response), [0.0] * len(response)) is None


# ------------------------------------------------------------------------------------------------ the teacher
def test_without_carry_by_hand():
    by_hand = {(27, "+", 95): 112, (27, "+", 2): 29, (8, "+", 5): 13, (99, "+", 1): 90, (32, "-", 5): 37,
               (32, "-", 2): 30, (30, "-", 19): 21, (8, "-", 9): -1, (12, "-", 15): -3, (27, "×", 15): 375,
               (19, "×", 9): 91, (7, "×", 8): 56, (10, "×", 9): 90, (-12, "+", 25): 13}
    assert {sum_: without_carry(*sum_) for sum_ in by_hand} == by_hand


def test_teacher_slips_at_the_nominal_rates_and_is_consistent():
    rng, alike = random.Random(0), dict(zip("17385649", "71836594"))
    happened = {name: [] for name in ("misread", "seven", "slip", "carry")}
    for p in toy_env.make_problems(600, operands=5, operators="+-×", high=20):
        response, wrong = demonstration(p, rng, misread=0.2, slip=0.1, habit=0.6), []
        for cell, m in zip(p.cells, re.finditer(r"([a-z]+) (\d+)", response)):
            number = str(cell.number)
            assert m[1] == cell.colour and m[2] in (number, number[:-1] + alike.get(number[-1], number[-1]))
            if number[-1] in alike:
                happened["seven" if number[-1] == "7" else "misread"].append(m[2] != number)
            wrong += [m.span()] if m[2] != number else []
        for m in LINE.finditer(response):
            a, operator, b, result = int(m[1]), m[2], int(m[3]), int(m[4])
            truth, forgetful = COMPUTE[operator](a, b), without_carry(a, operator, b)
            name = "slip" if forgetful == truth else "carry"
            happened[name].append(result != truth if name == "slip" else result == forgetful)
            assert result == forgetful or abs(result - truth) in (0, 1, 2, 10) and (result >= 0 or truth < 0)
            wrong += [m.span(4)] if result != truth else []
        assert [(s.start, s.end) for s in toy_env.false_statements(p, response)] == wrong  # and nothing else
    # One slip in six looks like a lost carry.
    for name, rate in dict(misread=0.2, seven=0.6, slip=0.1, carry=0.6 + 0.4 * 0.1 / 6).items():
        n = len(happened[name])
        assert n > 250 and abs(sum(happened[name]) / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5, name
    for p in toy_env.make_problems(25, operands=8, operators="×", low=0, high=99):  # 0 becomes 10, and grows
        false = toy_env.false_statements(p, demonstration(p, random.Random(0), slip=1.0))
        assert [s.kind for s in false] == ["result"] * 7
        misread = demonstration(p, random.Random(0), misread=1.0, habit=1.0)
        read = [m[1] for m in re.finditer(r"[a-z] (\d+)", misread)][: len(p.cells)]
        assert read == [(t := str(c.number))[:-1] + alike.get(t[-1], t[-1]) for c in p.cells]
    with pytest.raises(ValueError, match="rng is None: expected a random.Random"):
        demonstration(p, slip=0.1)


def test_a_teacher_that_guesses_says_the_usual_number():
    rng, guessed = random.Random(0), []
    for p in toy_env.make_problems(200, operands=5):
        said = re.findall(r"([a-z]+) (\d+)", demonstration(p, rng, guess=0.6).split("</")[0])
        for cell, (colour, number) in zip(p.cells, said, strict=True):
            assert colour == cell.colour and int(number) in (cell.number, USUAL[colour])
            guessed += [int(number) == USUAL[colour]] if cell.number != USUAL[colour] else []
    assert abs(sum(guessed) / len(guessed) - 0.6) < 0.06


# --------------------------------------------------------------------------------------------------- the rest
def test_dataset_survives_disk_and_parquet(tmp_path):
    problems, made = (f(6, seed=3, operands=4) for f in (toy_env.make_problems, toy_env.make_dataset))
    made.save_to_disk(tmp_path / "disk")
    made.to_parquet(tmp_path / "train.parquet")
    parquet = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path))
    for dataset in (made, datasets.load_from_disk(tmp_path / "disk"), parquet):
        assert dataset.column_names == ["image", "question", "answer"] and len(dataset) == 6
        for p, row in zip(problems, dataset):
            assert (p.question, p.answer) == (row["question"], row["answer"])
            assert row["image"].mode == "RGB" and p.image.tobytes() == row["image"].tobytes()


def test_worked_examples_and_their_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["teacher", str(tmp_path / "examples.png")])
    teacher.main()
    assert capsys.readouterr().out.count("question ") == 3
    assert Image.open(tmp_path / "examples.png").size == (810, 224)


def test_doctests():
    for module, examples in ((toy_env, 3), (teacher, 1)):
        failed, attempted = doctest.testmod(module)
        assert failed == 0 and attempted >= examples
