"""What the official runners print, in every spelling that is known, and how they are called."""

import json
from pathlib import Path

import pytest

from devices.engines import Model, Plan, official
from devices.engines.executor_runner import read_executor
from devices.engines.perf_test import read_perf_test
from devices.engines.records import Record
from devices.errors import BadDeviceError, DeviceError

STATS = {
    "prompt_tokens": 15, "generated_tokens": 20, "model_load_start_ms": 1000,
    "model_load_end_ms": 1250, "inference_start_ms": 1300, "inference_end_ms": 1900,
    "prompt_eval_end_ms": 1400, "first_token_ms": 1405, "aggregate_sampling_time_ms": 3,
    "SCALING_FACTOR_UNITS_PER_SECOND": 1000,
}  # fmt: skip
LLAMA = f"""I 00:00:00.1 executorch:main.cpp:69] Resetting threadpool with num threads = 4
Once upon a time {{"a": 1}} there was
PyTorchObserver {json.dumps(STATS)}
I 00:00:01.2 executorch:stats.h:108] \tPrompt Tokens: 15    Generated Tokens: 20
"""


def by_phase(records: list[Record]) -> dict[str, Record]:
    return {record["phase"]: record for record in records}


def test_llama_main_gives_load_prefill_and_decode() -> None:
    found = by_phase(official.read_llama(LLAMA))
    assert found["load"]["ms"] == [250]
    assert (found["prefill"]["tokens"], found["prefill"]["ms"]) == (15, [100])
    assert found["prefill"]["first_token_ms"] == 105
    assert (found["decode"]["depth"], found["decode"]["ms"]) == (15, [25])
    assert [record["within_ms"] for record in found.values()] == [1, 1, 1 / 20]


@pytest.mark.parametrize(
    ("part", "instead", "message"),
    [
        ("PyTorchObserver", "", "printed no PyTorchObserver line"),
        ('"prompt_eval_end_ms": 1400, ', "", "lack 'prompt_eval_end_ms'"),
        ('"generated_tokens": 20', '"generated_tokens": 0', "wrote 0"),
        ('"model_load_end_ms": 1250', '"model_load_end_ms": "x"', "lack could not convert"),
    ],
)
def test_what_llama_main_leaves_out_is_no_measurement(
    part: str, instead: str, message: str
) -> None:
    assert part in LLAMA
    with pytest.raises(DeviceError, match=message):
        official.read_llama(LLAMA.replace(part, instead))


@pytest.mark.parametrize(
    ("text", "load", "times"),
    [
        ("I executorch:executor_runner.cpp:1] Model loaded in 12.500000 ms.\n"
         "Iteration 1 of 2: 30.25 ms\nIteration 2 of 2: 31.75 ms\n"
         "Model executed successfully 2 time(s) in 62.0 ms.", [12.5], [31.75]),
        ("Model executed successfully 4 time(s) in 100.000000 ms.", None, [25.0]),
        ("model loaded in 3 ms.\nModel executed successfully 1 time(s) in 7.5 ms.", [3.0], [7.5]),
    ],
)  # fmt: skip
def test_executor_runner_in_every_spelling(
    text: str, load: list[float] | None, times: list[float]
) -> None:
    found = by_phase(read_executor(text, 256))
    assert found.get("load", {}).get("ms") == load
    assert (found["prefill"]["tokens"], found["prefill"]["ms"]) == (256, times)


@pytest.mark.parametrize("text", ["", "Model executed successfully.", "F loading failed"])
def test_executor_runner_without_a_time_is_no_measurement(text: str) -> None:
    with pytest.raises(DeviceError, match="executor_runner"):
        read_executor(text, 256)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Session creation time cost: 0.1495 s\nFirst inference time cost: 47 ms\n"
         "Total inference time cost: 4.53 s\nTotal inference requests: 100\n"
         "Average inference time cost: 45.3 ms\nP50 Latency: 0.0452 s\nP95 Latency: 0.0469 s\n",
         {"load": 149.5, "execute": 45.2, "p95_ms": 46.9, "first_ms": 47.0}),
        ("Session creation time cost:0.2 s\nAverage inference time cost total: 18.467 ms\n",
         {"load": 200.0, "execute": 18.467}),
        ("Average inference time cost: 7.5 ms", {"execute": 7.5}),
        ("Avg latency: 1200 us", {"execute": 1.2}),
        ("P50 Latency is 0.0031sec\nP95 Latency is 4e-3sec", {"execute": 3.1, "p95_ms": 4.0}),
    ],
)  # fmt: skip
def test_onnxruntime_perf_test_in_every_spelling(text: str, expected: dict[str, float]) -> None:
    found = by_phase(read_perf_test(text, {"phase": "decode", "depth": 64}))
    assert found["decode"]["depth"] == 64
    assert found["decode"]["ms"] == [pytest.approx(expected["execute"])]
    for key in ("p95_ms", "first_ms"):
        assert found["decode"].get(key) == (
            pytest.approx(expected[key]) if key in expected else None
        )
    assert found.get("load", {}).get("ms") == ([expected["load"]] if "load" in expected else None)


def test_onnxruntime_perf_test_without_a_time_is_no_measurement() -> None:
    with pytest.raises(DeviceError, match="no time in a known form"):
        read_perf_test("Total inference requests: 100", {"phase": "decode", "depth": 0})


@pytest.fixture
def model(tmp_path: Path) -> Model:
    for name in ("model.pte", "model.onnx", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    return Model(
        "executorch", tmp_path, "model.pte", ("model.pte",), 256, False, True, (1, 2),
        tmp_path / "tokenizer.json", {8: "eight words; $(id)"},
    )  # fmt: skip


def program(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_llama_main_is_given_the_prompt_as_text_and_as_one_argument(
    model: Model, tmp_path: Path
) -> None:
    plan = Plan(prompts=[8], steps=32, threads=4, warmup=1)
    engine = official.engine(program(tmp_path, "llama_main"), model, "/w", "/w/m", plan)
    (command,) = (one.argv for one in engine.commands(plan))
    assert command[0].startswith("/w/") and command[0].endswith("/llama_main")
    assert "--prompt=eight words; $(id)" in command
    assert {"--model_path=/w/m/model.pte", "--tokenizer_path=/w/m/tokenizer.json"} <= set(command)
    assert {"--cpu_threads=4", "--temperature=0", "--warmup=true"} <= set(command)
    assert "/w/m/tokenizer.json" in engine.files


@pytest.mark.parametrize(
    ("name", "message"),
    [("my_runner", "is not a known runner"), ("onnxruntime_perf_test", "runs onnx, not exec")],
)
def test_a_runner_that_does_not_fit_is_refused(
    name: str, message: str, model: Model, tmp_path: Path
) -> None:
    with pytest.raises(BadDeviceError, match=message):
        official.engine(program(tmp_path, name), model, "/w", "/w/m", Plan())


def test_a_runner_that_is_not_there_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BadDeviceError, match="no such file"):
        official.engine(tmp_path / "llama_main", model, "/w", "/w/m", Plan())
