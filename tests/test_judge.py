"""examples/judge.py: 100 pairs, half of them the same answer; hostile answers; any thread."""

import doctest
import threading
import time

import pytest

from examples import judge

SAME = [  # truth, claim: either way round
    ("no", "No"), ("north", "North"), ("Yes.", "yes"), ("new york", "**New  York**"), ("B", "b"),
    ("B", "(B)"), ("B", "B."), ("C", r"\text{C}"), ("73", "**73**"), ("73", "`73`"), ("73", "_73_"),
    ("73", "$73$."), ("73", r"\(73\)"), ("73", "７３"), ("1 1/2", "1.5"), ("1 1/2", "3/2"),
    ("3/2", r"1\frac{1}{2}"), ("-1 1/2", r"-\dfrac{3}{2}"), ("1½", r"\frac32"), ("2/4", "½"), ("−5", "-5"),
    ("+5", "5"), ("-0", "0"), ("48", "48.0"), ("0.5", r"\frac{1}{2}"), ("1,234", "1234"),
    ("1,234.5", "1{,}234.50"), ("$1,000", "1000 dollars"), ("1.5e3", "1500"), ("12 cm", "12"),
    ("12", r"12\,\text{cm}"), ("12 m", "12m"), ("12 cm²", r"12\mathrm{cm}^{2}"), ("30", r"30^{\circ}"),
    (r"30^\circ", "30 degrees"), ("50%", "50"), ("3", "3 apples"), ("7 million", "7,000,000"),
    ("x = 12", "12"), (r"m\angle A = 40", "40°"), (r"2\sqrt{221}", r"2 \sqrt { 221 }"), ("√2", "sqrt(2)"),
    ("[0, 1)", r"\left[0, 1.0\right)"), ("3:4", "3 : 4")]
BY_VALUE = [  # the same: math-verify is needed
    (r"1.5 \times 10^{-3}", ".0015"), ("π/2", r"0.5\pi"), ("x^2+1", "1+x^2"),
    (r"\frac{\sqrt{3}}{2}", "√3/2"), (r"\{1, 2\}", r"\{2, 1\}")]
ONE_WAY = [("3 < x < 2", r"\emptyset")]  # a set solves a relation, which is no set
OTHER = [
    ("no", "on"), ("ab", "ba"), ("nowhere", "now here"), ("north", "thorn"), ("A", "B"), ("B", "8"),
    ("1 1/2", "11/2"), ("1 1/2", "1/2"), ("2024-01-02", "2021"), ("01/02/2024", "02/01/2024"), ("2-1", "3-2"),
    ("1990-2000", "1980-1990"), ("3:45", "1/15"), ("3:45", "0.0667"), ("12 cm", "12 m"), ("25°C", "25°F"),
    ("12 cm", "12 cm^2"), ("7", "7 million"), ("2x", "2"), ("2 pi", "2"), ("2ab", "2"), ("3m + 1", "4"),
    ("3 cats", "3 dogs"), ("12", "13 = 12"), ("x = 12", "y = 12"), ("1,2", "1.2"), ("1,2", "2,1"),
    ("(2, 1)", "(3, 1)"), ("[1, 2]", "(1, 2)"), ("[0, 1)", "[0, 1]"), ("1, 2", "1, 2, 3"), ("5, 5", "5"),
    ("(100,200)", "100200"), ("1,234", "1.234"), ("56", "5 6"), ("5", "2(3)"), ("0.333333", "1/3"),
    ("5", "-5"), ("50%", "0.5"), ("x^2", "2x"), ("sqrt(2)", "1.414"), ("102", "10²"), ("0", "1/0"),
    ("5", "5!"), ("", ""), ("x =", ""), ("**", "**"), ("nan", "NaN"), (r"\infty", r"+\infty"),
    ("1" * 201, "1" * 201)]
HOSTILE = [
    "9^{9^{9}}", r"\frac{" * 33 + "1" + "}{2}" * 33, r"\boxed{" * 10**5, "1" * 10**6, "²" * 199,
    "٤" * 99, "1e999", "1, " * 66, "=" * 199, "_" * 199, " " * 199, "'x" * 99, "\0", "\ud800",
    "x+\0", "x+\ud800"]


@pytest.fixture(params=["math-verify", "alone"])
def library(request, monkeypatch):
    if request.param == "alone":
        monkeypatch.setattr(judge, "math_verify", None)
    elif judge.math_verify is None:
        pytest.skip("math-verify is not installed")
    judge.same("x + 1", "1 + x")  # its process starts
    return request.param == "math-verify"


def wrong(pairs, expected, limit=2):
    """The pairs that are not judged so, or not within the limit."""
    found = []
    for truth, claim in pairs:
        start = time.monotonic()
        verdict, seconds = judge.same(truth, claim), time.monotonic() - start
        if verdict is not expected or seconds > limit:
            found.append((truth[:40], claim[:40], verdict, round(seconds, 2)))
    return found


def turned(pairs):
    return [(claim, truth) for truth, claim in pairs]


def test_a_hundred_pairs(library):
    assert len(SAME + BY_VALUE + ONE_WAY) == len(OTHER) == 50
    assert not wrong(SAME + turned(SAME), True)
    assert not wrong(BY_VALUE + turned(BY_VALUE) + ONE_WAY, library)
    assert not wrong(OTHER + turned(OTHER + ONE_WAY) + [(truth, "") for truth, _ in SAME + OTHER], False)


def test_hostile_answers(library):
    assert not wrong([("x + 2", x) for x in HOSTILE], False, limit=6)  # with a new process, after the limit
    for box in (r"<answer>\boxed{", r"\boxed{", "<answer>", "</answer>"):
        assert judge.stated_answer(box * 10**5) is None


def test_any_thread_may_ask_and_a_process_that_cannot_start_leaves_spelling(library, monkeypatch):
    found = []
    run = lambda: found.append([judge.same(*pair) for pair in BY_VALUE + OTHER[-14:]])
    threads = [threading.Thread(target=run) for _ in range(4)]
    [x.start() for x in threads], [x.join() for x in threads]
    assert found == [[library] * len(BY_VALUE) + [False] * 14] * 4
    monkeypatch.setattr(judge, "IDLE", {})
    monkeypatch.setattr(judge.sys, "executable", "/nowhere/python")
    assert not wrong(BY_VALUE, False) and not wrong(SAME, True)


def test_the_examples_in_its_docstrings():
    assert doctest.testmod(judge) == (0, 3)
