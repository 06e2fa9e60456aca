"""Tokens per second on this CPU against llama.cpp: one core, one thread, in turns.

    pip install 'mobilellm-exporter[executorch,onnx,llama-cpp]'
    python tests/benchmarks/against_llama_cpp.py 140M=build/140m 950M=build/950m \\
        SmolLM2=build/smollm2 --llama-bench llama.cpp/build/bin/llama-bench --json speed.json

Each MODEL is ``NAME=PATH,PATH…`` with bundles or folders of artifacts, a .gguf among them. A round
starts every program once: it loads the model, reads prompts and decodes. Every second round goes
through the programs backwards. A ratio is formed within a round, so that both of its times are of
the same minute; the table has the median of the ratios and, in brackets, their range.

llama.cpp is the fastest of its programs that are given, for each figure. llama-cpp-python has
llama.cpp's defaults, but for a CPU with AMX its weights are not repacked (see
`devices.engines.python_llama_cpp`): there give a llama-bench that was compiled on this machine.
"""

import argparse
import itertools
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import Contender, contenders, model_and_artifacts, run
from rich.console import Console
from rich.table import Table

from devices.engines import Plan
from devices.errors import DeviceError
from exporter.errors import InputError

PROMPTS, DEPTH, STEPS = (128, 512), 64, 64
#: How often a process reads each prompt. The first reading warms up.
READINGS = 3
KINDS = (*(f"prefill {length}" for length in PROMPTS), f"decode after {DEPTH}")

#: Milliseconds a token of each kind, one list for each round.
Samples = dict[str, list[list[float]]]


def plan_of(readings: int, steps: int) -> Plan:
    """What one process measures."""
    prompts = [length for length in PROMPTS for _ in range(readings)]
    return Plan(prompts=prompts, depths=[DEPTH], steps=steps, warmup=2)


def measure(contender: Contender, plan: Plan, core: int, timeout: float) -> dict[str, list[float]]:
    """Milliseconds a token of each kind, one sample for each reading after the first.

    The steps at the depth are one sample, their mean, since llama-bench tells no more.
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for record in run(contender, plan, core, timeout):
        if record["phase"] == "prefill":
            found[f"prefill {record['tokens']}"] += [ms / record["tokens"] for ms in record["ms"]]
        elif record["phase"] == "decode":
            found[f"decode after {record['depth']}"].append(statistics.mean(record["ms"]))
    return {kind: ms if kind.startswith("decode") else ms[1:] for kind, ms in found.items()}


def measure_in_turns(
    group: Sequence[Contender], plan: Plan, rounds: int, core: int, timeout: float
) -> dict[str, Samples]:
    """The samples of each contender, by its name. One that fails is left out from then on."""
    samples: dict[str, Samples] = {one.name: {kind: [] for kind in KINDS} for one in group}
    for turn in range(rounds):
        for one in group if turn % 2 == 0 else reversed(group):
            if one.name not in samples:
                continue
            try:
                for kind, ms in measure(one, plan, core, timeout).items():
                    samples[one.name][kind].append(ms)
            except DeviceError as error:
                print(f"left out: {error}")
                del samples[one.name]
    return samples


def ratios(own: Samples, others: Sequence[Samples], kind: str) -> list[float]:
    """In each round, the own rate over that of the fastest other."""
    return [
        min(statistics.median(other[kind][turn]) for other in others) / statistics.median(ms)
        for turn, ms in enumerate(own[kind])
    ]


def rates(samples: Samples, kind: str) -> dict[str, float]:
    """Tokens/s: median, quartiles, and the fastest sample, which noise cannot better."""
    ms = sorted(itertools.chain.from_iterable(samples[kind]))
    slow, middle, fast = (
        (1000 / q for q in statistics.quantiles(ms, n=4)[::-1])
        if len(ms) > 1
        else 3 * [1000 / ms[0]]
    )
    return {"median": middle, "low": slow, "high": fast, "best": 1000 / ms[0]}


def summary(group: Sequence[Contender], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """One row for each contender: its rates and ratios of each kind, and the raw samples."""
    llama = {one.name: samples[one.name] for one in group if one.reference and one.name in samples}
    rows = []
    for one in group:
        if one.name not in samples:
            continue
        own, figures = samples[one.name], {}
        for kind in KINDS:
            row: dict[str, Any] = {**rates(own, kind), "ms": own[kind]}
            if llama:
                found = ratios(own, list(llama.values()), kind)
                row["ratio"] = statistics.median(found)
                row["ratio_range"] = [min(found), max(found)]
                row["ratio_of_best"] = row["best"] / max(
                    rates(other, kind)["best"] for other in llama.values()
                )
            figures[kind] = row
        rows.append({
            "name": one.name, "path": str(one.path), "bytes": one.size, "about": one.about,
            "reference": one.reference, "figures": figures,
        })  # fmt: skip
    return rows


def table(model: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [f"{kind}{what}" for kind in KINDS for what in ("", " / llama.cpp")]
    made = Table("", "MB", *columns, box=None, title=f"{model}: tokens/s, median (quartiles) best")
    for row in rows:
        cells = []
        for kind in KINDS:
            one = row["figures"][kind]
            cells.append(
                f"{one['median']:.1f} ({one['low']:.1f}-{one['high']:.1f}) {one['best']:.1f}"
            )
            if "ratio" in one:
                low, high = one["ratio_range"]
                cells.append(
                    f"{one['ratio']:.2f} ({low:.2f}-{high:.2f}) {one['ratio_of_best']:.2f}"
                )
            else:
                cells.append("")
        made.add_row(row["name"], f"{row['bytes'] / 1e6:.1f}", *cells)
    return made


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed against llama.cpp on this CPU.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME=PATH,PATH…")
    parser.add_argument("--llama-bench", type=Path, action="append", default=[], metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--readings", type=int, default=READINGS, help="of a prompt in a round")
    parser.add_argument("--steps", type=int, default=STEPS, help="decoded in a round")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a process")
    parser.add_argument("--only", default="", help="contenders whose name contains one of A,B,…")
    parser.add_argument("--json", type=Path, help="raw samples and summary")
    args = parser.parse_args()
    if args.rounds < 1 or args.readings < 2 or args.steps < 1:
        parser.error("give at least 1 round, 2 readings and 1 step")
    try:
        models = dict(map(model_and_artifacts, args.models))
    except InputError as error:
        parser.error(str(error))
    console, report = Console(width=230), {}
    plan = plan_of(args.readings, args.steps)
    for name, artifacts in models.items():
        group = [one for finished in artifacts for one in contenders(finished, args.llama_bench)]
        wanted = args.only.split(",")
        group = [one for one in group if any(word in one.name for word in wanted)]
        if not any(one.reference for one in group):
            parser.error(f"{name}: has no .gguf that runs here; lower one with --target gguf")
        samples = measure_in_turns(group, plan, args.rounds, args.core, args.timeout)
        report[name] = summary(group, samples)
        console.print(table(name, report[name]), "")
        if args.json:  # after each model: a later one may be stopped
            whole = {"processor": processor(), "core": args.core, "models": report}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")
    console.print(f"{processor()}, core {args.core}, one thread, {args.rounds} rounds")
    for about in dict.fromkeys(row["about"] for rows in report.values() for row in rows):
        console.print(f"- {about}")


if __name__ == "__main__":
    main()
