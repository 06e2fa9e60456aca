"""What an int8 KV cache of a .pte costs in quality, against the same model with a float cache.

    python tests/benchmarks/kv_cache.py build/smollm2-gptq --text wikitext2-valid.txt \\
        --depths 2048 8192 --split 2048 --kernels native -o build/kv-cache

QUANTIZED is lowered twice, with ``kv_cache=float`` and ``kv_cache=int8``; artifacts that are there
are not made again. Each sequence has as many tokens as the depth. Both artifacts read it up to the
last `--steps` tokens in one call and those one by one; these are scored, against the float cache.

ExecuTorch's kernel of quantized attention has vector code for Arm only. So on x86-64 `--kernels
native` loads the native runner's kernels into this process in place of ExecuTorch's.

With quantized weights XNNPACK rounds activations to int8. Then a difference in the last digit of a
sum makes some of them round to the next code, and over the layers that grows to a KL of its own,
which hides what the cache costs. The row "queries changed by 1e-6" shows it. A checkpoint with
float weights has no such rounding: there the artifacts show the cost of the cache alone.

The rows "in torch" are simulated and split the cost: only queries, only keys or only values are
rounded, or all of them.
"""

import argparse
import ctypes
import importlib.util
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from devices import runner as native
from exporter.backends import executorch
from exporter.backends.executorch import runtime
from exporter.backends.executorch.runtime import ExecuTorchRunner
from exporter.evaluation.agreement import divergence, log_probabilities, same_choice
from exporter.inference.reference import score_each
from exporter.pipeline import lower
from exporter.progress import no_progress
from exporter.quantization.activations import CacheRounding, Roundings, round_rows_to_int8
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.text.documents import read_documents
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import load_tokenizer

#: The limits of the mean KL in nats and of the top-1 agreement at the first depth.
LARGEST_KL, LEAST_AGREEMENT = 1e-3, 0.99
FLOAT, INT8 = "the .pte, float cache", "the .pte, int8 cache"


def use_native_kernels() -> None:
    """Load the native runner's attention kernels. ExecuTorch's are then not loaded: an operator has
    one kernel in a process."""
    spec = importlib.util.find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    portable = package / "include" / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    architecture = platform.machine()
    with tempfile.TemporaryDirectory() as scratch:
        objects = list[str]()
        for name, options in native.KERNELS[architecture].items():
            objects.append(f"{scratch}/{name}.o")
            native.compile_for(
                architecture, "g++", "-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", *options,
                f"-DKERNELS={name}", "-c", str(native.SOURCES / "attention_kernel.cpp"),
                "-o", objects[-1],
            )  # fmt: skip
        library = f"{scratch}/kernels.so"
        native.compile_for(
            architecture, "g++", "-std=c++17", "-O2", "-fPIC", "-shared",
            "-DC10_USING_CUSTOM_GENERATED_MACROS", f"-I{package / 'include'}", f"-I{portable}",
            str(native.SOURCES / "attention.cpp"), *objects, "-o", library,
            f"-L{package / 'lib'}", "-lexecutorch", "-lexecutorch_threadpool",
            f"-Wl,-rpath,{package / 'lib'}",
        )  # fmt: skip
        ctypes.CDLL(library)
    runtime._load_custom_kernels = lambda: None


def only(which: str) -> CacheRounding:
    """Rounds what `which` names, out of the letters q, k and v."""

    def rounded(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            round_rows_to_int8(x) if name in which else x
            for name, x in zip("qkv", given, strict=True)
        )
        return q, k, v

    return rounded


def last_logits(model: ExecuTorchRunner, tokens: Sequence[int], steps: int) -> Tensor:
    """Logits [steps, vocab_size] of the last `steps` tokens, read one by one after the others."""
    prompt = len(tokens) - steps
    model.run(list(tokens[:prompt]), 0)
    return torch.stack([model.run([tokens[at]], at) for at in range(prompt, len(tokens))])


