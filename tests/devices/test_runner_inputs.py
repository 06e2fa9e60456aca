"""The official runners with inputs of their own: a real executor_runner where one is built, and
ONNX Runtime on the tensors that onnxruntime_perf_test would read."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from commands import run
from device_bed import Daemon, arm64_adbd, demo_bundle
from onnx import numpy_helper

from devices.engines import Model, Plan, official
from devices.engines.onnx_tensors import FLOAT, INT64, read_inputs, tensor
from devices.errors import CommandFailedError, DeviceError
from devices.transports import transport_of
from exporter import profiling
from exporter.bundle.bundle import Bundle

Capture = pytest.CaptureFixture[str]
#: A path to ExecuTorch's executor_runner, built by you for this machine.
RUNNER = os.environ.get("MOBILELLM_EXECUTOR_RUNNER", "")
PROFILE = ["depths=[0,16]", "prompt_lengths=[4,8]", "max_repeats=1", "decode_steps=3"]


def model_of(bundle: Bundle, name: str) -> Model:
    request = profiling.Request(devices=["host"])
    return profiling.job(bundle, bundle.artifacts[name], request).model


@pytest.mark.skipif(
    not RUNNER, reason="MOBILELLM_EXECUTOR_RUNNER names no executor_runner that you have built"
)
def test_a_real_executor_runner_measures_a_prompt_of_the_whole_context(
    portable_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    program = tmp_path / "executor_runner"
    shutil.copy(RUNNER, program)
    options = ["--target", "executorch", "--device", "host", "--runner", program, "--json"]
    outcome = run(capsys, "profile", portable_bundle.path, *PROFILE, *options)
    assert outcome.code == 0, outcome.err or outcome.out
    (session,) = outcome.json["sessions"]
    ((prefill,), decode) = (session["prefill"], session["decode"])
    assert (prefill["tokens"], decode) == (256, [])
    assert session["load"]["p50"] > 0 and prefill["tokens_per_second"]["p50"] > 0
    assert "inputs of their full size only" in session["engine"]["note"]


@pytest.mark.skipif(not RUNNER, reason="MOBILELLM_EXECUTOR_RUNNER names no executor_runner")
def test_a_real_executor_runner_without_inputs_fails(
    portable_bundle: Bundle, tmp_path: Path
) -> None:
    """As it did before it was given any: so the inputs are what makes it run."""
    device = profiling.parse_device("host")
    model = model_of(portable_bundle, "executorch")
    engine = official.engine(Path(RUNNER), model, str(tmp_path), str(model.folder), Plan())
    (command,) = engine.commands(Plan(threads=1))
    words = [word for word in command.argv if not word.startswith("--inputs=")]
    done = transport_of(device).run(device, [RUNNER, *words[1:]], 60)
    with pytest.raises(CommandFailedError, match="code 134"):
        command.records(done)


# ---- On Android its output is in the log ----

LOGGING = """#!/bin/sh
case $1 in --model_path=*) ;; *) exit 9 ;; esac
log -t ExecuTorch "Model loaded in 5.5 ms."
log -t ExecuTorch "Iteration 1 of 3: 9.0 ms"
log -t ExecuTorch "Iteration 2 of 3: 7.0 ms"
log -t ExecuTorch "Iteration 3 of 3: 8.0 ms"
log -t ExecuTorch "Model executed successfully 3 time(s) in 24.0 ms."
"""


@pytest.fixture(scope="module")
def android(arm64: Path, adb_server: None) -> Any:
    with arm64_adbd(arm64) as daemon:
        yield daemon


def executed(script: str, bundle: Bundle, daemon: Daemon, folder: Path) -> list[dict[str, Any]]:
    program = folder / "executor_runner"
    program.write_text(script)
    program.chmod(0o755)
    model, device = model_of(bundle, "executorch"), daemon.device
    transport = transport_of(device)
    engine = official.engine(program, model, "/tmp/w", "/tmp/w/m", Plan(), android=True)
    for remote, local in engine.files.items():
        transport.push(device, local, remote)
    (command,) = engine.commands(Plan(threads=1))
    return command.records(transport.run(device, command.argv, 120))


def test_on_android_the_log_of_this_run_alone_counts(
    android: Daemon, portable_bundle: Bundle, tmp_path: Path
) -> None:
    device = android.device
    old = ["log", "-t", "ExecuTorch", "Iteration 1 of 1: 999.0 ms"]
    transport_of(device).run(device, old, 60)
    load, prefill = executed(LOGGING, portable_bundle, android, tmp_path)
    assert load["ms"] == [5.5]
    assert (prefill["tokens"], prefill["ms"]) == (256, [7.0, 8.0])


def test_its_own_output_counts_before_the_log(
    android: Daemon, portable_bundle: Bundle, tmp_path: Path
) -> None:
    printing = LOGGING + 'echo "Model executed successfully 2 time(s) in 4.0 ms."\n'
    (prefill,) = executed(printing, portable_bundle, android, tmp_path)
    assert prefill["ms"] == [2.0]


def test_where_neither_tells_anything_the_build_that_does_is_named(
    android: Daemon, portable_bundle: Bundle, tmp_path: Path
) -> None:
    silent = "#!/bin/sh\nexit 0\n"
    with pytest.raises(DeviceError, match="EXECUTORCH_PAL_DEFAULT=posix -DEXECUTORCH_ENABLE_LOGGI"):
        executed(silent, portable_bundle, android, tmp_path)
    failing = '#!/bin/sh\nlog -t ExecuTorch "F the input has the wrong size"\nexit 134\n'
    with pytest.raises(CommandFailedError, match="the input has the wrong size"):
        executed(failing, portable_bundle, android, tmp_path)


# ---- onnxruntime_perf_test ----

#: It is in no registry. This has its way of reading inputs, with the same runtime.
PERF_TEST = """#!{python}
import sys, time
from pathlib import Path
import numpy, onnx, onnxruntime
from onnx import numpy_helper
model, runs = Path(sys.argv[-1]), int(sys.argv[sys.argv.index("-r") + 1])
started = time.perf_counter()
session = onnxruntime.InferenceSession(str(model))
print("Session creation time cost:", time.perf_counter() - started, "s")
folders = [path for path in model.parent.iterdir() if path.is_dir()]
assert [folder.name for folder in folders] == ["test_data_set_0"], folders
files = sorted(folders[0].glob("input_*.pb"), key=lambda path: int(path.stem[6:]))
inputs = dict()
for value, path in zip(session.get_inputs(), files, strict=True):
    proto = onnx.TensorProto()
    proto.ParseFromString(path.read_bytes())
    inputs[proto.name or value.name] = numpy_helper.to_array(proto)
