"""False alarms and detection of the gate, with real samples of this machine.

    python tests/benchmarks/gate_alarms.py build/gate-alarms

Two models are made of the demo checkpoint's layers: one of nine, and a slower one of ten. Both are
profiled on one core, and so is the first one again in sessions of their own. Whole repeats are then
drawn from these profiles and go through the gate's own comparison:

- equal: both sides from the same profile. Any alarm of any figure is a false one.
- 10 % slower: as equal, with the times of one side multiplied by 1.1, all of them or one alone.
- ten layers: one side from the slower model.
- sessions: one whole session against another one. Nothing is drawn.

Refused are comparisons of which the gate says that other programs took the processor from one side.

Profiles are kept in the folder; the same command draws again. Delete it to measure again.
"""

import argparse
import json
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from exporter.bundle.bundle import is_bundle, open_bundle
from exporter.bundle.results import PROFILE, Result
from exporter.gate.baseline import compare
from exporter.gate.budget import Tolerances
from exporter.gate.figure import LATENCY, Figure, Figures
from exporter.gate.figures import collect
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import export, with_targets
from exporter.profiling import Request, profile
from exporter.progress import no_progress
from exporter.recipe import load_recipe

DEMO = Path(__file__).parents[2] / "examples" / "mobilellm-r1-nano"
TARGETS = ("executorch", "onnx")
LAYERS, SLOWER = 9, 10


def deep_checkpoint(folder: Path, layers: int) -> Path:
    """The demo checkpoint with its layers repeated until there are so many."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    config, tensors = json.loads((DEMO / "config.json").read_text()), {}
    given = config["num_hidden_layers"]
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        prefix, _, rest = name.partition(".layers.")
        if not rest:
            tensors[name] = tensor
            continue
        number, _, part = rest.partition(".")
        for layer in range(int(number), layers, given):
            tensors[f"{prefix}.layers.{layer}.{part}"] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    config |= {"num_hidden_layers": layers, "no_rope_layers": [1] * layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def deep_bundle(folder: Path, layers: int) -> Path:
    """A bundle of the demo checkpoint with so many layers."""
    out = folder / f"{layers}-layers"
    if not is_bundle(out):
        # This form runs in the native runner, whose process starts in less time than torch needs.
        given = load_recipe("mobilellm-r1-nano-int4", ["targets.0.attention=portable"])
        recipe = with_targets(given, TARGETS)
        checkpoint = open_checkpoint(str(deep_checkpoint(folder / f"{layers}-checkpoint", layers)))
        made = export(recipe, checkpoint, out, no_progress)
        assert made.bundle is not None, [check for check in made.checks if not check.passed]
    return out


def measured(folder: Path, name: str, layers: int, repeats: int, core: int) -> Mapping[str, Any]:
    """The profile `name` of a model with so many layers: `repeats` repeats on one core."""
    file, bundle = folder / f"{name}.json", deep_bundle(folder, layers)
    if not file.is_file():
        settings = "prompt_lengths=[64,256]", "depths=[0,512]", "sustained_seconds=0"
        request = Request(
            ["host"], TARGETS, (*settings, "precision=0.000001", f"max_repeats={repeats}"),
            threads=1, cores=str(core), output=file,
        )  # fmt: skip
        print(f"measuring {name}; load average {os.getloadavg()[0]:.1f}", flush=True)
        profile(bundle, request, no_progress)
    return json.loads(file.read_text())


def figures(folder: Path, layers: int, report: Mapping[str, Any]) -> Figures:
    """What the gate reads of a profile: its times and its memory."""
    manifest = open_bundle(deep_bundle(folder, layers)).manifest
    found = collect(manifest, {"profile": Result(PROFILE, report)})
    return Figures([figure for figure in found.figures if figure.repeats], found.gaps)


def drawn(pool: Figures, chosen: Mapping[str, Sequence[int]]) -> Figures:
    """The figures of some repeats of each target: all figures of a target from the same ones."""
    return Figures(
        [
            replace(f, repeats=[f.repeats[i] for i in chosen[str(f.target)]], value=_middle(f))
            for f in pool.figures
        ],
        pool.gaps,
    )


def _middle(figure: Figure) -> float:
    return statistics.median(map(statistics.median, figure.repeats))


def slowed(now: Figures, only: tuple[str | None, str] | None = None) -> Figures:
    """The figures with 10 % longer times: all of them, or `only` that of a target and name."""
    return Figures(
        [
            replace(f, repeats=[[1.1 * ms for ms in samples] for samples in f.repeats])
            if f.kind == LATENCY and only in (None, (f.target, f.name))
            else f
            for f in now.figures
        ],
        now.gaps,
    )


def halves(generator: random.Random, count: int, of: int) -> Iterator[dict[str, list[int]]]:
    """Two choices of `count` of `of` repeats, of each target, that have none in common."""
    orders = {target: generator.sample(range(of), 2 * count) for target in TARGETS}
    yield {target: order[:count] for target, order in orders.items()}
    yield {target: order[count:] for target, order in orders.items()}


@dataclass(frozen=True)
class Outcome:
    """The figures that the gate finds worse, and those that it refuses to compare."""

    worse: list[str]
    refused: list[str]


def outcome(now: Figures, before: Figures) -> Outcome:
    failed = [one for one in compare(now, before, Tolerances()).findings if not one.passed]
    worse = [f"{one.target} {one.name}" for one in failed if one.value is not None]
    return Outcome(worse, [one.name for one in failed if one.value is None])


@dataclass(frozen=True)
class Trial:
    """Comparisons of `count` repeats of one pool with `count` of the baseline's."""

    count: int
    repeats: int
    baseline: Figures

    def run(self, runs: int, pool: Figures, change: Callable[[Figures], Figures]) -> list[str]:
        """Cells of a table: the number of comparisons, and how many gave an alarm."""
        generator, found = random.Random(0), list[Outcome]()
        for _ in range(runs):
            first, second = halves(generator, self.count, self.repeats)
            found.append(outcome(change(drawn(pool, first)), drawn(self.baseline, second)))
        return cells(self.count, found)


