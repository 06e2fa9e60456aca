"""The counterpart of the native runner for runtimes with a Python package. It is copied to the
device and runs there as a single file that needs only the runtime's own wheel.

    python3 python_runner.py --engine onnxruntime --model model.onnx --tokens tokens.txt

Options, output and exit codes are those of ``runner.cpp``; see devices/runner/README.md.
"""

import argparse
import array
import importlib
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

BAD_USAGE, CANNOT_LOAD, FAILED = 2, 3, 4
#: Longer prompts are read in chunks of so many tokens, which bounds the memory that they need.
DEFAULT_CHUNK = 128


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


# ---- One class for each runtime. ----


class Engine(Protocol):
    """A runtime that has loaded a program. `MODULES` are imported before the load is timed."""

    MODULES: ClassVar[tuple[str, ...]]
    context: int
    vocab_size: int | None
    #: Whether the cache has the size of the context and is overwritten; else each step makes a
    #: longer one.
    whole_cache: bool

    def __init__(self, path: str, threads: int, trace: str) -> None: ...

    def step(self, tokens: list[int], start: int) -> Any:
        """Read `tokens` at positions from `start`: the last one's logits, numpy float32
        [vocab_size]."""

    def finish(self, trace: str) -> None:
        """Write the recorded trace to this path."""


