"""Self-generated calibration text: sampled from the checkpoint, so no data is needed.

Source: LLM-QAT, arXiv 2305.17888. The text is cached under a hash of everything that decides it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from devices.files import cache_folder
from exporter.calibration.cache import cache_lock
from exporter.calibration.data import hash_of
from exporter.calibration.settings import Calibration, Source
from exporter.errors import InputError
from exporter.files import replacing, sha256
from exporter.inference.sampling import sample
from exporter.model.checkpoint import Checkpoint
from exporter.model.decoder import Decoder, StaticCache, load_decoder
from exporter.progress import OnStep
from exporter.text.documents import is_table, read_documents, read_rows, text_field
from exporter.text.tokenizer import TextTokenizer, load_tokenizer

#: Texts that are sampled at once.
_BATCH = 128
_PROMPT_FIELDS = ("prompt", "question", "text")


def self_generated_text(
    checkpoint: Checkpoint,
    source: Source,
    calibration: Calibration,
    precision: torch.dtype,
    identity: object,
    on_step: OnStep,
) -> Path:
    """The path of a JSONL file of about `source.tokens` tokens; generated if it is not cached.

    `identity` identifies the checkpoint (the hashes of its files). Raises InputError for prompts
    that cannot be used.
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
    """Prompts as token ids, without end.

    With a file of prompts: its prompts, or the first `continue_after` tokens of its texts. Without
    one: the begin-of-text token, or a random token for a model that has none.
    """
    bos, limit = checkpoint.bos_token_id, calibration.sequence_length
    if not source.prompts:
        while True:
            random_token = torch.randint(checkpoint.config.vocab_size, (), generator=generator)
            yield [int(random_token) if bos is None else bos]
    path = Path(source.prompts)
    texts = read_prompts(path, source.field)
    if first := source.continue_after:
        head = [] if bos is None else [bos]
        encoded = [tokenizer.encode(text)[:first] for text in texts]
        usable = [head + ids for ids in encoded if len(ids) == first]
        problem = f"has no text of at least {first} tokens"
        remedy = "Lower continue_after, or give longer texts"
    else:
        encoded = [tokenizer.encode(tokenizer.prompt_text(text, raw=False)) for text in texts]
        usable = [ids for ids in encoded if 0 < len(ids) < limit]
        problem = f"has no prompt of less than {limit} tokens"
        remedy = "Raise calibration.sequence_length, or give shorter prompts"
    if not usable:
        raise InputError(path, problem, remedy)
    while True:
        yield from usable


def read_prompts(path: Path, field: str) -> list[str]:
    """One prompt per row of a table, or per line of plain text. Raises InputError."""
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
    """Each prompt with its sampled continuation, up to the first of `ends` or the full context.

    All texts are at the same position in each step: a longer prompt is still being read while
    shorter ones are continued. A finished text leaves the batch when at least half of the batch has
    finished; what it samples until then is cut off.
    """
    output = decoder.lm_head.weight
    cache = StaticCache(decoder.config, decoder.context, len(prompts), output.dtype)
    texts = [list(prompt[:1]) for prompt in prompts]
    rows = list(range(len(texts)))  # the index of the text in each row of the cache
    running = set(rows)
    for position in range(decoder.context - 1):
        tokens = torch.tensor([[texts[index][-1]] for index in rows])
        states = decoder.hidden_states(tokens, torch.tensor([position]), cache.attend)
        cache.start += 1
        logits = F.linear(states[:, -1], output).float()
        sampled = sample(logits, source.temperature, source.top_p, generator)
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
    """The text up to and including the first end token after the prompt."""
    first = next((i for i in range(prompt, len(text)) if text[i] in ends), len(text))
    return text[: first + 1]
