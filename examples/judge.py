"""Whether the short answer in a response is right. The rules are the lines of `equal`, in order."""

import faulthandler
import os
import re
import sys
import threading
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from subprocess import DEVNULL, PIPE, Popen

LONGEST = 200  # characters of an answer; a longer one is wrong
SECONDS = 1.5  # for math-verify on a pair; what takes longer is wrong: 9^{9^{9}} is an answer too
SPELLINGS = {  # of one thing, replaced in this order
    "−": "-", "–": "-", "÷": "/", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
    "√": r"\sqrt", "<=": "≤", ">=": "≥", "≤": r"\le ", "≥": r"\ge ", r"\dfrac": r"\frac", "½": " 1/2",
    "²": "^2", "³": "^3", "^{2}": "^2", r"^{\circ}": "°", r"^\circ": "°", " degrees": "°", " percent": "%",
    r"\%": "%", "{,}": ",", " thousand": "e3", " million": "e6", " billion": "e9"}
UNIT = r"%|°[cf]?|[kcm]?m(?:\^[23])?|kg|in|ft"  # with or without a space: 12cm; 2x and 2ab are products
WORD = r"(?<= )(?!pi$)(?:square |cubic )?[a-z/]{2,}"  # any word after a space: 3 apples
math_verify = find_spec("math_verify")  # github.com/huggingface/Math-Verify; None if it is missing
IDLE, LOCK = {}, threading.Lock()  # its process while it waits, under our id: a fork starts its own


def stated_answer(response: str) -> str | None:
    r"""The text of the last answer block, or of the last \boxed{…} in it or, without a block, anywhere.

    >>> stated_answer(r"7? <answer> \boxed{\frac{1}{2}} </answer>"), stated_answer("7")
    ('\\frac{1}{2}', None)
    """
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    text = response if start < 0 else response[start + len("<answer>"):end].strip()
    before, box, after = text.rpartition(r"\boxed{")
    depth = 1
    for i, letter in enumerate(after[:LONGEST + 1] if box else ""):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return after[:i].strip()
    return None if start < 0 else text


def same(truth: str, claim: str) -> bool:
    """Whether a claim is the truth. An empty or infinite truth, or NaN, is never right.

    >>> same("Yes", "**yes.**"), same("B", "(b)"), same("1 1/2", "1.5"), same("x = 12", "12 cm")
    (True, True, True, True)
    >>> same("no", "on"), same("12", "13 = 12"), same("12 cm", "12 m"), same("1, 2", "2, 1"), same("", "")
    (False, False, False, False, False)
    """
    ours, theirs = (plain(x) if len(x) <= LONGEST else "" for x in (truth, claim))
    return ours.lower().strip("+-\\") not in ("", "nan", "inf", "infinity", "infty") and equal(ours, theirs)


def equal(truth: str, claim: str) -> bool:  # of plain texts
    if truth == claim:
        return True
    if ("=" in truth) != ("=" in claim):  # x = 12 is 12, and 13 = 12 is not
        truth, claim = (re.sub(r"^[\\A-Za-z][\\\w ]*=(?=.)", "", x) for x in (truth, claim))
        return "=" not in truth + claim and equal(truth, claim)
    with_unit = rf"(.*?)(?:(?<=[\d}})]) ?({UNIT}|{WORD}))?"
    (ours, unit), (theirs, other) = (re.fullmatch(with_unit, x).groups() for x in (truth, claim))
    if unit or other:  # 12 cm is 12, and is not 12 m
        return (unit == other or not (unit and other)) and equal(ours, theirs)
    if None not in (values := [number(truth), number(claim)]):  # 1 1/2 is 1.5
        return values[0] == values[1]
    if "," in truth + claim and not truth.startswith(r"\{"):  # part by part: [0, 1) is [0, 1.0)
        ours, theirs = (re.split(r" ?([\[\](),]) ?", x) for x in (truth, claim))
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(math_verify and is_maths(truth) and is_maths(claim) and by_value(truth, claim))


def plain(answer: str) -> str:
    """An answer without layout, and words without case."""
    text = re.sub(r"\\(?:text|math)(?:bf|it|rm)? ?\{([^{}]*)\}", r" \1 ", answer)  # \text{yes}
    text = re.sub(r"\\?\$|\\[()\[\],;:!]|\\(?:left|right)(?![a-z])", "", text)  # $, \(, \,
    for spelling, ours in SPELLINGS.items():
        text = text.replace(spelling, ours)
    text = re.sub(r"\\?\bsqrt ?(?:\((\w+)\)|(\d+))", r"\\sqrt{\1\2}", text)  # sqrt(2), √2
    text = re.sub(r" ?([^\w\s,]) ?", r"\1", " ".join(text.split()))  # no space around a sign
    text = re.sub(r"^\(?([A-Za-z])\)$", r"\1", text.strip('*_`" ').rstrip('*_`" .'))  # (B) is B
    return text if is_maths(text) else text.casefold()


def is_maths(text: str) -> bool:
    """Not words, nor what math-verify would take for a sum or product: 2024-01-02, 1990-2000, 3:45, 5 6."""
    rest = re.sub(r"\\[A-Za-z]+", r"\\", text)  # \sin is no word
    return text.isascii() and not re.search(r"[A-Za-z]{2}|^[^\d\\]*$|\d[ (]\d|:|^\d+-[\d-]+$|^\d+/\d+/", rest)


def number(text: str) -> Fraction | None:
    r"""What a plain text is worth, exactly: 12, 1,234.50, 1.5e3, -1 1/2, 1\frac{1}{2}. Not 5 6 or 1/0."""
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)  # 1,234
    text = re.sub(r" ?\\frac(?:(\d)(\d)|\{(\d+)\}\{(\d+)\})$", r" \1\3/\2\4", text)  # 1\frac12 is 1 1/2
    found = re.fullmatch(r"([+-]?)(?:(\d*) (?=.*/))?([\d./]+([eE][+-]?\d{1,3})?)", text)
    with suppress(ValueError, ZeroDivisionError):
        return int(found[1] + "1") * (int(found[2] or 0) + Fraction(found[3])) if found else None


def by_value(truth: str, claim: str) -> bool | None:
    """What math-verify says, in a process that ends itself at the limit; None if there can be none."""
    with LOCK, suppress(OSError):
        process = IDLE.pop(os.getpid(), None) or Popen([sys.executable, __file__], text=True, stdin=PIPE,
                                                       stdout=PIPE, stderr=DEVNULL, start_new_session=True)
        print(truth, claim, sep="\t", file=process.stdin, flush=True)
        if verdict := process.stdout.readline():
            IDLE[os.getpid()] = process
        return verdict == "True\n"


if __name__ == "__main__":  # that process: a pair a line, until its input ends
    from math_verify import LatexExtractionConfig, parse, parser, verify  # its units stay: 3m + 1 is not 4
    latex = [LatexExtractionConfig(normalization_config=parser.NormalizationConfig(malformed_operators=True))]
    parse(r"$\frac{\sqrt{3}}{2}$", latex)  # the first takes longest
    for line in sys.stdin:
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # in the middle of a power in C too
        pair = (parse(f"${x}$", latex, parsing_timeout=None) for x in line.strip().split("\t"))
        print(verify(*pair, timeout_seconds=None), flush=True)
        faulthandler.cancel_dump_traceback_later()
