"""The sloppy teacher: tiny_vlm imitates its responses, and reinforcement learning is to remove its slips.

    python -m tiny_vlm.teacher [PICTURE]     three problems, its responses, and what is wrong in them
"""

import random
import sys

from PIL import Image, ImageDraw

from toy_env import OPENED, OPENINGS, OPERATORS, Problem, first_error, make_problem, reward, usual_number

LOOK_ALIKE = {"1": "7", "7": "1", "3": "8", "8": "3", "5": "6", "6": "5", "4": "9", "9": "4"}


def demonstration(problem: Problem, rng: random.Random | None = None, misread: float = 0.0,
                  slip: float = 0.0, habit: float = 0.0, guess: float = 0.0) -> str:
    """A sloppy teacher's response; without the rates, a faultless one. What follows a slip agrees with it.

    rng: needed for rates above 0, and for filler words.  misread: the chance that a number's last digit is
    read as its look-alike.  slip: the chance of a wrong result.  habit: the chance of the teacher's two
    habits, to read a 7 as a 1 and to forget a carry or a borrow; above one half, imitation turns them into
    the greedy choice.  guess: the chance of a third, to name a colour's usual number (of 1 to 9) unseen.
    """
    if (max(misread, slip, habit, guess) > 0 or OPENED[problem.openings]) and rng is None:
        raise ValueError("rng is None: expected a random.Random where a rate is above 0, or for openings")
    happens = lambda chance: chance > 0 and rng.random() < chance
    opening = lambda block: rng.choice(OPENINGS) + " " if block in OPENED[problem.openings] else ""
    numbers = {}
    for cell in problem.cells:
        text = str(cell.number)
        if text[-1] in LOOK_ALIKE and happens(habit if text[-1] == "7" else misread):
            text = text[:-1] + LOOK_ALIKE[text[-1]]
        if happens(guess):
            text = str(usual_number(cell.colour))
        numbers[cell.colour] = int(text)
    colour = problem.question.split()[0]
    left, lines, named = numbers[colour], [], colour + " "  # only the first line names its left operand
    for step in problem.steps:
        right = numbers[step.colour]
        result = OPERATORS[step.operator](left, right)
        forgetful = without_carry(left, step.operator, right)
        if forgetful != result and happens(habit):
            result = forgetful
        elif happens(slip):
            result += rng.choice([d for d in (-10, -2, -1, 1, 2, 10) if result + d >= 0] or [1])
        lines.append(f"{opening('think')}{named}{left} {step.operator} {step.colour} {right} = {result}")
        left, named = result, ""
    readings = ", ".join(f"{opening('perception')}{colour} {number}" for colour, number in numbers.items())
    body = "\n".join(lines)
    return f"<perception> {readings} </perception> <think> {body} </think> <answer> {left} </answer>"


def without_carry(left: int, operator: str, right: int) -> int:
    """The result of who forgets the carry into the tens of `left`, or the borrow from them; the true result
    where there is none to forget.

    >>> [without_carry(*sum_) for sum_ in ((27, "+", 5), (32, "-", 5), (27, "×", 3), (8, "+", 5))]
    [22, 37, 61, 13]
    """
    result, ones = OPERATORS[operator](left, right), OPERATORS[operator](left % 10, right % 10)
    if left < 10 or result < 0:
        return result
    return result - 10 * (ones // 10)  # ones // 10 is the carry: 1 for 7 + 5, -1 for 2 - 5, 2 for 7 × 3


def main() -> None:
    """Three worked examples, printed, and a picture of their images."""
    out = sys.argv[1] if len(sys.argv) > 1 else "toy_env.png"
    rng, picture = random.Random(1), Image.new("RGB", (810, 224), "white")
    for x, operands in (10, 2), (280, 3), (550, 4):
        problem = make_problem(0, operands, operators="+-×")
        response = demonstration(problem, rng, misread=0.13, slip=0.1, habit=0.6)
        error = first_error(problem, response)
        found = f"{error.kind} {response[error.start:error.end]!r}" if error else "none"
        print(f"question  {problem.question}   answer {problem.answer}\n{response}")
        print(f"reward {reward(problem, response):.0f}   first error: {found}\n")
        question = problem.question.replace("×", "x")  # the font has no ×
        ImageDraw.Draw(picture).text((x, 8), question, fill="black")
        picture.paste(problem.image.resize((192, 192), Image.Resampling.NEAREST), (x, 24))
    picture.save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
