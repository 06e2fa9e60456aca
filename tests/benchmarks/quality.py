"""What each way of rounding leaves of a model's quality, on text that nothing was learned from.

    python tests/benchmarks/quality.py build/smollm2-135m --recipe smollm2-135m-int4-distill \\
        --text wikitext2-valid.txt gsm8k-train.jsonl -o build/quality

The last tenth of each text's lines is held out, the rest calibrates. Every row of the table is a
quantized checkpoint in the output folder; rows that are there are measured, not made again.
"""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from exporter.calibration.sensitivity import model_bits, parameter_count
from exporter.cli import display
from exporter.evaluation.measure import Measures, evaluate
from exporter.evaluation.perplexity import TextScore
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import quantize
from exporter.recipe import load_recipe

HELD_OUT = 10
#: At a temperature of 1 so small a model loses its thread within a hundred tokens.
WRITTEN = {"continue_after": 64, "temperature": 0.9}
METHODS = {
    "absmax": ["quantization.method=absmax"],
    "mse": ["quantization.method=mse"],
    "gptq": ["quantization.method=gptq"],
    "distill": ["quantization.method=distill"],
}


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """The lines to learn from and the last tenth of them, as files."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) - len(lines) // HELD_OUT
    learned, held_out = folder / text.name, folder / f"held-out-{text.name}"
    folder.mkdir(parents=True, exist_ok=True)
    learned.write_text("".join(lines[:cut]), encoding="utf-8")
    held_out.write_text("".join(lines[cut:]), encoding="utf-8")
    return learned, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of each quantization method.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--written", type=int, metavar="TOKENS", help="of a source more: how the "
                        "checkpoint goes on with beginnings out of the first text")  # fmt: skip
    parser.add_argument("--weights", type=float, nargs="+", help="of each source in the mixture")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budget", help="one more row: distilled within it, as '5.3 bits'")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="of the recipe")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    parts = [split(text, args.output / "text") for text in args.text]
    sources = [{"path": str(learned)} for learned, _ in parts]
    if args.written:
        sources.append({"prompts": str(parts[0][0]), "tokens": args.written, **WRITTEN})
    weights = args.weights or [1.0] * len(sources)
    data = json.dumps(
        [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)]
    )
    rows = {name: METHODS[name] for name in args.methods}
    if args.budget:
        rows |= {f"distill, {args.budget}": [f"quantization.budget={args.budget}"]}
    columns = ("perplexity", "loss won back", "KL", "of absmax", "top-1")
    table = Table(
        "weights", "bits", "made in", *(f"{text.stem}: {c}" for text in args.text for c in columns)
    )
    base: list[TextScore] | None = None
    with display.progress() as progress:
        for name, overrides in rows.items():
            recipe = load_recipe(args.recipe, [f"calibration.data={data}", *args.set, *overrides])
            out, started = args.output / name.replace(", ", "-").replace(" ", ""), time.monotonic()
            quantized = quantize(recipe, checkpoint, out, progress)
            assert quantized is not None
            bits = model_bits(quantized.schemes, quantized.config) / parameter_count(
                quantized.config
            )
            minutes = (time.monotonic() - started) / 60
            scores = list[TextScore]()
            for _, held_out in parts:
                asked = Measures(
                    held_out, max_tokens=args.max_tokens, reference=str(args.checkpoint)
                )
                found = evaluate(str(out), None, asked, progress).text
                assert found is not None
                scores.append(found)
            base = base or scores
            cells = [name, f"{bits:.2f}", f"{minutes:.1f} min"]
            for score, worst in zip(scores, base, strict=True):
                assert score.reference_perplexity and score.kl and worst.kl and score.top1_agreement
                lost = worst.perplexity - score.reference_perplexity
                cells += [
                    f"{score.perplexity:.2f} (float {score.reference_perplexity:.2f})",
                    f"{(worst.perplexity - score.perplexity) / lost:.1%}",
                    f"{score.kl:.4f}",
                    f"1/{worst.kl / score.kl:.1f}",
                    f"{score.top1_agreement:.1%}",
                ]
            table.add_row(*cells)
            display.err.print(" | ".join(cells))
    Console(width=250).print(table)


if __name__ == "__main__":
    main()
