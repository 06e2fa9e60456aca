"""The counterpart of the native runner for runtimes with a Python package. It is copied to the
device with the one file of its runtime, ``python_RUNTIME.py``, and needs only the runtime's wheels.

    python3 python_runner.py --engine onnxruntime --model model.onnx --tokens tokens.txt

Options, output and exit codes are those of ``runner.cpp``; see devices/runner/README.md.
"""

import argparse
import array
import importlib.util
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

BAD_USAGE, CANNOT_LOAD, FAILED = 2, 3, 4
#: The files of runtimes beside this one are ``python_NAME.py``.
RUNTIMES = ("onnxruntime", "executorch", "coreml", "llama_cpp", "mlx")


def fail(code: int, reason: str) -> NoReturn:
    """Exit with this code, and the reason on stderr."""
    print(f"python_runner: {reason}", file=sys.stderr)
    raise SystemExit(code)


# ---- Memory of this process, in bytes; -1 where the system does not tell. ----


def bytes_of(path: str, key: str) -> int:
    """The value of a line "key: number kB" in bytes."""
    try:
        with Path(path).open() as file:
            for line in file:
                if line.startswith(key):
                    return 1024 * int(line[len(key) :].split()[0])
    except OSError:
        return -1
    return -1


def reset_peak() -> None:
    """Let the peak of resident memory (VmHWM) start again from what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak then counts from the start of the process
        return


def memory() -> dict[str, int]:
    """Peak and present memory of this process in bytes."""
    status = "/proc/self/status"
    found = {
        "peak_rss": bytes_of(status, "VmHWM:"),
        "rss": bytes_of(status, "VmRSS:"),
        "anonymous": bytes_of(status, "RssAnon:"),
        "file": bytes_of(status, "RssFile:"),
        "pss": bytes_of("/proc/self/smaps_rollup", "Pss:"),
    }
    if sys.platform == "darwin":
        found["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def print_phase(name: str, ms: list[float], **keys: Any) -> None:
    """Print the record of a phase with its samples in milliseconds, and reset the peak."""
    ms = [round(value, 4) for value in ms]
    print(json.dumps({"phase": name, **keys, "ms": ms, "memory": memory()}), flush=True)
    reset_peak()


# ---- One file for each runtime, with a class `Runtime`. ----


class Engine(Protocol):
    """A runtime that has loaded a program. `MODULES` are imported before the load is timed.

    `options` are those of the command line; `context`, `load` and `threads` only count where the
    runtime has the choice.
    """

    MODULES: ClassVar[tuple[str, ...]]
    context: int
    vocab_size: int | None
    #: Whether the cache has the size of the context and is overwritten; else each step makes a
    #: longer one.
    whole_cache: bool
    #: Longer prompts are read in chunks of so many tokens, which bounds the memory that they need.
    chunk: int

    def __init__(self, path: str, options: argparse.Namespace) -> None: ...

    def step(self, tokens: list[int], start: int) -> Any:
        """Read `tokens` at positions from `start`: the last one's logits, numpy float32
        [vocab_size]."""

    def finish(self, trace: str) -> None:
        """Write the recorded trace to this path."""


def runtime(name: str) -> type[Engine]:
    """The class of the file ``python_NAME.py`` beside this one."""
    path = Path(__file__).with_name(f"python_{name}.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Engine] = module.Runtime
    return found


# ---- The phases. ----


class Model:
    """An engine whose steps are timed. `logits` are those of the last step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.logits: Any = None

    def step(self, tokens: list[int], start: int) -> tuple[int, float]:
        """The most likely next token, and the time in milliseconds."""
        if start + len(tokens) > self.engine.context:
            fail(FAILED, "the context is full")
        started = time.perf_counter()
        logits = self.engine.step(tokens, start)
        token = int(logits.argmax())
        self.logits = logits
        return token, 1000 * (time.perf_counter() - started)

    def prefill(self, tokens: list[int], start: int, chunk: int) -> tuple[int, float]:
        """As `step`, in chunks of at most `chunk` tokens."""
        token, total = 0, 0.0
        for done in range(0, len(tokens), chunk):
            token, took = self.step(tokens[done : done + chunk], start + done)
            total += took
        return token, total


