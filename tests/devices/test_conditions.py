"""Under which conditions a device measures: its cores, threads, temperatures, energy and rest."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import run
from device_bed import Daemon, is_gone

from devices import energy, thermal
from devices.cores import mask_of, parse_cores, show_cores
from devices.errors import BadDeviceError, DeviceError
from devices.execution import check_cores
from devices.identity import Identity, parse_identity
from devices.thermal import ThermalSample, hottest
from devices.transports import Device, transport_of
from exporter import profiling
from exporter.bundle.bundle import Bundle
from exporter.progress import no_progress

Capture = pytest.CaptureFixture[str]
SHORT = ["depths=[0]", "prompt_lengths=[4]", "max_repeats=1", "decode_steps=2"]
#: `dumpsys thermalservice` of a phone: android.stackexchange.com/questions/246774.
THERMALSERVICE = """IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
\tTemperature{mValue=11.0, mType=2, mName=SUBBAT, mStatus=0}
\tTemperature{mValue=12.6, mType=0, mName=AP, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
\tTemperature{mValue=23.8, mType=2, mName=BAT, mStatus=0}
\tTemperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
Temperature static thresholds from HAL:
\tTemperatureThreshold{mType=0, mName=CPU, mHotThrottlingThresholds=[NaN, NaN, 80.0]}
"""
#: `dumpsys battery`, as BatteryService of frameworks/base prints it.
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging voltage: 0
  Charge counter: 3000000
  status: 3
  level: 84
  scale: 100
  voltage: 4000
  temperature: 326
  technology: Li-ion
"""


@pytest.mark.parametrize(
    ("text", "cores", "shown", "mask"),
    [
        ("0", (0,), "0", "1"),
        ("4-7", (4, 5, 6, 7), "4-7", "f0"),
        ("7,0, 2-3", (0, 2, 3, 7), "0,2-3,7", "8d"),
        ("1,1-2", (1, 2), "1-2", "6"),
    ],
)
def test_cores_are_numbers_and_ranges(
    text: str, cores: tuple[int, ...], shown: str, mask: str
) -> None:
    assert parse_cores(text) == cores
    assert (show_cores(cores), mask_of(cores)) == (shown, mask)


@pytest.mark.parametrize(
    "text", ["", "a", "4-", "-1", "7-4", "1;2", "0x3", "9999", "1" * 5000, "٣"]
)
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(BadDeviceError, match="is not a list of cores"):
        parse_cores(text)


def test_a_command_runs_on_the_chosen_cores_only(
    portable_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the runner sees is seen through the tool that pins it."""
    last, seen = max(os.sched_getaffinity(0)), tmp_path / "seen"
    tool = tmp_path / "taskset"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {seen}\nexec /usr/bin/taskset "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    request = profiling.Request(
        ["host"], ["executorch"], [*SHORT, "sustained_seconds=0"], threads=64, cores=f"{last}"
    )
    made = profiling.profile(portable_bundle.path, request, no_progress).report
    (session,) = made["sessions"]
    assert session["status"] == "complete", session["problem"]
    assert (session["engine"]["cores"], session["engine"]["threads"]) == (f"{last}", 1)
    assert (made["settings"]["cores"], made["settings"]["threads"]) == (f"{last}", 64)
    lines = seen.read_text().splitlines()
    assert all(line.startswith(f"{1 << last:x} ") for line in lines)
    assert any("--prompts 4" in line for line in lines)
    done = transport_of(Device("host")).run(
        Device("host"), ["taskset", mask_of([last]), "grep", "Cpus_allowed_list",
        "/proc/self/status"], 60,
    )  # fmt: skip
    assert done.text.split() == ["Cpus_allowed_list:", str(last)]


def test_threads_are_no_more_than_the_cores_that_a_process_may_use(
    portable_bundle: Bundle, capsys: Capture
) -> None:
    """Here the process itself has one core; the machine has more."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        options = ["--device", "host", "--target", "executorch", "--threads", "8"]
        command = ["profile", portable_bundle.path, *SHORT, "sustained_seconds=0", *options]
        outcome = run(capsys, *command)
    finally:
        os.sched_setaffinity(0, own)
    assert outcome.code == 0, outcome.err
    assert "1 threads (8 asked for, more than there are cores), mapped" in outcome.out


def test_cores_that_a_process_may_not_use_are_refused_with_those_that_it_may() -> None:
    identity = Identity("x", "x", "Linux", "", 1, "real", usable=(0, 1, 2))
    device, transport = Device("host"), transport_of(Device("host"))
    check_cores(device, transport, identity, (0,))
    with pytest.raises(DeviceError, match=r"not run on core 3,5\. Choose --cores from 0-2"):
        check_cores(device, transport, identity, (2, 3, 5))


def test_a_device_without_taskset_is_told(
    adb_device: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devices.execution.pinned_to", lambda cores: ["taskset-is-not-here", "1"])
    device = adb_device.device
    transport = transport_of(device)
    with pytest.raises(DeviceError, match="has no taskset, which --cores needs"):
        check_cores(device, transport, transport.identify(device), (0,))


@pytest.mark.parametrize(("option", "mapped"), [([], True), (["--no-mmap"], False)])
def test_a_model_is_mapped_or_read_as_asked(
    option: list[str], mapped: bool, portable_bundle: Bundle, capsys: Capture
) -> None:
    options = ["--device", "host", "--target", "executorch", "--target", "onnx", *option]
    command = [*SHORT, "sustained_seconds=0", *options]
    outcome = run(capsys, "profile", portable_bundle.path, *command, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["settings"]["mmap"] is mapped
    native, python = outcome.json["sessions"]
    assert native["engine"]["mmap"] is mapped
    if mapped:
        assert python["engine"]["mmap"] is None
    else:
        assert "no choice between mapping and reading" in python["problem"]


# ---- Temperatures and energy ----


def test_temperatures_come_from_zones_and_else_from_androids_service() -> None:
    assert thermal.parse_temperatures("zone 41500 BIG core\nzone 0 usb\n") == {"BIG core": 41.5}
    assert thermal.parse_temperatures(THERMALSERVICE + BATTERY) == {"AP": 25.6, "BAT": 23.8}
    cached = THERMALSERVICE.partition("HAL Ready")[0]
    assert thermal.parse_temperatures(cached + BATTERY) == {"AP": 12.6, "SUBBAT": 11.0}
    assert thermal.parse_temperatures(BATTERY) == {"battery": 32.6}
    assert thermal.parse_temperatures("") == {}


def test_the_battery_service_counts_where_sysfs_has_no_gauge() -> None:
    before = energy.parse_counters(BATTERY)
    after = energy.parse_counters(BATTERY.replace("3000000", "2999000"))
    used = energy.used(before, after)
    assert used is not None
    assert used.joules == pytest.approx(1000 * 3600 / 1e6 * 4.0)
    assert used.source == "dumpsys battery/charge_counter"
    gauge = "/sys/class/power_supply/battery/charge_counter 5\n"
    assert list(energy.parse_counters(gauge + BATTERY)) == [gauge.split(maxsplit=1)[0]]


def test_the_hottest_sensor_is_told_with_its_course() -> None:
    samples = [ThermalSample(t, {"a": 30.0 + t, "b": 50.0 - t}) for t in (0.0, 5.0, 25.0)]
    assert hottest(samples) == ("a", 30.0, 55.0, 55.0)
    assert hottest([]) is None


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of the kernel, with a zone that cannot be read."""
    for name, kind, degrees in (("0", "cpu big", "41500"), ("1", "broken", "-274000")):
        zone = tmp_path / "zones" / f"thermal_zone{name}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"{kind}\n")
        (zone / "temp").write_text(f"{degrees}\n")
    (tmp_path / "zones" / "thermal_zone2").mkdir()
    monkeypatch.setattr(thermal, "ZONES", str(tmp_path / "zones"))
    monkeypatch.setattr("devices.transports.posix.ZONES", str(tmp_path / "zones"))
    return tmp_path / "zones"


def test_temperatures_are_logged_during_the_sustained_run_and_after_a_rest(
    zones: Path, portable_bundle: Bundle
) -> None:
    """The run has a smallest length in time and one in tokens, as MLPerf Mobile asks for."""
    stages: list[str] = []
    settings = ["sustained_seconds=3", "sustained_tokens=20", "cooldown_seconds=1"]
    request = profiling.Request(["host"], ["executorch"], [*SHORT, *settings], threads=1)
    made = profiling.profile(portable_bundle.path, request, lambda s, *_: stages.append(s)).report
    (session,) = made["sessions"]
    assert session["status"] == "complete", session["problem"]
    assert stages.index("host: executorch cool down") < stages.index("host: executorch sustained")
    assert session["identity"]["temperatures"] == {"cpu big": 41.5}
    run_ = session["sustained"]
    assert run_["seconds"] > 2.5 and run_["tokens"] >= 20
    assert len(run_["thermal"]) >= 2 and run_["thermal"][-1]["seconds"] >= 1.5
    assert all(one["temperatures"] == {"cpu big": 41.5} for one in run_["thermal"])
    assert run_["hottest"] == {"sensor": "cpu big", "first": 41.5, "most": 41.5, "last": 41.5}
    assert run_["p90_ms"] > 0


def test_what_logs_temperatures_ends_with_its_command(adb_device: Daemon, zones: Path) -> None:
    """Also its sleep, and with the code of the command."""
    every = f"77.{os.getpid()}"
    log = ["sh", "-c", thermal.LOG_TEMPERATURES, "mobilellm", "@@mark", every, str(zones)]
    command = ["sh", "-c", "echo out; echo err >&2; sleep 0.5; exit 7"]
    device = adb_device.device
    done = transport_of(device).run(device, [*log, *command], 60)
    samples, rest = thermal.parse_log(done.stderr, "@@mark")
    assert (done.code, done.text, rest.split()) == (7, "out\n", [b"err"])
    assert [sample.temperatures for sample in samples] == [{"cpu big": 41.5}]
    assert is_gone(f"sleep {every}")


def test_a_run_of_tokens_lasts_until_they_are_decoded(
    portable_bundle: Bundle, capsys: Capture
) -> None:
    """On both runners, of which each has its own loop."""
    settings = [*SHORT, "sustained_seconds=0", "sustained_tokens=300"]
    outcome = run(capsys, "profile", portable_bundle.path, *settings, "--device", "host", "--json")
    assert outcome.code == 0, outcome.err
    tokens = [session["sustained"]["tokens"] for session in outcome.json["sessions"]]
    assert tokens == [300, 300]


@pytest.mark.parametrize("kind", ["adb", "ssh"])
def test_what_was_copied_is_removed_from_a_device(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: Capture
) -> None:
    device: Device = request.getfixturevalue(f"{kind}_device").device
    transport: ModuleType = transport_of(device)
    remote = f"{transport.workspace(device)}/cleaning test/file"
    local = tmp_path / "file"
    local.write_text("x")
    assert transport.push(device, local, remote)
    outcome = run(capsys, "devices", "--clean", device)
    assert outcome.code == 0, outcome.err
    assert f"removed {transport.workspace(device)}" in outcome.out
    gone: Any = transport.run(device, ["ls", transport.workspace(device)], 60)
    assert gone.code != 0
    again = run(capsys, "devices", "--clean", device, "--json")
    assert (again.code, again.json["cleaned"][0]["device"]) == (0, str(device))


def test_what_a_process_may_use_is_read_from_the_device() -> None:
    device = Device("host")
    identity = transport_of(device).identify(device)
    assert identity.usable == tuple(sorted(os.sched_getaffinity(0)))
    with pytest.raises(DeviceError, match="does not identify itself"):
        parse_identity("@@kernel\n")
