"""How far a Core ML package, in the reference interpreter, is from torch on real text.

    python tests/benchmarks/coreml_accuracy.py build/nano --text FILE [--float32-casts-ignored]

BUNDLE has a Core ML artifact whose context holds the text. Each position of the text is compared
once. A package gives the logits of the last token that it was told, so the text is read again
and again: a longer prompt each time, in chunks, the last one padded, and then 128 tokens one by
one, which continue from the state that the chunks left. The reference is the quantized checkpoint
in float32: the integers are the same, and what differs is float16 arithmetic. With the option,
every float32 value of the program is rounded to float16 too.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from exporter.backends.coreml.running import interpreted
from exporter.bundle.bundle import open_bundle
from exporter.inference.reference import score
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.runs import DECODE_STEPS

LARGEST_ERROR, LEAST_AGREEMENT = 5e-3, 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description="A Core ML package against the torch reference.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--float32-casts-ignored", action="store_true")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    text = args.text.read_text(encoding="utf-8")[: 20 * args.positions]
    tokens = load_tokenizer(bundle.quantized.path).encode(text)[: args.positions]
    runner = interpreted(bundle.artifacts["coreml"].artifact, half=args.float32_casts_ignored)
    started, rows = time.process_time(), list[torch.Tensor]()
    while len(rows) < len(tokens):
        prompt = len(rows) + 1
        rows.append(runner.prefill(tokens[:prompt]))
        rows += [runner.decode(token) for token in tokens[prompt : prompt + DECODE_STEPS]]
    seconds = time.process_time() - started
    found, reference = torch.stack(rows), score(bundle.quantized, tokens, range(len(tokens)))
    errors = (found - reference).norm(dim=-1) / reference.norm(dim=-1)
    error = ((found - reference).norm() / reference.norm()).item()
    agreement = (found.argmax(-1) == reference.argmax(-1)).double().mean().item()
    print(
        f"{len(tokens)} positions: relative L2 error of logits {error:.2e} (worst position "
        f"{errors.max().item():.2e}), top-1 agreement {agreement:.2%}; {seconds:.0f} s of CPU time"
    )
    sys.exit(error >= LARGEST_ERROR or agreement <= LEAST_AGREEMENT)


if __name__ == "__main__":
    main()