def read_tokens(path: str, vocab_size: int | None) -> list[int]:
    """The token ids of a text file; exits where it is not a list of them."""
    try:
        tokens = [int(word) for word in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        fail(BAD_USAGE, f"{path}: is not a list of tokens ({error})")
    bad = [t for t in tokens if t < 0 or (vocab_size and t >= vocab_size)]
    if bad or not tokens:
        fail(BAD_USAGE, f"{path}: {bad[0] if bad else 'nothing'} is no token of this model")
    return tokens


def repeat_to(tokens: list[int], count: int) -> list[int]:
    """`tokens`, repeated or cut off to `count`."""
    return [tokens[i % len(tokens)] for i in range(count)]


def measure_decode(
    model: "Model", tokens: list[int], depths: list[int], steps: int, chunk: int
) -> None:
    """Time `steps` greedy steps after each number of tokens in the cache."""
    filled = 0
    for depth in sorted(depths):
        text, missing, fill_ms = repeat_to(tokens, depth + 1), max(0, depth - filled), 0.0
        if missing:
            _, fill_ms = model.prefill(text[filled:depth], filled, chunk)
        filled = depth
        token, ms = text[depth], list[float]()
        for i in range(steps):
            token, took = model.step([token], depth + i)
            ms.append(took)
        if not model.engine.whole_cache:
            filled = depth + steps
        print_phase("decode", ms, depth=depth, filled=missing, fill_ms=round(fill_ms, 4))


def measure_sustained(model: "Model", tokens: list[int], seconds: int, steps: int) -> None:
    """Decode for so many seconds and steps; from position 0 again where the context is full."""
    token, position, ms = tokens[0], 0, list[float]()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ms) < steps:
        if position == model.engine.context:
            position = 0
        token, took = model.step([token], position)
        position += 1
        ms.append(took)
    print_phase("sustained", ms)


def generate(model: "Model", prompt: list[int], count: int, chunk: int, logits_path: str) -> None:
    """Greedy generation of `count` tokens; writes their logits as float32 where a path is given."""
    tokens, ms, position = list[int](), list[float](), 0
    logits = array.array("f")
    for i in range(count):
        given = tokens[-1:] if i else prompt
        token, took = model.prefill(given, position, chunk)
        position += len(given)
        tokens.append(token)
        ms.append(took)
        if logits_path:
            logits.extend(model.logits.tolist())
    if logits_path:
        Path(logits_path).write_bytes(logits.tobytes())
    print_phase("generate", ms, tokens=tokens)


def numbers(text: str) -> list[int]:
    """A list of whole numbers with commas between them, as an option."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers")
    return [int(item) for item in text.split(",") if item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, choices=RUNTIMES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--prompts", type=numbers, default=[])
    parser.add_argument("--depths", type=numbers, default=[])
    for name, default in (("threads", 1), ("warmup", 0), ("steps", 32), ("sustained", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=0)  # 0: that of the runtime
    parser.add_argument("--context", type=int, default=0)  # 0: that of the model
    parser.add_argument("--sustained-steps", type=int, default=0)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--prompt-length", type=int, default=0)
    parser.add_argument("--logits", default="")
    parser.add_argument("--trace", default="")
    parser.add_argument("--load", choices=("mmap", "file"), default="mmap")
    args = parser.parse_args()
    kind = runtime(args.engine)
    try:
        for module in kind.MODULES:
            importlib.import_module(module)
    except ImportError as error:
        fail(CANNOT_LOAD, f"{args.engine} is not installed on the device ({error})")
    print_phase("start", [])
    started = time.perf_counter()
    try:
        engine = kind(args.model, args)
    except Exception as error:
        fail(CANNOT_LOAD, f"{args.model}: {args.engine} cannot load it ({error})")
    took = 1000 * (time.perf_counter() - started)
    print_phase("load", [took], context=engine.context, vocab_size=engine.vocab_size)
    tokens, model = read_tokens(args.tokens, engine.vocab_size), Model(engine)
    chunk = args.chunk or engine.chunk
    if args.warmup:
        print_phase("warmup", [model.step(tokens[:1], 0)[1] for _ in range(args.warmup)])
    for length in args.prompts:
        _, took = model.prefill(repeat_to(tokens, length), 0, chunk)
        print_phase("prefill", [took], tokens=length)
    measure_decode(model, tokens, args.depths, args.steps, chunk)
    if args.sustained or args.sustained_steps:
        measure_sustained(model, tokens, args.sustained, args.sustained_steps)
    if args.generate:
        prompt = repeat_to(tokens, args.prompt_length or len(tokens))
        generate(model, prompt, args.generate, chunk, args.logits)
    if args.trace:
        engine.finish(args.trace)
    print(json.dumps({"phase": "end"}), flush=True)


if __name__ == "__main__":
    main()
