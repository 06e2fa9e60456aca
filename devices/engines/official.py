"""The programs that ExecuTorch and ONNX Runtime ship, which users build for their phones.

``llama_main`` gets the prompt as text and reports its number of tokens. The other two run the
program with inputs of their own, and report how long one execution takes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devices.engines import Engine, Model, Plan, Record, check_record
from devices.errors import BadDeviceError, DeviceError
from devices.files import sha256
from devices.transports.supervised import Completed


@dataclass(frozen=True)
class _Program:
    """The commands for a program, and the parser of its output."""

    format: str
    commands: Callable[[str, Model, str, Plan], list[list[str]]]
    records: Callable[[str], list[Record]]


def engine(program: Path, model: Model, workspace: str, folder: str) -> Engine:
    """The engine for the user's `program`, which is recognized by its file name.

    `folder` is the model's folder on the device. Raises BadDeviceError where the name is not known,
    there is no such file, or the program runs another format.
    """
    known = PROGRAMS.get(program.name)
    if known is None or not program.is_file():
        problem = "is not a known runner" if known is None else "no such file"
        raise BadDeviceError(f"--runner {program}", problem, f"Known: {', '.join(PROGRAMS)}")
    if known.format != model.format:
        raise BadDeviceError(f"--runner {program}", f"runs {known.format}, not {model.format}")
    remote = f"{workspace}/{sha256(program)[:16]}/{program.name}"
    files = {remote: program}
    if model.tokenizer is not None:
        files[f"{folder}/{model.tokenizer.name}"] = model.tokenizer
    return Engine(
        name=program.name,
        versions={f"{program.name} sha256": sha256(program)},
        files=files,
        commands=lambda plan: known.commands(remote, model, folder, plan),
        records=lambda done: _read(program.name, known, done),
    )


def _read(name: str, program: _Program, done: Completed) -> list[Record]:
    done.check(name)
    # ExecuTorch logs on one stream or on the other, as it was built.
    text = done.text + "\n" + done.stderr.decode("utf-8", "replace")
    return [check_record(record) for record in program.records(text)]


# ---- ExecuTorch's llama_main ----


def _llama_commands(program: str, model: Model, folder: str, plan: Plan) -> list[list[str]]:
    if model.tokenizer is None:
        raise BadDeviceError(str(model.folder), "has no tokenizer, which llama_main needs")
    common = [
        program, f"--model_path={folder}/{model.main}",
        f"--tokenizer_path={folder}/{model.tokenizer.name}", "--temperature=0", "--ignore_eos=true",
        f"--cpu_threads={plan.threads}", f"--warmup={'true' if plan.warmup else 'false'}",
    ]  # fmt: skip
    return [
        [*common, f"--max_new_tokens={plan.steps + 1}", f"--prompt={model.texts[length]}"]
        for length in plan.prompts
        if length in model.texts
    ]


def read_llama(text: str) -> list[Record]:
    """Parse the line ``PyTorchObserver {json}``, which `TextLLMRunner` prints too.

    Its timestamps are whole milliseconds, so each time has an error of up to 1 ms. Raises
    DeviceError.
    """
    found = re.findall(r"PyTorchObserver\s*(\{.*?\})", text)
    if not found:
        raise DeviceError("llama_main", "printed no PyTorchObserver line", "Its build may be old")
    try:
        stats = json.loads(found[-1])
        moments = {key: float(value) for key, value in stats.items() if key.endswith("_ms")}
        prompt, generated = int(stats["prompt_tokens"]), int(stats["generated_tokens"])
        load = moments["model_load_end_ms"] - moments["model_load_start_ms"]
        first = moments["first_token_ms"] - moments["inference_start_ms"]
        prefill = moments["prompt_eval_end_ms"] - moments["inference_start_ms"]
        decode = moments["inference_end_ms"] - moments["prompt_eval_end_ms"]
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise DeviceError("llama_main", f"printed statistics that lack {error}") from error
    if prompt < 1 or generated < 1:
        raise DeviceError("llama_main", f"read {prompt} tokens and wrote {generated}")
    return [
        {"phase": "load", "ms": [load], "within_ms": 1},
        {
            "phase": "prefill", "tokens": prompt, "ms": [prefill], "within_ms": 1,
            "first_token_ms": first,
        },
        # It reports one time for all steps; the sample is its mean.
        {
            "phase": "decode", "depth": prompt, "ms": [decode / generated],
            "within_ms": 1 / generated, "steps": generated,
        },
    ]  # fmt: skip


# ---- ExecuTorch's executor_runner ----


def _executor_commands(program: str, model: Model, folder: str, plan: Plan) -> list[list[str]]:
    runs = max(plan.steps, 2)
    return [
        [program, f"--model_path={folder}/{model.main}", f"--num_executions={runs}",
         f"--cpu_threads={plan.threads}"]
    ]  # fmt: skip


def read_executor(text: str) -> list[Record]:
    """Parse ``Model loaded in …`` and ``Iteration i of n: …`` or the sum of n executions.

    Raises DeviceError.
    """
    number = r"(\d+(?:\.\d+)?)"
    records: list[Record] = []
    if load := re.search(rf"[Mm]odel loaded in {number} ?ms", text):
        records.append({"phase": "load", "ms": [float(load[1])]})
    each = [float(ms) for ms in re.findall(rf"Iteration \d+ of \d+: {number} ?ms", text)]
    total = re.search(
        rf"[Mm]odel executed successfully(?: (\d+) time\(s\))?(?: in {number} ?ms)?", text
    )
    if total is None:
        raise DeviceError("executor_runner", "reported no execution of the model")
    if not each and total[2]:
        each = [float(total[2]) / int(total[1] or 1)]
    if not each:
        raise DeviceError("executor_runner", "reported no time", "Its build may be too old")
    return [*records, {"phase": "execute", "ms": each}]


# ---- ONNX Runtime's onnxruntime_perf_test ----


def _perf_commands(program: str, model: Model, folder: str, plan: Plan) -> list[list[str]]:
    runs = max(plan.steps, 2)
    return [
        [program, "-I", "-m", "times", "-r", str(runs), "-x", str(plan.threads), "-e", "cpu",
         f"{folder}/{model.main}"]
    ]  # fmt: skip


_UNITS = {"s": 1000.0, "sec": 1000.0, "seconds": 1000.0, "ms": 1.0, "us": 0.001}
_TIME = r"\s*[:=]?\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(s|sec|seconds|ms|us)\b"


def read_perf_test(text: str) -> list[Record]:
    """Parse load and execution times, in each of the spellings and units that are in use.

    Raises DeviceError.
    """

    def time_of(label: str) -> float | None:
        found = re.search(label + _TIME, text, re.IGNORECASE)
        return float(found[1]) * _UNITS[found[2].lower()] if found else None

    records: list[Record] = []
    load = time_of(r"Session creation time(?: cost)?")
    if load is not None:
        records.append({"phase": "load", "ms": [load]})
    first = time_of(r"First inference time(?: cost)?")
    median, average = (
        time_of(r"P50 Latency(?: is)?"),
        time_of(r"(?:Average inference time(?: cost)?(?: total)?|Avg(?: inference)? latency)"),
    )
    if median is None and average is None:
        raise DeviceError("onnxruntime_perf_test", "printed no time in a known form")
    record: Record = {"phase": "execute", "ms": [median if median is not None else average]}
    high = time_of(r"P95 Latency(?: is)?")
    record |= {} if high is None else {"p95_ms": high}
    record |= {} if first is None else {"first_ms": first}
    return [*records, record]


PROGRAMS = {
    "llama_main": _Program("executorch", _llama_commands, read_llama),
    "executor_runner": _Program("executorch", _executor_commands, read_executor),
    "onnxruntime_perf_test": _Program("onnx", _perf_commands, read_perf_test),
}
