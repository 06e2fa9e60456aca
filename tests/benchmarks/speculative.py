"""What a draft gains: how often it is right, the time, and how often it would have to be right.

    taskset -c 0 python tests/benchmarks/speculative.py build/large build/small \
        --quantized build/large-int4 --prompts problems.jsonl --field prompt --cpu cortex-a76

Both folders are artifacts of the target `executorch`, the first with `logits=9`. The tables:

- acceptance: for each draft, also the lookup in the text, and for each number of proposals K, the
  proposals, those that were the model's own tokens, the tokens per call of the model, and the time
  of the tokens alone over that with the draft, on this computer. `other texts` are those in which
  a token differs: attention that reads many rows at once adds in another order, and so a call with
  many proposals may decide a near tie otherwise than single steps (docs/speculative.md).
- cost of a call with n tokens over one with 1: time here and, with ``--cpu``, instructions and
  bytes loaded on that CPU.
- by each cost: the acceptance at which the pair is as fast as the model alone, and the gain at
  given acceptances. A share `a` of right proposals, each independent of the others, gives
  (1 - a^(K+1)) / (1 - a) tokens a call (Leviathan et al., arXiv 2211.17192, equation 1).
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from devices import runner
from exporter.calibration.self_generation import read_prompts
from exporter.text.tokenizer import load_tokenizer

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
LOOKUP = "lookup"
REPEATS = 5


def run(model: Path, prompt: Sequence[int], *options: object) -> list[dict[str, Any]]:
    """The records of a run of the native runner. Raises CalledProcessError where it fails."""
    built = runner.build(platform.machine())
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as tokens:
        tokens.write(" ".join(map(str, prompt)))
        tokens.flush()
        files = ["--model", str(model / "model.pte"), "--tokens", tokens.name]
        command = [str(built.runner), *files, *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def generated(model: Path, prompt: Sequence[int], *options: object) -> dict[str, Any]:
    """The record of a generation."""
    return next(r for r in run(model, prompt, *options) if r["phase"] == "generate")


def acceptance(
    model: Path,
    drafts: Sequence[str],
    prompts: Sequence[list[int]],
    count: int,
    most: Sequence[int],
) -> Table:
    """How often each draft was right, and what that did to the time of these tokens."""
    table = Table(
        "draft",
        "K",
        "proposed",
        "right",
        "share",
        "tokens a call",
        "speed",
        "other texts",
        box=None,
    )
    alone = [generated(model, prompt, "--generate", count) for prompt in prompts]
    # The first sample is the prompt, which both read in the same way.
    seconds = sum(sum(one["ms"][1:]) for one in alone)
    for draft in drafts:
        given = draft if draft == LOOKUP else str(Path(draft) / "model.pte")
        for k in most:
            options = ("--generate", count, "--draft", given, "--draft-tokens", k)
            pairs = [generated(model, prompt, *options) for prompt in prompts]
            texts = zip(alone, pairs, strict=True)
            other = sum(one["tokens"] != pair["tokens"] for one, pair in texts)
            drafted, right, calls = (
                sum(pair[key] for pair in pairs) for key in ("drafted", "accepted", "calls")
            )
            took = sum(sum(pair["ms"][1:]) for pair in pairs)
            per_call = (right + calls - len(prompts)) / max(1, calls - len(prompts))
            table.add_row(
                Path(draft).name, str(k), str(drafted), str(right),
                f"{right / max(1, drafted):.1%}", f"{per_call:.2f}", f"{seconds / took:.2f}",
                str(other),
            )  # fmt: skip
    return table


Costs = dict[str, dict[int, float]]  # kind → tokens of a call → cost


def times(model: Path, lengths: Sequence[int]) -> dict[int, float]:
    """Milliseconds of a call with so many tokens, in turns, medians."""
    prompts = [n for _ in range(REPEATS + 1) for n in lengths]
    records = run(model, range(3, 100), "--prompts", ",".join(map(str, prompts)))
    found = [r["ms"][0] for r in records if r["phase"] == "prefill"][len(lengths) :]
    return {n: statistics.median(found[i :: len(lengths)]) for i, n in enumerate(lengths)}


def counts(model: Path, lengths: Sequence[int], cpu: str) -> Costs:
    """Instructions and bytes loaded of a call with so many tokens, in an empty cache, on a CPU."""
    from devices.engines import Model, Plan
    from devices.instructions.counter import check_cpus
    from devices.instructions.emulation import INSTRUCTIONS, LOADED, emulated

    kinds = {f"{cpu}: instructions": INSTRUCTIONS, f"{cpu}: bytes loaded": LOADED}
    made, built = check_cpus([cpu]), runner.build("aarch64")
    described = Model(
        "executorch", model, "model.pte", ("model.pte",), 64, True, True, tuple(range(3, 100))
    )
    with emulated(made, built, described, cpu, 7200.0) as counted:

        def total(*prompts: int) -> dict[str, int]:
            blocks = counted(Plan(prompts=[1, 1, *prompts]))
            return {
                kind: sum(n for (_, _, column), n in blocks.items() if column == key)
                for kind, key in kinds.items()
            }

        base = total()
        found = {n: total(n, n) for n in lengths}
    return {kind: {n: (found[n][kind] - base[kind]) / 2 for n in lengths} for kind in kinds}


def tokens_per_call(share: float, most: int) -> float:
    """Expected tokens of a call of the model with `most` proposals."""
    return float(most + 1 if share == 1 else (1 - share ** (most + 1)) / (1 - share))


def gain(share: float, most: int, large: Mapping[int, float], small: float) -> float:
    """How much faster a pair is than the model alone, by any additive cost."""
    return tokens_per_call(share, most) * large[1] / (most * small + large[most + 1])


def break_even(most: int, large: Mapping[int, float], small: float) -> float | None:
    """The share of right proposals at which a pair is as fast as the model; None if it never is."""
    if gain(1, most, large, small) < 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle, most, large, small) > 1 else (middle, high)
    return high


def gains(kind: str, large: Mapping[int, float], small: float, most: Sequence[int]) -> Table:
    """Break-even and gains by one kind of cost, for the draft and for one that costs nothing."""
    heads = ["K", "call of K + 1", "draft's step", "break-even", *(f"{a:.0%}" for a in ACCEPTANCES)]
    table = Table(*heads, "free: break-even", "free: 50%", box=None, title=f"by {kind}")
    for k in most:
        even, free = break_even(k, large, small), break_even(k, large, 0.0)
        table.add_row(
            str(k), f"{large[k + 1] / large[1]:.2f}", f"{small / large[1]:.2f}",
            "never" if even is None else f"{even:.0%}",
            *(f"{gain(a, k, large, small):.2f}" for a in ACCEPTANCES),
            "never" if free is None else f"{free:.0%}", f"{gain(0.5, k, large, 0.0):.2f}",
        )  # fmt: skip
    return table


def encoded(quantized: Path, prompts: Path, field: str, count: int) -> list[list[int]]:
    """The last prompts of a file, on which `draft.py` does not train, as the model reads them."""
    tokenizer = load_tokenizer(quantized)
    texts = read_prompts(prompts, field)[-count:]
    return [tokenizer.encode(tokenizer.prompt_text(text, raw=False)) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a draft gains.")
    parser.add_argument("model", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--quantized", type=Path, help="for its tokenizer; without: costs only")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--field", default="")
    parser.add_argument("--count", type=int, default=10, help="prompts")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--most", default="1,2,3,4,8", help="numbers of proposals")
    parser.add_argument("--cpu", default="", help="such as cortex-a76: count on it too")
    args = parser.parse_args()
    most = [int(k) for k in args.most.split(",")]
    console = Console(width=160)
    if args.quantized:
        prompts = encoded(args.quantized, args.prompts, args.field, args.count)
        drafts = [str(args.draft), LOOKUP]
        console.print(acceptance(args.model, drafts, prompts, args.tokens, most))
    lengths = sorted({1, *(k + 1 for k in most)})
    large: Costs = {"time on this computer": times(args.model, lengths)}
    small: Costs = {"time on this computer": times(args.draft, [1])}
    if args.cpu:
        large |= counts(args.model, lengths, args.cpu)
        small |= counts(args.draft, [1], args.cpu)
    for kind, costs in large.items():
        console.print(gains(kind, costs, small[kind][1], most))


if __name__ == "__main__":
    main()
