"""How many held-out arithmetic problems a model solves: a checkpoint, a waist or an artifact.

python examples/solve.py examples/mobilellm-r1-nano build/nano
"""

import argparse
import itertools
import re

from arithmetic import problems
from tqdm import tqdm

from exporter.generation import Generation, Sampling
from exporter.pipeline import open_speaker
from exporter.tokenizer import load_tokenizer

HELD_OUT_SEED = 1
BOXED = re.compile(r"\\boxed\{([^}]*)\}")


def solved(path: str, count: int) -> float:
    """Share of `count` problems whose last boxed answer is right, greedily."""
    speaker = open_speaker(path, None)
    tokenizer = load_tokenizer(speaker.tokenizer_folder)
    right = 0
    stream = itertools.islice(problems(HELD_OUT_SEED), count)
    for problem in tqdm(stream, path, total=count, unit="problem"):
        prompt = tokenizer.encode(tokenizer.prompt_text(problem.question, raw=False))
        generation = Generation(speaker.runner, prompt, speaker.eos_token_ids, Sampling(256))
        answers = BOXED.findall(tokenizer.decode(list(generation)))
        right += answers[-1:] == [problem.answer]
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve held-out arithmetic problems.")
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    for path in args.paths:
        print(f"{solved(path, args.count):7.1%}  {path}")


if __name__ == "__main__":
    main()
