"""Text that the checkpoint writes itself, so that calibration needs no data.

What a model says is what it must still say when it is quantized (LLM-QAT, arXiv 2305.17888). The
text is kept in a cache, named for everything that decides it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration.cache import cache_folder, cache_lock
from exporter.calibration.data import OnStep, hash_of
from exporter.calibration.settings import Calibration, Source
from exporter.errors import InputError
from exporter.files import replacing, sha256
from exporter.model.checkpoint import Checkpoint
from exporter.model.decoder import Decoder, StaticCache, load_decoder
from exporter.text.documents import is_table, read_documents, read_rows, text_field
from exporter.text.tokenizer import TextTokenizer, load_tokenizer

#: So many texts are written at once.
_BATCH = 128
_PROMPT_FIELDS = ("prompt", "question", "text")


def written_text(
    checkpoint: Checkpoint,
    source: Source,
    calibration: Calibration,
    precision: torch.dtype,
    identity: object,
    on_step: OnStep,
) -> Path:
    """A JSONL file of about `source.tokens` tokens; written only where the cache has none.

    `identity` stands for the checkpoint's bytes.
    """
    prompts = sha256(Path(source.prompts)) if source.prompts else ""
    settings = source.tokens, source.temperature, source.top_p, source.field, source.continue_after
    size = calibration.sequence_length, calibration.seed, str(precision)
    name = hash_of("self-generated", identity, prompts, settings, size)
    path = cache_folder() / f"{name}.jsonl"
    if path.is_file():
        return path
    with cache_lock(path, on_step):
        if not path.is_file():
            tokenizer = load_tokenizer(checkpoint.path)
            with replacing(path) as file:
                for text in _texts(checkpoint, tokenizer, source, calibration, precision, on_step):
                    file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    return path


def _texts(
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    source: Source,
    calibration: Calibration,
    precision: torch.dtype,
    on_step: OnStep,
) -> Iterator[str]:
    decoder = load_decoder(checkpoint, calibration.sequence_length).to(precision)
    generator = torch.Generator().manual_seed(calibration.seed)
    prompts = _prompts(checkpoint, tokenizer, source, calibration, generator)
    ends, count = set(checkpoint.eos_token_ids), 0
    while count < source.tokens:
        on_step(min(count, source.tokens), source.tokens, "")
        batch = [next(prompts) for _ in range(_BATCH)]
        for ids in continue_texts(decoder, batch, ends, source, generator):
            count += len(ids)
            yield tokenizer.decode_whole(ids)
    on_step(source.tokens, source.tokens, "")


def _prompts(
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    source: Source,
    calibration: Calibration,
    generator: torch.Generator,
) -> Iterator[list[int]]:
    """Endlessly: the prompts of the file, or how its texts begin, or the begin of a text, or any
    token where there is no token for that."""
    begin, limit = checkpoint.bos_token_id, calibration.sequence_length
    if not source.prompts:
        while True:
            any_token = torch.randint(checkpoint.config.vocab_size, (), generator=generator)
            yield [int(any_token) if begin is None else begin]
    path = Path(source.prompts)
    texts = read_prompts(path, source.field)
    if first := source.continue_after:
        head = [] if begin is None else [begin]
        encoded = [tokenizer.encode(text)[:first] for text in texts]
        fitting = [head + ids for ids in encoded if len(ids) == first]
        problem = f"has no text of {first} tokens, after which it could go on"
        remedy = "Lower continue_after, or give longer texts"
    else:
        encoded = [tokenizer.encode(tokenizer.prompt_text(text, raw=False)) for text in texts]
        fitting = [ids for ids in encoded if 0 < len(ids) < limit]
        problem = f"has no prompt of less than {limit} tokens"
        remedy = "Raise calibration.sequence_length, or give shorter prompts"
    if not fitting:
        raise InputError(path, problem, remedy)
    while True:
        yield from fitting


def read_prompts(path: Path, field: str) -> list[str]:
    """One prompt a row, or a line of plain text. Raises InputError."""
    if is_table(path):
        names = (field,) if field else _PROMPT_FIELDS
        return [text_field(row, place, names) for place, row in read_rows(path)]
    texts = [text for text in read_documents(path, field or None) if isinstance(text, str)]
    return [line for text in texts for line in text.splitlines() if line.strip()]


@torch.inference_mode()
def continue_texts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    source: Source,
    generator: torch.Generator,
) -> list[list[int]]:
    """Each prompt with what the model adds to it, up to an end or as far as its context goes.

    All texts are at the same position: one whose prompt is longer reads on while others write.
    One that has ended writes on, to be cut off, until half of them have.
    """
    output = decoder.lm_head.weight
    cache = StaticCache(decoder.config, decoder.context, len(prompts), output.dtype)
    texts = [list(prompt[:1]) for prompt in prompts]
    rows = list(range(len(texts)))  # which texts the cache holds
    running = set(rows)
    for position in range(decoder.context - 1):
        last = torch.tensor([[texts[index][-1]] for index in rows])
        states = decoder.hidden_states(last, torch.tensor([position]), cache.attend)
        cache.start += 1
        sampled = _sample(F.linear(states[:, -1], output).float(), source, generator)
        for index, token in zip(rows, sampled, strict=True):
            prompt, text = prompts[index], texts[index]
            if position + 1 < len(prompt):
                text.append(prompt[position + 1])
            else:
                text.append(token)
                if token in ends:
                    running.discard(index)
        if not running:
            break
        if len(running) <= len(rows) // 2:
            cache.keep([place for place, index in enumerate(rows) if index in running])
            rows = sorted(running)
    return [
        _until_end(text, len(prompt), ends) for text, prompt in zip(texts, prompts, strict=True)
    ]


def _until_end(text: list[int], prompt: int, ends: set[int]) -> list[int]:
    """The text up to its first end behind the prompt."""
    first = next((i for i in range(prompt, len(text)) if text[i] in ends), len(text))
    return text[: first + 1]


def _sample(logits: Tensor, source: Source, generator: torch.Generator) -> list[int]:
    """One token for each row of logits [batch, vocab_size]."""
    shares = (logits / source.temperature).softmax(-1)
    if source.top_p < 1:
        shares, order = shares.sort(dim=-1, descending=True)
        shares[shares.cumsum(-1) - shares >= source.top_p] = 0
        drawn = order.gather(-1, _draw(shares, generator))
    else:
        drawn = _draw(shares, generator)
    tokens: list[int] = drawn[:, 0].tolist()
    return tokens


def _draw(shares: Tensor, generator: torch.Generator) -> Tensor:
    """One place in each row [rows, 1], each as likely as its share; much faster than
    `torch.multinomial`."""
    below = shares.cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(shares), 1, generator=generator, dtype=torch.float64) * below[:, -1:]
    return torch.searchsorted(below, points, right=True).clamp_(max=shares.shape[-1] - 1)
