"""The programs of ExecuTorch, ONNX Runtime and llama.cpp, which users build for their phones.

``llama_main`` gets the prompt as text and reports its number of tokens. ``executor_runner`` and
``onnxruntime_perf_test`` run the program with inputs that are given as files, and report how long
one execution takes. ``llama-bench`` makes prompts of random tokens itself.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from devices.answers import contained, parse_json
from devices.engines import Command, Engine, Format, Model, Plan
from devices.engines.executor_runner import (
    executor_commands,
    executor_files,
    with_android_log,
)
from devices.engines.llama_bench import BENCH_NOTE, bench_commands, bench_files
from devices.engines.perf_test import perf_commands, perf_files
from devices.engines.placed import Placed
from devices.engines.records import Record, check_record
from devices.errors import BadDeviceError, DeviceError
from devices.files import sha256
from devices.transports.supervised import Completed


@dataclass(frozen=True)
class _Program:
    """The commands for a program with the parsers of their output, and the files that it reads
    besides the model. With `logs`, its output may be in Android's log. `capabilities` are those of
    `Engine`."""

    format: Format
    commands: Callable[[Placed, Plan], list[Command]]
    files: Callable[[Placed, Plan], Mapping[str, Path]]
    logs: bool = False
    capabilities: frozenset[str] = frozenset()
    note: str = ""


def engine(
    program: Path, model: Model, workspace: str, folder: str, plan: Plan, android: bool = False
) -> Engine:
    """The engine for the user's `program`, which is recognized by its file name.

    `folder` is the model's folder on the device; `plan` has the prompts and depths for which inputs
    are made. Raises BadDeviceError where the name is not known, there is no such file, or the
    program runs another format.
    """
    known = PROGRAMS.get(program.name)
    if known is None or not program.is_file():
        problem = "is not a known runner" if known is None else "no such file"
        raise BadDeviceError(f"--runner {program}", problem, f"Known: {', '.join(PROGRAMS)}")
    if known.format != model.format:
        raise BadDeviceError(f"--runner {program}", f"runs {known.format}, not {model.format}")
    digest = sha256(program)
    remote = f"{workspace}/{digest[:16]}/{program.name}"
    placed = Placed(remote, model, folder, workspace)

    def commands(plan: Plan) -> list[Command]:
        made = [_succeeding(program.name, one) for one in known.commands(placed, plan)]
        return list(map(with_android_log, made)) if android and known.logs else made

    return Engine(
        name=program.name,
        versions={f"{program.name} sha256": digest},
        files={remote: program, **known.files(placed, plan)},
        commands=commands,
        capabilities=known.capabilities,
        note=known.note,
    )


def programs_for(format: Format) -> list[str]:  # noqa: A002  # as in `Model`
    """The names of the programs that run this format."""
    return [name for name, program in PROGRAMS.items() if program.format == format]


def _succeeding(name: str, command: Command) -> Command:
    """The command, whose output counts only where it ends with the code 0."""

    def records(done: Completed) -> list[Record]:
        return command.records(done.check(name))

    return Command(command.argv, records)


# ---- ExecuTorch's llama_main ----


def _llama_files(placed: Placed, plan: Plan) -> dict[str, Path]:
    tokenizer = placed.model.tokenizer
    if tokenizer is None:
        raise BadDeviceError(str(placed.model.folder), "has no tokenizer, which llama_main needs")
    return {f"{placed.folder}/{tokenizer.name}": tokenizer}


def _llama_commands(placed: Placed, plan: Plan) -> list[Command]:
    (tokenizer,) = _llama_files(placed, plan)
    model = placed.model
    common = [
        placed.program, f"--model_path={placed.folder}/{model.main}",
        f"--tokenizer_path={tokenizer}", "--temperature=0", "--ignore_eos=true",
        f"--cpu_threads={plan.threads}", f"--warmup={'true' if plan.warmup else 'false'}",
    ]  # fmt: skip
    return [
        Command(
            [*common, f"--max_new_tokens={plan.steps + 1}", f"--prompt={model.texts[length]}"],
            lambda done: read_llama(done.all_text),
        )
        for length in plan.prompts
        if length in model.texts
    ]


@contained("llama_main", "its statistics")
def read_llama(text: str) -> list[Record]:
    """Parse the line ``PyTorchObserver {json}``, which `TextLLMRunner` prints too.

    Its timestamps are whole milliseconds, so each time has an error of up to 1 ms. Raises
    DeviceError.
    """
    lines = [line.partition("PyTorchObserver")[2].strip() for line in text.splitlines()]
    found = [line[: line.find("}") + 1] for line in lines if line.startswith("{") and "}" in line]
    if not found:
        raise DeviceError("llama_main", "printed no PyTorchObserver line", "Its build may be old")
    stats = parse_json(found[-1], "llama_main")
    try:
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
    records: list[Record] = [
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
    return [check_record(record) for record in records]


PROGRAMS = {
    "llama_main": _Program("executorch", _llama_commands, _llama_files, logs=True),
    "executor_runner": _Program(
        "executorch", executor_commands, executor_files, logs=True,
        note="the longest prompt of a call: the program takes inputs of their full size only",
    ),
    "onnxruntime_perf_test": _Program(
        "onnx", perf_commands, perf_files,
        note="one execution for each prompt and depth, on a cache of zeros that it copies",
    ),
    "llama-bench": _Program(
        "gguf", bench_commands, bench_files, capabilities=frozenset({"mmap"}), note=BENCH_NOTE,
    ),
}  # fmt: skip