def losses(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss, the KL to the reference and whether the choice is the same: float64 [3, steps]."""
    log_p, log_q = log_probabilities(reference), log_probabilities(logits)
    loss = -log_q.gather(-1, targets[:, None])[:, 0]
    same = same_choice(reference, logits).double()
    return torch.stack((loss, divergence(log_p, log_q), same))


def measured(
    artifacts: dict[str, Path], sequences: Sequence[Sequence[int]], steps: int
) -> dict[str, Tensor]:
    """By row of the table: the figures of `losses` of all sequences, [3, positions]."""
    found: dict[str, list[Tensor]] = {name: [] for name in artifacts}
    expected = list[Tensor]()
    for name, path in artifacts.items():
        started, model = time.process_time(), ExecuTorchRunner(path)
        for number, tokens in enumerate(sequences):
            logits = last_logits(model, tokens[:-1], steps)
            if name == FLOAT:
                expected.append(logits)
            found[name].append(losses(expected[number], logits, torch.tensor(tokens[-steps:])))
        print(f"{name}: {time.process_time() - started:.0f} s of CPU time", file=sys.stderr)
    return {name: torch.cat(parts, -1) for name, parts in found.items()}


def changed_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that differ as they do between two kernels that add up in another order."""
    generator = torch.Generator().manual_seed(0)
    return q * (1 + 1e-6 * torch.randn(q.shape, generator=generator)), k, v


def simulated(
    quantized: QuantizedCheckpoint, sequences: Sequence[Sequence[int]], steps: int
) -> dict[str, Tensor]:
    """The same in torch, with the rounding of queries, keys and values apart."""
    ways: dict[str, CacheRounding | None] = {"float cache": None}
    ways |= {f"{' and '.join(which)} in int8": only(which) for which in ("q", "k", "v", "kv")}
    all_of_it = {"q and k and v in int8": only("qkv")}
    noise: dict[str, CacheRounding | None] = {
        "float cache": None, "queries changed by 1e-6": changed_queries,
    }  # fmt: skip
    names = [("float activations", way) for way in (*ways, *all_of_it)]
    names += [("int8 activations", way) for way in (*noise, *all_of_it)]
    roundings = [Roundings(None, one) for one in (*ways.values(), *all_of_it.values())]
    roundings += [
        Roundings(round_rows_to_int8, one) for one in (*noise.values(), *all_of_it.values())
    ]
    found: dict[str, list[Tensor]] = {f"in torch, {first}: {way}": [] for first, way in names}
    for tokens in sequences:
        read, targets = tokens[:-1], torch.tensor(tokens[-steps:])
        each = score_each(quantized, read, range(len(read) - steps, len(read)), roundings)
        for name, logits in zip(found, each, strict=True):
            reference = each[0] if "float activations" in name else each[len(ways) + 1]
            found[name].append(losses(reference, logits, targets))
    return {name: torch.cat(parts, -1) for name, parts in found.items()}


def figures(values: Tensor) -> dict[str, float]:
    """Perplexity, mean KL with its standard error, the 99th percentile of KL, and agreement."""
    loss, kl, same = values
    return {
        "positions": len(kl),
        "perplexity": loss.mean().exp().item(),
        "kl": kl.mean().item(),
        "kl_error": (kl.std() / len(kl) ** 0.5).item(),
        "kl_99": kl.quantile(0.99).item(),
        "top1": same.mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="An int8 KV cache against a float one.")
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=[2048])
    parser.add_argument("--kernels", choices=["official", "native"], default="official")
    parser.add_argument("--split", type=int, nargs="*", default=[], help="depths to simulate too")
    parser.add_argument("--steps", type=int, default=256, help="tokens scored in each sequence")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    quantized = open_quantized(args.quantized)
    context, artifacts = max(args.depths), dict[str, Path]()
    floats = executorch.Target(max_context=context)
    for name, target in ((FLOAT, floats), (INT8, floats.model_copy(update={"kv_cache": "int8"}))):
        folder = args.output / f"{target.kv_cache}-{context}"
        if not (folder / executorch.FILE_NAME).is_file():
            lower(quantized, target, folder, no_progress)
        artifacts[name] = folder / executorch.FILE_NAME
    texts = [text for text in read_documents(args.text) if isinstance(text, str)]
    tokenizer, rows = load_tokenizer(quantized.path), dict[int, dict[str, dict[str, float]]]()
    if args.kernels == "native":
        use_native_kernels()
    for depth in args.depths:
        sequences = cut_sequences(
            texts, tokenizer, quantized.bos_token_id, depth + 1, args.sequences * (depth + 1)
        )
        found = measured(artifacts, sequences, args.steps)
        if depth in args.split:
            found |= simulated(quantized, sequences, args.steps)
        rows[depth] = {name: figures(values) for name, values in found.items()}
        show({depth: rows[depth]})
    (args.output / "kv-cache.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak memory of this process {peak:.0f} MiB", file=sys.stderr)
    first = rows[args.depths[0]][INT8]
    sys.exit(first["kl"] > LARGEST_KL or first["top1"] < LEAST_AGREEMENT)


def show(rows: dict[int, dict[str, dict[str, float]]]) -> None:
    """The table: each depth, each way."""
    table = Table(box=None, header_style="bold")
    for title in ("depth", "", "predictions", "perplexity", "KL", "99th percentile", "top-1"):
        table.add_column(title, justify="left" if title in ("depth", "") else "right")
    for depth, found in rows.items():
        for name, one in found.items():
            table.add_row(
                f"{depth:,}", name, f"{one['positions']:.0f}", f"{one['perplexity']:.3f}",
                f"{one['kl']:.2e} ± {one['kl_error']:.0e}", f"{one['kl_99']:.2e}",
                f"{one['top1']:.2%}",
            )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