times = []
for _ in range(runs):
    started = time.perf_counter()
    logits = session.run(None, inputs)[0]
    times.append(time.perf_counter() - started)
assert numpy.isfinite(logits).all()
print("P50 Latency:", numpy.median(times), "s")
"""


@pytest.mark.parametrize("form", ["contrib", "portable"])
def test_the_inputs_for_the_perf_test_run_in_onnx_runtime(
    form: str, portable_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    bundle = portable_bundle
    if form == "portable":
        options = ["targets.1.form=portable", "targets.1.products=float"]
        bundle = demo_bundle(tmp_path / "bundle", *options)
    program = tmp_path / "onnxruntime_perf_test"
    program.write_text(PERF_TEST.format(python=sys.executable))
    program.chmod(0o755)
    options = ["--target", "onnx", "--device", "host", "--runner", str(program), "--json"]
    outcome = run(capsys, "profile", bundle.path, *PROFILE, *options)
    (session,) = outcome.json["sessions"]
    assert outcome.code == 0, session["problem"]
    assert [entry["tokens"] for entry in session["prefill"]] == [4, 8]
    assert [entry["depth"] for entry in session["decode"]] == [0, 16]
    assert session["load"]["p50"] > 0
    assert "on a cache of zeros" in session["engine"]["note"]


def test_the_inputs_of_a_model_are_read_as_onnx_reads_them(portable_bundle: Bundle) -> None:
    path = portable_bundle.artifacts["onnx"].artifact.path / "onnx" / "model_q4.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    expected = [
        (one.name, one.type.tensor_type.elem_type,
         tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim))
        for one in proto.graph.input
    ]  # fmt: skip
    assert [(one.name, one.type, one.shape) for one in read_inputs(path)] == expected
    assert expected[0][0] == "input_ids" and len(expected) > 3


@pytest.mark.parametrize("shape", [(1, 300), (0, 4), (1, 1, 2, 70_000)])
@pytest.mark.parametrize(("kind", "dtype"), [(FLOAT, np.float32), (INT64, np.int64)])
def test_a_tensor_is_written_as_onnx_reads_it(
    kind: int, dtype: type, shape: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    proto = onnx.TensorProto()
    proto.ParseFromString(tensor(kind, shape, array.tobytes()))
    assert np.array_equal(numpy_helper.to_array(proto), array)
    assert proto.name == "" and onnxruntime.__version__
