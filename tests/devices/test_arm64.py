"""A whole Arm machine, emulated: real arm64 adbd and sshd, real Arm kernels of both runtimes. What
it computes must be what this machine computes; how long it takes means nothing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT
from device_bed import Daemon, Keys, arm64_adbd, arm64_sshd

from devices import report
from devices.comparison import compare
from devices.engines import Model, Plan
from devices.errors import BadDeviceError, CommandFailedError
from devices.execution import model_folder, prepare_engine, run_plan
from devices.operators import audit, read_trace
from devices.session_state import Job, SessionState, Settings
from devices.transports import Device, parse_device, transport_of
from exporter import profiling
from exporter.bundle.bundle import Bundle
from exporter.inference.reference import score
from exporter.quantization.activations import round_rows_to_int8
from exporter.text.tokenizer import load_tokenizer

STEPS = 8
#: Of logits, between the kernels of two architectures: in float, and where the last digit of a sum
#: decides how an activation is rounded to int8.
IN_FLOAT, ROUNDED = 1e-3, 0.5


@pytest.fixture(scope="module")
def adb_arm(arm64: Path, adb_server: None) -> Iterator[Daemon]:
    with arm64_adbd(arm64) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def ssh_arm(arm64: Path, ssh_keys: Keys) -> Iterator[Daemon]:
    with arm64_sshd(arm64, ssh_keys) as daemon, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILELLM_SSH_CONFIG", str(ssh_keys.client_config(daemon.port)))
        yield daemon
        daemon.die()


def model_of(bundle: Bundle, name: str) -> Model:
    request = profiling.Request(devices=["host"])
    return profiling.job(bundle, bundle.artifacts[name], request).model


def problem(bundle: Bundle, name: str) -> Model:
    """With a text that the demo checkpoint was made for: its answers leave no near ties."""
    text = "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?"
    tokenizer = load_tokenizer(bundle.quantized.path)
    tokens = tokenizer.encode(tokenizer.prompt_text(text, raw=False))
    return replace(model_of(bundle, name), tokens=tuple(tokens))


def measured(device: Device, model: Model) -> tuple[SessionState, ModuleType]:
    """A model on a device, ready to run."""
    transport = transport_of(device)
    session = SessionState(Job(model), device, Settings(timeout=300.0))
    session.identity, session.threads = transport.identify(device), 1
    session.engine = prepare_engine(session, transport)
    return session, transport


def generated(device: Device, model: Model, out: Path) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits behind them [steps, vocab]."""
    session, transport = measured(device, model)
    remote = f"{model_folder(transport, device, model)}/logits"
    plan = Plan(generate=STEPS, logits=remote)
    records, _ = run_plan(session, transport, plan)
    transport.pull(device, remote, out)
    (tokens,) = (record["tokens"] for record in records if record["phase"] == "generate")
    return tokens, np.fromfile(out, np.float32).reshape(STEPS, -1)