class OnnxRuntime:
    """A decoder whose cache is a set of inputs and outputs: either buffers of the whole context
    that it overwrites, or one that grows with each step."""

    MODULES: ClassVar[tuple[str, ...]] = ("numpy", "onnxruntime")

    def __init__(self, path: str, threads: int, trace: str) -> None:
        self.numpy, self.runtime = map(importlib.import_module, self.MODULES)
        options = self.runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_profiling = bool(trace)
        if trace:
            options.profile_file_prefix = trace
        self.session = self.runtime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.context = int(self.session.get_modelmeta().custom_metadata_map["max_context"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.vocab_size: int | None = int(self.session.get_outputs()[0].shape[-1])
        self.whole_cache = "attention_mask" in self.inputs
        self.past = dict[str, Any]()

    def empty_cache(self) -> dict[str, Any]:
        """Zeros for each input of the cache, of the whole context or of length 0."""
        numpy, past = self.numpy, dict[str, Any]()
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, width = value.shape
                kind = numpy.float16 if "float16" in value.type else numpy.float32
                length = self.context if self.whole_cache else 0
                zeros = numpy.zeros((1, heads, length, width), kind)
                past[name] = self.runtime.OrtValue.ortvalue_from_numpy(zeros)
        return past

    def step(self, tokens: list[int], start: int) -> Any:
        numpy = self.numpy
        if not self.past or (start == 0 and not self.whole_cache):
            self.past = self.empty_cache()
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", numpy.array([tokens], numpy.int64))
        if self.whole_cache:
            mask = numpy.ones((1, start + len(tokens)), numpy.int64)
            binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits")
        for name, value in self.past.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, value)
            if self.whole_cache:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self.whole_cache:
            self.past = dict(zip(self.past, outputs[1:], strict=True))
        return outputs[0].numpy()[0, -1].astype(numpy.float32)

    def finish(self, trace: str) -> None:
        Path(self.session.end_profiling()).replace(trace)


class ExecuTorch:
    """The ExecuTorch wheel with torch, which alone has the kernels of `custom_sdpa`."""

    #: The last two register their operators.
    MODULES: ClassVar[tuple[str, ...]] = (
        "torch",
        "executorch.extension.pybindings.portable_lib",
        "executorch.kernels.quantized",
        "executorch.extension.llm.custom_ops.custom_ops",
    )
    whole_cache = True

    def __init__(self, path: str, threads: int, trace: str) -> None:
        self.torch, portable_lib, *_ = map(importlib.import_module, self.MODULES)
        self.torch.set_num_threads(threads)
        portable_lib._unsafe_reset_threadpool(threads)
        self.module = portable_lib._load_for_executorch(path, enable_etdump=bool(trace))
        self.context = int(self.module.run_method("get_max_context_len", ())[0])
        self.vocab_size: int | None = int(self.module.run_method("get_vocab_size", ())[0])
        self.step([0], 0)  # the first step loads the method

    def step(self, tokens: list[int], start: int) -> Any:
        inputs = self.torch.tensor([tokens]), self.torch.tensor([start])
        return self.module.run_method("forward", inputs)[0][0].numpy()

    def finish(self, trace: str) -> None:
        self.module.write_etdump_result_to_file(trace, trace + ".debug")
        Path(trace + ".debug").unlink(missing_ok=True)


class CoreML:
    """A stateful package with two functions, `prefill` and `decode`. Not tried on a Mac."""

    MODULES: ClassVar[tuple[str, ...]] = ("numpy", "coremltools")
    whole_cache = True

    def __init__(self, path: str, threads: int, trace: str) -> None:
        self.numpy, self.tools = map(importlib.import_module, self.MODULES)
        self.path = path
        facts = self.tools.models.MLModel(path, skip_model_load=True).user_defined_metadata
        # The Neural Engine computes int4 in blocks wrongly (apple/coreai-models 279).
        own_form = facts.get("compute") == "neural_engine"
        kinds = self.tools.ComputeUnit
        self.units = kinds.CPU_AND_NE if own_form else kinds.CPU_AND_GPU
        self.functions = {
            name: self.tools.models.MLModel(path, compute_units=self.units, function_name=name)
            for name in ("prefill", "decode")
        }
        self.context, self.chunk = int(facts["max_context"]), int(facts["prefill"])
        self.state = self.functions["decode"].make_state()
        self.output = facts["output"]
        self.vocab_size: int | None = None  # no version of coremltools shows it reliably

    def step(self, tokens: list[int], start: int) -> Any:
        if len(tokens) == 1:
            return self.predict("decode", input_ids=[tokens], position=[start])
        done = 0
        while done < len(tokens):
            begin = min(start + done, self.context - self.chunk)
            chunk = tokens[begin - start : begin - start + self.chunk]
            padded = chunk + [0] * (self.chunk - len(chunk))
            result = self.predict(
                "prefill", input_ids=[padded], position=[begin], length=[len(chunk)]
            )
            done = begin - start + len(chunk)
        return result

    def predict(self, function: str, **inputs: Any) -> Any:
        """Logits, or an equivalent of them where the package gives the token itself."""
        arrays = {name: self.numpy.array(value, "int32") for name, value in inputs.items()}
        outputs = self.functions[function].predict(arrays, state=self.state)
        if self.output == "token":  # the package chooses the most likely token itself
            logits = self.numpy.zeros(int(outputs["token"].reshape(-1)[0]) + 1, "float32")
            logits[-1] = 1
            return logits
        return outputs["logits"].reshape(-1).astype("float32")

    def finish(self, trace: str) -> None:
        """Write the compute plan of `decode`: the device and estimated cost of each operation."""
        plans = importlib.import_module("coremltools.models.compute_plan")
        compiled = self.tools.models.utils.compile_model(self.path)
        plan = plans.MLComputePlan.load_from_path(compiled, compute_units=self.units)
        rows = []
        for operation in plan.model_structure.program.functions["decode"].block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            if usage is not None:
                device = type(usage.preferred_compute_device).__name__
                weight = cost.weight if cost else 0.0
                rows.append({"operator": operation.operator_name, "device": device, "cost": weight})
        Path(trace).write_text(json.dumps(rows))


ENGINES: dict[str, type[Engine]] = {
    "onnxruntime": OnnxRuntime,
    "executorch": ExecuTorch,
    "coreml": CoreML,
}


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
        text = repeat_to(tokens, depth + 1)
        if filled < depth:
            model.prefill(text[filled:depth], filled, chunk)
        filled = depth
        token, ms = text[depth], list[float]()
        for i in range(steps):
            token, took = model.step([token], depth + i)
            ms.append(took)
        if not model.engine.whole_cache:
            filled = depth + steps
        print_phase("decode", ms, depth=depth)


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


def generate(model: "Model", prompt: list[int], count: int, logits_path: str) -> None:
    """Greedy generation of `count` tokens; writes their logits as float32 where a path is given."""
    tokens, ms, position = list[int](), list[float](), 0
    logits = array.array("f")
    for i in range(count):
        given = tokens[-1:] if i else prompt
        token, took = model.step(given, position)
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
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--prompts", type=numbers, default=[])
    parser.add_argument("--depths", type=numbers, default=[])
    for name, default in (("threads", 1), ("warmup", 0), ("steps", 32), ("sustained", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=DEFAULT_CHUNK)
    parser.add_argument("--sustained-steps", type=int, default=0)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--prompt-length", type=int, default=0)
    parser.add_argument("--logits", default="")
    parser.add_argument("--trace", default="")
    parser.add_argument("--load", default="")  # of the native runner
    args = parser.parse_args()
    try:
        for module in ENGINES[args.engine].MODULES:
            importlib.import_module(module)
    except ImportError as error:
        fail(CANNOT_LOAD, f"{args.engine} is not installed on the device ({error})")
    print_phase("start", [])
    started = time.perf_counter()
    try:
        engine = ENGINES[args.engine](args.model, args.threads, args.trace)
    except Exception as error:
        fail(CANNOT_LOAD, f"{args.model}: {args.engine} cannot load it ({error})")
    took = 1000 * (time.perf_counter() - started)
    print_phase("load", [took], context=engine.context, vocab_size=engine.vocab_size)
    tokens, model = read_tokens(args.tokens, engine.vocab_size), Model(engine)
    if args.warmup:
        print_phase("warmup", [model.step(tokens[:1], 0)[1] for _ in range(args.warmup)])
    for length in args.prompts:
        _, took = model.prefill(repeat_to(tokens, length), 0, args.chunk)
        print_phase("prefill", [took], tokens=length)
    measure_decode(model, tokens, args.depths, args.steps, args.chunk)
    if args.sustained or args.sustained_steps:
        measure_sustained(model, tokens, args.sustained, args.sustained_steps)
    if args.generate:
        prompt = repeat_to(tokens, args.prompt_length or len(tokens))
        generate(model, prompt, args.generate, args.logits)
    if args.trace:
        engine.finish(args.trace)
    print(json.dumps({"phase": "end"}), flush=True)


if __name__ == "__main__":
    main()
