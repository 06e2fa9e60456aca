"""Engines: the programs that run a model on a device, their files, commands and output.

`native` is our C++ runner, `python` its counterpart for runtimes with a Python package, `official`
has the programs that ExecuTorch, ONNX Runtime and llama.cpp ship. All give the same records
(`records`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from devices.engines.records import Record
from devices.transports.supervised import Completed

#: The formats that there is an engine for.
Format = Literal["executorch", "onnx", "coreml", "gguf", "mlx"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Model:
    """An artifact, with what an engine must know of it.

    `files` are relative to `folder`; the runtime opens `main`, one of them or a folder of them.
    `context` is in tokens. `native` says that the native runner has what it needs, `integers` that
    products with weights are meant to work on integers. Prompts are the first of `tokens`;
    `texts` has prompts as text, by their number of tokens, for programs that need `tokenizer`.
    A call of the program takes at most `longest_call` tokens, or the whole context if it is None.
    """

    format: Format
    folder: Path
    main: str
    files: tuple[str, ...]
    context: int
    native: bool
    integers: bool
    tokens: tuple[int, ...]
    tokenizer: Path | None = None
    texts: Mapping[int, str] = field(default_factory=dict)
    longest_call: int | None = None


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    `prompts` are lengths in tokens; at each of `depths` tokens in the cache, `steps` are decoded.
    `sustained` is in seconds, and goes on until `sustained_steps` tokens are decoded. `generate` is
    a number of tokens after a prompt of `prompt_length`. `mmap` says whether the program is mapped
    or read. `trace` and `logits` are paths on the device, '' for none. With `packed_cache`, the
    engine keeps the weights as the runtime packs them in a file, which later loads map.
    """

    prompts: Sequence[int] = ()
    depths: Sequence[int] = ()
    steps: int = 32
    warmup: int = 0
    threads: int = 1
    sustained: int = 0
    sustained_steps: int = 0
    mmap: bool = True
    packed_cache: bool = False
    generate: int = 0
    prompt_length: int = 0
    trace: str = ""
    logits: str = ""


@dataclass(frozen=True)
class Command:
    """A command line on the device; `records` parses what it printed, and raises DeviceError."""

    argv: Sequence[str]
    records: Callable[[Completed], list[Record]]


@dataclass(frozen=True)
class Engine:
    """A program for one model on one device.

    `files` maps paths on the device to files here. The `commands` of a plan run one after the
    other. `capabilities` has those of "sustained", "trace", "generate", "mmap" (the choice
    between mapping and reading the model) and "packed_cache" that it has besides prefill and
    decode. With `threads`, it runs with so many, whatever the plan says. `note` says what its
    figures are, where they are not those of a prompt and of decode steps after a real text.
    """

    name: str
    versions: Mapping[str, str]
    files: Mapping[str, Path]
    commands: Callable[[Plan], list[Command]]
    capabilities: frozenset[str] = frozenset()
    threads: int | None = None
    note: str = ""


def options(plan: Plan) -> list[str]:
    """A plan as options of the native and the Python runner."""
    words: list[str] = []
    for name, value in (
        ("threads", plan.threads),
        ("warmup", plan.warmup),
        ("prompts", ",".join(map(str, plan.prompts))),
        ("depths", ",".join(map(str, plan.depths))),
        ("steps", plan.steps),
        ("sustained", plan.sustained),
        ("sustained-steps", plan.sustained_steps),
        ("load", "" if plan.mmap else "file"),
        ("generate", plan.generate),
        ("prompt-length", plan.prompt_length),
        ("trace", plan.trace),
        ("logits", plan.logits),
    ):
        if value:
            words += [f"--{name}", str(value)]
    return words