@pytest.mark.parametrize(
    ("bundle", "name", "daemon", "tolerance"),
    [
        ("exact_bundle", "executorch", "adb_arm", IN_FLOAT),
        ("exact_bundle", "onnx", "ssh_arm", IN_FLOAT),
        ("exact_bundle", "executorch", "ssh_arm", IN_FLOAT),
        ("portable_bundle", "executorch", "ssh_arm", ROUNDED),
    ],
)
def test_an_artifact_computes_on_arm_what_it_computes_here(
    bundle: str,
    name: str,
    daemon: str,
    tolerance: float,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    device = request.getfixturevalue(daemon).device
    model = problem(request.getfixturevalue(bundle), name)
    here = generated(parse_device("host"), model, tmp_path / "here")
    there = generated(device, model, tmp_path / "there")
    assert there[0] == here[0]
    assert np.abs(there[1] - here[1]).max() < tolerance
    assert np.abs(here[1]).max() > 1


def test_int4_in_onnx_runtime_on_arm_rounds_activations_by_rows(
    adb_arm: Daemon, portable_bundle: Bundle, tmp_path: Path
) -> None:
    """On x86 it rounds them in blocks, so the logits part by what int8 costs (0.5 on this text).
    Torch with the rounding of rows gives what Arm gives, and the tokens are the same everywhere."""
    model = problem(portable_bundle, "onnx")
    tokens, _ = generated(parse_device("host"), model, tmp_path / "here")
    there, logits = generated(adb_arm.device, model, tmp_path / "there")
    text = [*model.tokens, *tokens[:-1]]
    positions = range(len(model.tokens) - 1, len(text))
    simulated = score(portable_bundle.quantized, text, positions, round_rows_to_int8)
    assert there == tokens == simulated.argmax(1).tolist()
    assert np.abs(logits - simulated.numpy()).max() < IN_FLOAT


def test_the_arm_machine_knows_itself_and_is_marked_emulated(adb_arm: Daemon) -> None:
    identity = transport_of(adb_arm.device).identify(adb_arm.device)
    assert (identity.machine, identity.name) == ("aarch64", "Testbed arm64")
    assert [core.name for core in identity.cores] == ["Cortex-A76"]
    assert "asimddp" in identity.features
    assert identity.kind == "emulated"
    assert "qemu" in identity.kind_reason


def test_an_etdump_of_the_device_is_pulled_and_read(
    adb_arm: Daemon, portable_bundle: Bundle, tmp_path: Path
) -> None:
    model = model_of(portable_bundle, "executorch")
    session, transport = measured(adb_arm.device, model)
    remote = f"{model_folder(transport, adb_arm.device, model)}/trace"
    run_plan(session, transport, Plan(depths=[0], steps=2, trace=remote))
    transport.pull(adb_arm.device, remote, tmp_path / "trace")
    operators = read_trace("executorch", tmp_path / "trace")
    products = [row for row in operators if "QB4W" in row.name]
    assert products and all(row.delegate == "XnnpackBackend" for row in products)
    assert sum(row.share for row in operators) == pytest.approx(1)
    assert audit(operators) == []


def test_an_old_processor_that_lacks_an_instruction_is_reported_as_such(
    arm64: Path, adb_server: None, portable_bundle: Bundle
) -> None:
    """Its /proc/cpuinfo tells of dot products that it does not have, as a wrong kernel may."""
    with arm64_adbd(arm64, "cortex-a53", cpuinfo="cpuinfo_a76") as daemon:
        session, transport = measured(daemon.device, model_of(portable_bundle, "executorch"))
        with pytest.raises(CommandFailedError, match="code 132, SIGILL: the CPU lacks an instr"):
            run_plan(session, transport, Plan(prompts=[4]))


def test_a_session_on_it_says_emulated_everywhere_and_is_never_compared(
    adb_arm: Daemon, portable_bundle: Bundle, tmp_path: Path
) -> None:
    request = profiling.Request(
        devices=[str(adb_arm.device)], targets=["executorch"], threads=1,
        overrides=["max_repeats=1", "sustained_seconds=3", "decode_steps=2", "depths=[0]",
                   "prompt_lengths=[4]"],
        output=tmp_path / "report.json", cores="0",
    )  # fmt: skip
    made = profiling.profile(portable_bundle.path, request, lambda *_: None).report
    (session,) = made["sessions"]
    assert (session["status"], session["kind"]) == ("complete", "emulated")
    assert not session["comparable"]
    assert session["operators"] and session["undelegated"] == []
    assert session["bandwidth"] is None
    assert session["engine"]["cores"] == "0"
    if not list(Path("/sys/class/thermal").glob("thermal_zone*/temp")):  # then Android's service
        assert session["identity"]["temperatures"] == {"AP": 25.6, "battery": 32.6}
        assert session["sustained"]["hottest"]["sensor"] == "battery"
    if not list(Path("/sys/class/power_supply").iterdir()):
        assert session["energy"]["source"] == "dumpsys battery/charge_counter"
    with pytest.raises(BadDeviceError, match="is emulated: its times mean nothing"):
        compare(made, made)
    changed = json.loads(json.dumps(made))
    changed["sessions"][0]["comparable"] = True
    with pytest.raises(BadDeviceError, match="does not follow the schema"):
        report.validate(changed)
    assert (ROOT / "devices" / "schema.json").is_file()
