"""Tokens per second of artifacts on this machine: in turns, one thread, medians.

    taskset -c 0 python tests/benchmarks/speed.py build/nano/executorch [OTHER_ARTIFACT ...]

Pin it to one core: with several, the same program varies 2.5-fold from run to run. This is the
speed of this computer and says nothing about a phone.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from exporter.backends import Runner, backend
from exporter.bundle.artifact import open_artifact

PROMPT_LENGTHS = (64, 128, 512)
DECODE_STEPS = 64


def prefill_rate(runner: Runner, tokens: list[int]) -> float:
    started = time.perf_counter()
    runner.prefill(tokens)
    return len(tokens) / (time.perf_counter() - started)


def decode_rate(runner: Runner, token: int) -> float:
    """Tokens/s of the next steps, after whatever the runner read before."""
    started = time.perf_counter()
    for _ in range(DECODE_STEPS):
        runner.decode(token)
    return DECODE_STEPS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of artifacts, in turns.")
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runners = {}
    for path in args.artifacts:
        artifact = open_artifact(path).artifact
        runners[path] = backend(artifact.target.target).load(artifact)
    lengths = [n for n in PROMPT_LENGTHS if all(r.context > n for r in runners.values())]
    rates: dict[tuple[Path, str], list[float]] = {}
    for turn in range(args.repeats + 1):
        for path, runner in runners.items():
            for length in lengths:
                tokens = random.Random(length).choices(range(100), k=length)
                measured = {f"prefill {length}": prefill_rate(runner, tokens)}
                if length == lengths[0]:
                    measured[f"decode after {length}"] = decode_rate(runner, tokens[0])
                if turn:  # the first turn warms up
                    for name, rate in measured.items():
                        rates.setdefault((path, name), []).append(rate)
    names = list(dict.fromkeys(name for _, name in rates))
    table = Table("artifact", "MB", *names, box=None, title="tokens/s, median (range)")
    for path in args.artifacts:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        cells = [
            f"{statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f})"
            for r in (rates[path, name] for name in names)
        ]
        table.add_row(str(path), f"{size:.1f}", *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
