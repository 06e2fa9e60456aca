"""Generate arithmetic word problems with step-by-step reasoning.

    python examples/arithmetic.py --seed 1 --count 3        # JSONL on stdout

A problem changes one number in two to four steps; every value is within 0..999. The same seed
always gives the same problems. Seeds below `HELD_OUT_SEEDS` are held out from training.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_SEEDS = 100
LIMIT = 999

NAMES = "Ada Ben Cora Dan Elif Finn Gita Hugo Ines Juan Kira Liam Mona Nils Olga Paul".split()
ITEMS = "apples beads books cards coins eggs kites lemons marbles nuts pens roses shells".split()

GAIN = (
    "{name} finds {n} more.",
    "{friend} gives {name} {n} more.",
    "{name} buys another {n}.",
    "Then {n} {items} are added.",
)
LOSS = (
    "{name} loses {n} of them.",
    "{name} gives {n} to {friend}.",
    "{name} sells {n}.",
    "Then {n} {items} are taken away.",
)
TIMES = (
    "Then the number of {items} grows to {n} times as many.",
    "{friend} multiplies the {items} of {name} by {n}.",
)
SHARE = (
    "{name} splits them into {n} equal parts and keeps one part.",
    "{name} shares them equally among {n} people and keeps one share.",
)
TEMPLATES = {"+": GAIN, "-": LOSS, "*": TIMES, "/": SHARE}


@dataclass(frozen=True)
class Problem:
    question: str
    reasoning: str
    answer: str


def make_problem(rng: random.Random) -> Problem:
    """A random problem. Its reasoning ends with ``\\boxed{answer}``."""
    name, friend = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    value = rng.randint(2, 400)
    sentences = [f"{name} has {value} {items}."]
    chain = [f"{name} starts with {value} {items}."]
    for _ in range(rng.randint(2, 4)):
        sign, n = rng.choice(_possible_steps(value, rng))
        sentence = rng.choice(TEMPLATES[sign])
        sentences.append(sentence.format(name=name, friend=friend, items=items, n=n))
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
        chain.append(f"{value} {sign} {n} = {result}.")
        value = result
    sentences.append(f"How many {items} does {name} have now?")
    chain.append(f"The answer is \\boxed{{{value}}}.")
    return Problem(" ".join(sentences), "\n".join(chain), str(value))


def _possible_steps(value: int, rng: random.Random) -> list[tuple[str, int]]:
    steps = []
    if value < LIMIT:
        steps.append(("+", rng.randint(1, LIMIT - value)))
    if value > 1:
        steps.append(("-", rng.randint(1, value)))
    if 1 < value <= LIMIT // 2:
        steps.append(("*", rng.randint(2, min(9, LIMIT // value))))
    divisors = [n for n in range(2, 10) if value and value % n == 0]
    if divisors:
        steps.append(("/", rng.choice(divisors)))
    return steps


def problems(seed: int) -> Iterator[Problem]:
    """An infinite sequence of problems, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield make_problem(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    stream = problems(args.seed)
    for _ in range(args.count):
        problem = next(stream)
        row = {
            "prompt": problem.question,
            "completion": problem.reasoning,
            "answer": problem.answer,
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