def cells(count: int, found: Sequence[Outcome]) -> list[str]:
    runs = len(found)
    alarms, refused = sum(bool(one.worse) for one in found), sum(bool(one.refused) for one in found)
    by_figure = Counter(name for one in found for name in one.worse)
    common = ", ".join(f"{name} {n / runs:.1%}" for name, n in by_figure.most_common(3))
    return [str(count), str(runs), str(alarms), f"{alarms / runs:.1%}", str(refused), common]


def main() -> None:
    parser = argparse.ArgumentParser(description="False alarms and detection of the gate.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=40, help="of each profile to draw from")
    parser.add_argument("--sessions", type=int, default=3, help="further sessions of 20 repeats")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--core", type=int, default=0)
    args = parser.parse_args()
    base = measured(args.folder, "nine", LAYERS, args.repeats, args.core)
    slow = measured(args.folder, "ten", SLOWER, args.repeats, args.core)
    sessions = [
        measured(args.folder, f"session-{number}", LAYERS, 20, args.core)
        for number in range(args.sessions)
    ]
    pool, slower = figures(args.folder, LAYERS, base), figures(args.folder, SLOWER, slow)
    for figure in pool.figures:
        key = figure.target, figure.name
        other = next(f for f in slower.figures if (f.target, f.name) == key)
        change = _middle(other) / _middle(figure) - 1
        print(
            f"{figure.target} {figure.name}: {_middle(figure):.4g} {figure.unit}, "
            f"{figure.cpu_share:.2f} cores; ten layers {change:+.1%}, {other.cpu_share:.2f} cores"
        )
    print(f"{len(pool.figures)} figures in each comparison")
    table = Table("comparison", "repeats", "runs", "alarms", "share", "refused", "by figure")
    for count in (c for c in (6, 10, 20) if 2 * c <= args.repeats):
        trial = Trial(count, args.repeats, pool)
        table.add_row("equal", *trial.run(args.draws, pool, lambda now: now))
        table.add_row("all 10 % slower", *trial.run(args.draws, pool, slowed))
        for figure in pool.figures:
            if figure.kind == LATENCY:
                alone = partial(slowed, only=(figure.target, figure.name))
                what = f"{figure.target} {figure.name} alone 10 % slower"
                table.add_row(what, *trial.run(args.draws // 4, pool, alone))
        table.add_row("ten layers for nine", *trial.run(args.draws, slower, lambda now: now))
    whole = [figures(args.folder, LAYERS, report) for report in (base, *sessions)]
    results = [outcome(now, before) for now, before in permutations(whole, 2)]
    if results:
        table.add_row("sessions of equal models", *cells(20, results))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
