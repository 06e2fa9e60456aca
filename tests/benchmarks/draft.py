"""Make a small draft of a quantized checkpoint: some of its layers, distilled on its own answers.

    python tests/benchmarks/draft.py build/smollm2-int4 --prompts gsm8k-train.jsonl \
        --layers 0,1,2,29 -o build/draft

The draft is an ordinary Hugging Face folder with the same tokenizer. Embedding and output layer are
the large model's and are not trained. `speculative.py` measures how often the draft is right.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration.self_generation import continue_texts, read_prompts
from exporter.calibration.settings import Source
from exporter.model.checkpoint import COMPANION_FILES
from exporter.model.config import EMBEDDING, OUTPUT, ModelConfig, parse_config
from exporter.model.decoder import Decoder, attend_causal, load_decoder
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.text.tokenizer import load_tokenizer

#: The last prompts of a file are never trained on: `speculative.py` measures with them.
HELD_OUT = 400
BATCH, LENGTH = 4, 256

Text = tuple[list[int], int]  # tokens, and how many of them are the prompt


class KeptLayers:
    """A source of weights (`FloatWeights`): some layers of a quantized checkpoint, renumbered."""

    def __init__(self, quantized: QuantizedCheckpoint, layers: Sequence[int]) -> None:
        self.quantized, self.layers = quantized, layers
        self.raw = shortened(json.loads((quantized.path / "config.json").read_text()), layers)
        self.config: ModelConfig = parse_config(self.raw, quantized.path / "config.json")

    def float_weight(self, name: str) -> Tensor:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(self.layers[int(parts[2])])
        return self.quantized.float_weight(".".join(parts))


def shortened(config: dict[str, object], layers: Sequence[int]) -> dict[str, object]:
    """A configuration with only these layers, also in its lists of one entry a layer."""
    count = config["num_hidden_layers"]
    by_layer = {
        key: [value[layer] for layer in layers]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == count and key.endswith("layers")
    }
    return config | by_layer | {"num_hidden_layers": len(layers)}


def written_texts(
    quantized: QuantizedCheckpoint, prompts: Sequence[str], count: int, longest: int
) -> Iterator[Text]:
    """`count` greedy answers of the large model, in batches of prompts of similar length."""
    decoder = load_decoder(quantized, longest).to(torch.bfloat16)
    tokenizer, ends = load_tokenizer(quantized.path), set(quantized.eos_token_ids)
    random_order = random.Random(0).sample(list(prompts), min(count, len(prompts)))
    encoded = (tokenizer.encode(tokenizer.prompt_text(p, raw=False)) for p in random_order)
    usable = sorted((ids for ids in encoded if len(ids) < longest // 2), key=len)
    generator = torch.Generator().manual_seed(0)
    greedy = Source(temperature=0.01)
    for first in range(0, len(usable), 64):
        batch = usable[first : first + 64]
        written = continue_texts(decoder, batch, ends, greedy, generator)
        for prompt, ids in zip(batch, written, strict=True):
            yield ids, len(prompt)


def given_texts(
    quantized: QuantizedCheckpoint, path: Path, question: str, answer: str
) -> list[Text]:
    """The questions and answers of a file, where writing own answers would take too long."""
    tokenizer = load_tokenizer(quantized.path)
    pairs = zip(read_prompts(path, question), read_prompts(path, answer), strict=True)
    texts = list[Text]()
    for asked, answered in list(pairs)[:-HELD_OUT][:1000]:
        prompt = tokenizer.encode(tokenizer.prompt_text(asked, raw=False))
        texts.append((prompt + tokenizer.encode(answered), len(prompt)))
    return texts


def batches(texts: list[Text], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed texts and what of them is an answer: both [BATCH, LENGTH]."""
    rng, ids, answered = random.Random(seed), list[int](), list[bool]()
    while True:
        for tokens, prompt in rng.sample(texts, len(texts)):
            ids += tokens
            answered += [False] * prompt + [True] * (len(tokens) - prompt)
            while len(ids) >= BATCH * LENGTH:
                yield (
                    torch.tensor(ids[: BATCH * LENGTH]).view(BATCH, LENGTH),
                    torch.tensor(answered[: BATCH * LENGTH]).view(BATCH, LENGTH),
                )
                del ids[: BATCH * LENGTH], answered[: BATCH * LENGTH]


def train(
    student: Decoder, teacher: Decoder, texts: list[Text], steps: int, rate: float
) -> Iterator[float]:
    """Distil with the KL divergence to the teacher on positions whose next token is an answer's.

    Yields the share of them at which both have the same likeliest token.
    """
    trained = [p for n, p in student.named_parameters() if n not in (EMBEDDING, OUTPUT)]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    for tokens, answered in itertools.islice(batches(texts, 0), steps):
        with torch.autocast("cpu", torch.bfloat16):
            wanted = answered[:, 1:].flatten()
            with torch.no_grad():
                expected = _logits(teacher, tokens, wanted)
            logits = _logits(student, tokens, wanted)
        loss = F.kl_div(
            logits.float().log_softmax(-1), expected.float().log_softmax(-1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        yield float((logits.argmax(-1) == expected.argmax(-1)).float().mean())


def _logits(model: Decoder, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Logits [count, vocab] of the wanted positions only: the output layer is most of the work."""
    states = model.hidden_states(tokens[:, :-1], torch.arange(tokens.shape[1] - 1), attend_causal)
    logits: Tensor = model.lm_head(states.flatten(0, 1)[wanted])
    return logits


def save(student: Decoder, source: KeptLayers, out: Path) -> None:
    """A Hugging Face folder in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    tied = source.config.tie_word_embeddings
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in student.state_dict().items()
        if not (tied and name == OUTPUT)
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name in COMPANION_FILES:
        if (source.quantized.path / name).is_file():
            shutil.copy(source.quantized.path / name, out)
    (out / "config.json").write_text(json.dumps(source.raw, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a draft of a quantized checkpoint.")
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--field", default="")
    parser.add_argument("--answers", default="", help="the field of answers to train on")
    parser.add_argument("--layers", required=True, help="the layers that are kept, such as 0,1,29")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--longest", type=int, default=320, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    quantized = open_quantized(args.quantized)
    source = KeptLayers(quantized, [int(layer) for layer in args.layers.split(",")])
    prompts = read_prompts(args.prompts, args.field)[:-HELD_OUT]
    started, cached = time.monotonic(), args.output.with_suffix(".texts.json")
    if args.answers:
        texts = given_texts(quantized, args.prompts, args.field, args.answers)
    elif not cached.is_file():
        texts = list(written_texts(quantized, prompts, args.texts, args.longest))
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps(texts))
    if not args.answers:
        texts = json.loads(cached.read_text())
    print(
        f"{sum(len(t) for t, _ in texts)} tokens written after {time.monotonic() - started:.0f} s"
    )
    context = max(LENGTH, args.longest)
    student, teacher = load_decoder(source, context), load_decoder(quantized, context)
    for step, share in enumerate(train(student, teacher, texts, args.steps, args.rate), 1):
        if step % 20 == 0 or step == args.steps:
            print(f"step {step}: {share:.1%} equal, {time.monotonic() - started:.0f} s", flush=True)
    save(student, source, args.output)


if __name__ == "__main__":
    main()
