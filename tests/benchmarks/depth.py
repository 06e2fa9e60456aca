"""What a token costs after 0 … 32k others, and the memory for it: one core, one thread.

    mobilellm quantize mobilellm-r1-int4 --checkpoint build/random-140m -o build/140m-int4
    for target in executorch onnx gguf; do
        mobilellm lower build/140m-int4 --target $target -o build/depth-$target max_context=32768
    done
    python tests/benchmarks/depth.py build/depth-executorch build/depth-onnx build/depth-gguf \\
        --json depth.json

Each program reads a text up to each depth and decodes some tokens there. `prefill` is the time of a
token of the last chunk before the depth, `memory` the peak of the process until then. `growth` is
how the cost of a further position changes: 1 where a step is linear in its depth, and about 4 from
one depth to the next where it is quadratic. A program that takes too long is stopped; what it
measured before counts.

Core ML does not run here. For its package, the multiply-accumulates of a decode step are counted
in the reference interpreter: a count, not a time.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from contenders import Contender, contenders, run
from rich.console import Console
from rich.table import Table

from devices.engines import Plan
from devices.engines.records import Record
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.errors import InputError

DEPTHS = (0, 512, 2048, 8192, 32640)
#: Tokens whose reading is timed before each depth. The runners read them in one call.
LAST = 128


def stops(depths: Sequence[int]) -> list[int]:
    """The depths, and before each the place from which the reading is timed."""
    return sorted({place for depth in depths for place in (depth, max(0, depth - LAST))})


def costs(records: Sequence[Record], depths: Sequence[int]) -> dict[int, dict[str, float]]:
    """By depth: milliseconds of a decoded token and of one read before it, peak bytes so far."""
    found: dict[int, dict[str, float]] = {}
    peak, read = 0, [r["ms"][0] / r["tokens"] for r in records if r["phase"] == "prefill"]
    for record in records:
        peak = max(peak, record.get("memory", {}).get("peak_rss", 0))
        if record["phase"] != "decode" or record["depth"] not in depths:
            continue
        one = {"decode_ms": statistics.median(record["ms"]), "decode_best_ms": min(record["ms"])}
        if record.get("filled"):
            one["prefill_ms"] = record["fill_ms"] / record["filled"]
        elif record["depth"] == 0 and read:
            one["prefill_ms"] = read[-1]
        found[record["depth"]] = {**one, "peak_rss": peak}
    return found


def growth(points: Sequence[tuple[int, float]]) -> list[float]:
    """For each depth from the third on: the cost of a further position up to it over that before.

    `points` are depths, ascending, with the times of a token there.
    """
    slopes = [(b - a) / (y - x) for (x, a), (y, b) in pairwise(points)]
    return [after / before for before, after in pairwise(slopes) if before > 0]


def measure(one: Contender, depths: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """The costs of one program, with the growth of both times."""
    plan = Plan(prompts=[LAST, LAST], depths=stops(depths), steps=args.steps, warmup=1)
    records = run(one, plan, args.core, args.timeout, partial=True)
    by_depth = costs(records, depths)
    row: dict[str, Any] = {"name": one.name, "path": str(one.path), "about": one.about}
    for kind in ("decode_ms", "prefill_ms"):
        points = [(depth, cost[kind]) for depth, cost in by_depth.items() if kind in cost]
        row[f"growth_of_{kind.removesuffix('_ms')}"] = growth(points)
    return {**row, "depths": {str(depth): cost for depth, cost in by_depth.items()}}


def table(row: Mapping[str, Any], depths: Sequence[int]) -> Table:
    made = Table("", *map(str, depths), "growth", box=None, title=row["name"])
    for what, key, scale, digits in (
        ("decode, ms", "decode_ms", 1, 2),
        ("prefill, ms a token", "prefill_ms", 1, 3),
        ("memory, MB", "peak_rss", 1e-6, 0),
    ):
        found = (row["depths"].get(str(depth), {}).get(key) for depth in depths)
        cells = ["" if cost is None else f"{cost * scale:.{digits}f}" for cost in found]
        changes = row.get(f"growth_of_{key.removesuffix('_ms')}", [])
        made.add_row(what, *cells, " ".join(f"{change:.1f}" for change in changes))
    return made


def counts_table(row: Mapping[str, Any]) -> Table:
    by_depth = row["multiply_accumulates"]
    made = Table(
        "million a step", *by_depth, box=None, title=f"{row['name']}: multiply-accumulates"
    )
    for what in ("weights", "attention"):
        made.add_row(what, *(f"{count[what] / 1e6:.1f}" for count in by_depth.values()))
    return made


def multiply_accumulates(finished: FinishedArtifact, depths: Sequence[int]) -> dict[str, Any]:
    """Multiply-accumulates of a Core ML package's decode step at each depth, of products with
    weights and of attention. They are those of the shapes, so the cache need not be filled."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from exporter.backends import backend

    runner: Any = backend("coreml").load(finished.artifact)
    runner.prefill([0])
    by_depth = {}
    for depth in depths:
        runner._position = depth
        with FlopCounterMode(display=False) as counter:
            runner.decode(0)
        operations = counter.get_flop_counts()["Global"]
        total = sum(operations.values()) / 2
        weights = sum(operations.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) / 2
        by_depth[str(depth)] = {"weights": weights, "attention": total - weights}
    return {
        "name": ".coreml, counted", "path": str(finished.artifact.path), "about": "not run",
        "depths": {}, "multiply_accumulates": by_depth,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a token against its depth.")
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--steps", type=int, default=8, help="decoded at each depth")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a program")
    parser.add_argument("--llama-bench", type=Path, action="append", default=[], metavar="PROGRAM")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    depths = sorted(set(args.depths))
    try:
        artifacts = [open_artifact(path) for path in args.artifacts]
    except InputError as error:
        parser.error(str(error))
    for finished in artifacts:
        deepest = finished.artifact.target.max_context - args.steps
        if depths[-1] > deepest:
            parser.error(f"{finished.artifact.path}: has no depth {depths[-1]}, only {deepest}")
    console, rows = Console(width=160), list[dict[str, Any]]()
    for finished in artifacts:
        if finished.artifact.target.target == "coreml":
            rows.append(multiply_accumulates(finished, depths))
            console.print(counts_table(rows[-1]))
        for one in contenders(finished, args.llama_bench):
            rows.append(measure(one, depths, args))
            console.print(table(rows[-1], depths))
            if args.json:  # after each: a later one may be stopped
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
