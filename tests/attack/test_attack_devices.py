"""A device may answer anything: its own session fails, with an error that a terminal can show, and
nothing else does. The devices here are an `adb` that runs every command on this machine, and then
gives another answer to one of them."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices import energy, report, thermal
from devices.engines.executor_runner import read_executor
from devices.engines.official import read_llama
from devices.engines.onnx_tensors import read_inputs
from devices.engines.perf_test import read_perf_test
from devices.engines.records import read_records
from devices.errors import DeviceError
from devices.execution import read_probe
from devices.files import cache_folder
from devices.identity import IDENTIFY, parse_identity, parse_meminfo
from devices.operators import read_trace
from devices.resume_log import ResumeLog
from devices.session_state import Job, Settings
from devices.text import printable
from devices.transports import adb, parse_device, posix, supervised
from devices.transports.supervised import Completed
from exporter import profiling
from exporter.bundle.bundle import Bundle
from exporter.progress import no_progress

Capture = pytest.CaptureFixture[str]

#: The user's cache: it has the native runner, which is compiled once.
CACHE = cache_folder()

#: `answers/SERIAL` may have `match`, a text in the command whose answer is replaced by the file
#: `out`, and `err`, which is added to its standard error; `endless` stands for both without an end.
ADB = r"""#!/bin/sh
if [ "$1" = devices ]; then
  [ -e "$FAKE/endless" ] && exec yes "x	device"
  exec cat "$FAKE/devices"
fi
mine=$FAKE/$2
shift 2
if [ "$1" = push ]; then exec cp "$2" "$3"; fi
match=$(cat "$mine/match" 2>/dev/null) || exec sh -c "$3"
case $3 in *"$match"*) ;; *) exec sh -c "$3" ;; esac
if [ -e "$mine/endless" ]; then sh -c "$3"; exec yes "$(printf '\033[31m')"; fi
[ -e "$mine/err" ] && { sh -c "$3"; cat "$mine/err" >&2; exit; }
sh -c "$3" >/dev/null
cat "$mine/out"
"""

DIGITS = b"9" * 5000
ESCAPES = b"\x1b]0;owned\x07\x1b[31mred\x1b[2J\r\x9b5n\xe2\x80\xae"
DEEP = b"[" * 20_000
#: Answers that fit no question.
NONSENSE = {
    "nothing": b"",
    "binary": bytes(range(256)) * 40,
    "not UTF-8": b"\xff\xfe\xc3(" * 100,
    "escape sequences": ESCAPES * 50,
    "5,000 digits": DIGITS
    + b"\n"
    + b"\n".join(b" %b %b %b 1%%" % (DIGITS, DIGITS, DIGITS) for _ in "ab"),
    "deep JSON": b'{"phase":' + DEEP + b"\n",
    "a wrong type": b'{"phase":{},"ms":"x"}\n{"bandwidth":[1]}\n[]\nnull\n',
}
#: A text in the command that asks, for each question that a session asks.
QUESTIONS = {
    "identity": "echo @@kernel",
    "memory": "setsid cat /proc/meminfo",
    "free space and hashes": "df -k -P",
    "bandwidth": " bandwidth ",
    "records": "--prompts",
    "energy": "powercap",
    "the trace's hash": "wc -c <",
    "the trace": "/trace",
}
#: Questions without an answer are no fault: these figures are then missing.
OPTIONAL = {"energy"}
#: For questions that are not at the beginning of a session, whose tests take long.
FEW = ("escape sequences", "5,000 digits")
EARLY = ("identity", "free space and hashes")
WRONG_NUMBERS = [
    b'{"phase":"decode","depth":0,"ms":[%b]}\n{"phase":"end"}\n' % DIGITS,
    b'{"phase":"decode","depth":0,"ms":[1e999]}\n{"phase":"end"}\n',
    b'{"phase":"decode","depth":[],"ms":[1]}\n{"phase":"end"}\n',
    b'{"phase":"prefill","tokens":{"a":1},"ms":[1]}\n{"phase":"end"}\n',
    b'{"phase":"load","ms":[[1]]}\n{"phase":"end"}\n',
    b'{"phase":"decode","depth":0}\n{"phase":"end"}\n',
    b'{"phase":"prefill","tokens":[1],"ms":[1]}\n{"phase":"end"}\n',
    b'{"phase":"load","ms":[true]}\n{"phase":"end"}\n',
    b'{"phase":"load","ms":[1],"memory":{"rss":"much"}}\n{"phase":"end"}\n',
    b'{"phase":"load","ms":[1],"memory":7}\n{"phase":"end"}\n',
    b'{"phase":"\\u001b[31m","ms":[1]}\n{"phase":"end"}\n',
]


class Phones:
    """The devices behind our `adb`, each with a folder of its answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, serial: str, match: str, **files: bytes) -> str:
        home = self.folder / serial
        home.mkdir(exist_ok=True)
        for old in home.iterdir():
            old.unlink()
        (home / "match").write_text(match)
        for name, content in files.items():
            (home / name).write_bytes(content)
        return f"adb:{serial}"


@pytest.fixture
def phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Phones:
    monkeypatch.setenv("MOBILELLM_CACHE", str(CACHE))
    folder, program = tmp_path / "answers", tmp_path / "bin" / "adb"
    folder.mkdir()
    program.parent.mkdir()
    program.write_text(ADB)
    program.chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(adb, "_WORKSPACE", str(CACHE / "attacked device"))
    monkeypatch.setattr(supervised, "_GRACE", 0.5)  # an endless program outlives its script
    return Phones(folder)


@pytest.fixture(scope="module")
def job(portable_bundle: Bundle) -> Job:
    request = profiling.Request(devices=["host"])
    return profiling.job(portable_bundle, portable_bundle.artifacts["executorch"], request)


SHORT = Settings((4,), (0,), 2, sustained_seconds=0, sustained_tokens=2, max_repeats=1, threads=1)


def session_of(device: str, job: Job) -> dict[str, Any]:
    made = report.profile([parse_device(device)], [job], SHORT, no_progress)
    report.validate(made)
    (session,) = made["sessions"]
    assert_printable(session)
    return dict(session)


def assert_printable(value: object) -> None:
    """No text in it that a terminal would act on, and none without an end."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert_printable(key)
            assert_printable(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_printable(item)
    elif isinstance(value, str):
        assert value.isprintable() and len(value) < 2000, value[:200]


def test_a_device_that_answers_well_passes(phones: Phones, job: Job) -> None:
    session = session_of(phones.add("good", "no such command"), job)
    assert (session["status"], session["problem"]) == ("complete", None)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_device_that_answers_nonsense_fails_alone(
    question: str, phones: Phones, job: Job
) -> None:
    for name in NONSENSE if question in EARLY else FEW:
        device = phones.add("bad", QUESTIONS[question], out=NONSENSE[name])
        session = session_of(device, job)
        fine = question in OPTIONAL
        assert session["status"] == ("complete" if fine else "failed"), (name, session["problem"])
        assert fine or len(session["problem"]) < 1500


@pytest.mark.parametrize("answer", WRONG_NUMBERS)
def test_records_with_wrong_numbers_and_types_are_refused(answer: bytes) -> None:
    with pytest.raises(DeviceError, match="runner: "):
        read_records(Completed(("runner",), 0, answer, b"", 1.0))


def test_a_record_with_a_wrong_type_fails_its_session_alone(phones: Phones, job: Job) -> None:
    session = session_of(phones.add("bad", "--prompts", out=WRONG_NUMBERS[3]), job)
    assert session["status"] == "failed"
    assert session["problem"] == "runner: gives the invalid tokens {'a': 1}."


@pytest.mark.parametrize(
    "line",
    [b'{"probe":[]}}', b'{"probe":{"peak_rss":"x","peak_pss":1}}', b'{"probe":{}}', b'{"probe":1}}',
     b'{"probe":{"peak_rss":%b,"peak_pss":1}}' % DIGITS],
)  # fmt: skip
def test_a_memory_probe_that_reports_nonsense_fails_alone(
    line: bytes, phones: Phones, job: Job
) -> None:
    """It may also be that it says nothing: then the figure is missing."""
    with pytest.raises(DeviceError, match="memory probe"):
        read_probe(b"warning\n" + line + b"\n")
    assert read_probe(b'{"probe":{"peak_rss":1') == ({}, b'{"probe":{"peak_rss":1')


@pytest.mark.parametrize("question", ["identity", "records", "memory"])
def test_endless_output_is_cut_off_soon(question: str, phones: Phones, job: Job) -> None:
    started = time.monotonic()
    session = session_of(phones.add("endless", QUESTIONS[question], endless=b""), job)
    assert session["status"] == "failed"
    assert "printed more than 64 MiB on standard output" in session["problem"]
    assert time.monotonic() - started < 20


def test_many_devices_of_which_one_is_sane(
    phones: Phones, portable_bundle: Bundle, capsys: Capture
) -> None:
    """The whole command: exit code 1, a report, and nothing that a terminal would act on."""
    bad = [
        phones.add("a", "echo @@kernel", out=ESCAPES),
        phones.add("b", "setsid cat /proc/meminfo", out=b"MemTotal: %b kB\n" % DIGITS),
        phones.add("c", "echo @@kernel", endless=b""),
    ]
    arguments = ["depths=[0]", "prompt_lengths=[4]", "max_repeats=1", "decode_steps=2",
                 "sustained_seconds=0", "--target", "executorch"]  # fmt: skip
    options = [word for device in [*bad, "host"] for word in ("--device", device)]
    outcome = run(capsys, "profile", portable_bundle.path, *arguments, *options)
    assert outcome.code == 1
    assert outcome.out.count("failed: ") == 3 and "host: executorch\n" in outcome.out
    assert all(c.isprintable() or c == "\n" for c in outcome.out + outcome.err)


def test_a_lost_device_does_not_throw_the_others_rounds_away(
    phones: Phones, portable_bundle: Bundle, tmp_path: Path
) -> None:
    """The log of the resumed session is kept until every session has succeeded."""
    output, log = tmp_path / "report.json", tmp_path / "report.json.rounds"
    lost = phones.add("lost", "--prompts", out=b"")
    request = profiling.Request(
        ["host", lost], ["executorch"], ["depths=[0]", "prompt_lengths=[4]", "max_repeats=2",
        "decode_steps=2", "sustained_seconds=0"], output=output, threads=1,
    )  # fmt: skip
    first = profiling.profile(portable_bundle.path, request, no_progress).report["sessions"]
    assert [session["status"] for session in first] == ["complete", "failed"]
    assert log.is_file()
    phones.add("lost", "no such command")
    again = profiling.profile(portable_bundle.path, request, no_progress).report["sessions"]
    assert [session["status"] for session in again] == ["complete", "complete"]
    assert again[0]["samples"] == first[0]["samples"]
    assert not log.exists()


def test_serials_that_are_none_are_not_listed(phones: Phones, capsys: Capture) -> None:
    serials = ["emulator-5554", "\x1b[31mred", "-s", "a b", "$(id)", "x" * 9, "\u202egnol", "????"]
    rows = "".join(f"{serial}\tdevice\n" for serial in serials)
    content = f"List of devices attached\n{rows}a\tunauthorized\n\tdevice\nx\n"
    (phones.folder / "devices").write_bytes(content.encode() + b"\xff\xfe\tdevice\n")
    outcome = run(capsys, "devices", "--json")
    assert outcome.json["connected"] == ["host", "adb:emulator-5554", "adb:xxxxxxxxx"]
    assert "\x1b" not in run(capsys, "devices").out


def test_a_list_of_devices_without_an_end_is_cut_off(phones: Phones) -> None:
    (phones.folder / "endless").touch()
    started = time.monotonic()
    assert adb.connected() == []
    assert time.monotonic() - started < 10


def test_only_our_folder_is_removed(phones: Phones, capsys: Capture, tmp_path: Path) -> None:
    ours, beside = tmp_path / "ws" / "mobilellm", tmp_path / "ws" / "other"
    (ours / "deep").mkdir(parents=True)
    (ours / "deep" / "model.pte").write_bytes(b"x")
    beside.mkdir()
    (ours / "link").symlink_to(beside)
    (beside / "theirs").touch()
    adb._WORKSPACE = str(ours)
    device = phones.add("good", "no such command")
    outcome = run(capsys, "devices", "--clean", device, "--json")
    (cleaned,) = outcome.json["cleaned"]
    assert (outcome.code, cleaned["device"], cleaned["problem"]) == (0, device, None)
    assert not ours.exists() and (beside / "theirs").exists()
    assert run(capsys, "devices", "--clean", "adb:$(id)").code == 2
    gone = run(capsys, "devices", "--clean", "ssh:nobody@127.0.0.1:1", device, "--json")
    assert gone.code == 1
    assert [one["problem"] is None for one in gone.json["cleaned"]] == [False, True]


# ---- Every parser of an answer: a DeviceError or a sound result, and soon. ----

IDENTITY = "".join(
    f"@@{name}\n{text}\n"
    for name, text in {
        "kernel": "Linux 5.15.110-android14 aarch64",
        "process": "sh",
        "cpuinfo": "processor\t: 0\nFeatures\t: fp\nCPU implementer\t: 0x41\nCPU part\t: 0xd46\n",
        "meminfo": "MemTotal:        7768172 kB\nMemAvailable:    3000000 kB\n",
        "release": 'PRETTY_NAME="Debian"\n',
        "getprop": "[ro.product.model]: [Pixel 8]\n[ro.build.version.release]: [14]\n",
        "frequencies": "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq 1704000\n",
        "governors": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor sched_pixel\n",
        "usable": "Cpus_allowed_list:\t0-3\n",
        "board": "Raspberry Pi\n",
        "thermal": "zone 41500 BIG\n",
        "end": "",
    }.items()
)
STATS = json.dumps({
    "prompt_tokens": 15, "generated_tokens": 20, "model_load_start_ms": 1000,
    "model_load_end_ms": 1250, "inference_start_ms": 1300, "inference_end_ms": 1900,
    "prompt_eval_end_ms": 1400, "first_token_ms": 1405,
})  # fmt: skip
DUMPSYS = (
    "Thermal Status: 0\nCurrent temperatures from HAL:\n"
    "\tTemperature{mValue=25.6, mType=0, mName=AP, mStatus=0}\n"
    "  Charge counter: 3000000\n  voltage: 4063\n  temperature: 326\n"
)
RECORDS = (
    '{"phase":"load","ms":[12.5],"memory":{"peak_rss":1,"rss":1,"anonymous":1,"file":1,"pss":-1}}\n'
    '{"phase":"decode","depth":0,"ms":[1.5,2]}\n{"phase":"end"}\n'
)
KERNEL = {"cat": "Node", "name": "x_kernel_time", "dur": 5, "args": {"op_name": "MatMulNBits"}}


def printed(text: str) -> Completed:
    return Completed(("runner",), 0, text.encode("utf-8", "replace"), b"", 1.0)


def in_file(read: Callable[[Path], object]) -> Callable[[str], object]:
    def parse(text: str) -> object:
        path = CACHE / f"attack-{os.getpid()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "replace"))
        try:
            return read(path)
        finally:
            path.unlink()

    return parse


#: Parser → a sound answer, and how it is parsed.
PARSERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "identity": (IDENTITY, parse_identity),
    "meminfo": ("MemTotal:  7768172 kB\nMemFree: 1 kB\n", parse_meminfo),
    "df": ("Filesystem 1024-blocks Used Available Capacity\n/dev/x 100 50 50 50% /\n",
           lambda text: posix._free_bytes(text, parse_device("host"), "/")),
    "records": (RECORDS, lambda text: read_records(printed(text))),
    "probe": ('{"probe":{"code":0,"seconds":1.5,"peak_rss":1,"peak_pss":2}}\n',
              lambda text: read_probe(text.encode("utf-8", "replace"))[0]),
    "llama_main": (f"I started\nPyTorchObserver {STATS}\n", read_llama),
    "executor_runner": ("Model loaded in 5.1 ms.\nIteration 1 of 2: 7.5 ms\n"
                        "Iteration 2 of 2: 6 ms\nModel executed successfully 2 time(s) in 13 ms.",
                        lambda text: read_executor(text, 256)),
    "perf_test": ("Session creation time cost: 0.15 s\nP50 Latency: 0.045 s\nP95 Latency: 1 s\n",
                  lambda text: read_perf_test(text, {"phase": "decode", "depth": 0})),
    "energy": ("/sys/class/powercap/intel-rapl:0/energy_uj 12\n" + DUMPSYS, energy.parse_counters),
    "temperatures": ("zone 41500 BIG\n" + DUMPSYS, thermal.parse_temperatures),
    "thermal log": ("@@m 12.50 zone 41500 BIG\n@@m 14.50 zone 41600 BIG\n",
                    lambda text: thermal.parse_log(text.encode("utf-8", "replace"), "@@m")[0]),
    "onnx trace": (json.dumps([KERNEL]), in_file(lambda path: read_trace("onnx", path))),
    "coreml plan": ('[{"operator":"ios18.linear","device":"MLCPU","cost":0.5}]',
                    in_file(lambda path: read_trace("coreml", path))),
    "resume log": ('{"key":"k","step":"s","content":{"records":[{"phase":"load","ms":[1]}]}}\n',
                   in_file(lambda path: ResumeLog(path).find("k", "s"))),
}  # fmt: skip
#: What replaces or follows a part of a sound answer.
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from([
        "9" * 5000, "-1", "1e999", "NaN", "Infinity", "null", "true", "{}", "[]", '""', "[" * 5000,
        '{"a":' * 3000, "\x1b[31m", "\u202e", "\0", "\n", "\r\n", "\ud800", "é", "0x" + "f" * 300,
        "-" * 50, " " * 500, "1.5.2", "@@end\n", "@@x", '"', "\\", "%", "0-99999", "1" * 19, "٣",
    ]),
)  # fmt: skip


def sound(value: object) -> object:
    """The value as JSON, which must be finite and printable."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, list):
        value = [sound(item) for item in value]
    plain = json.loads(json.dumps(value, allow_nan=False))
    assert_printable(plain)
    return plain


@pytest.mark.parametrize("name", PARSERS)
def test_a_sound_answer_is_parsed(name: str) -> None:
    text, parse = PARSERS[name]
    assert sound(parse(text))


@pytest.mark.parametrize("name", PARSERS)
@settings(
    derandomize=True, deadline=None, max_examples=120, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_a_changed_answer_is_refused_or_is_sound(name: str, data: st.DataObject) -> None:
    text, parse = PARSERS[name]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 40)))
        text = text[:start] + data.draw(PIECES) + text[end:]
    try:
        sound(parse(text))
    except DeviceError as error:
        assert_printable(str(error))


@pytest.mark.parametrize("name", PARSERS)
def test_a_wrong_type_of_json_is_refused_or_is_sound(name: str) -> None:
    """Each value of the answer's JSON is replaced by each other type."""
    text, parse = PARSERS[name]
    for old in ('"ms"', "[12.5]", "15", '"load"', "0.5", '"MatMulNBits"', '{"phase":"load"', "5,"):
        for new in ("null", "[]", "{}", '"x"', "true", "1e999", "-1", "9" * 400, '{"a":[{}]}'):
            if old in text:
                try:
                    sound(parse(text.replace(old, new, 1)))
                except DeviceError as error:
                    assert_printable(str(error))


LONG = 1 << 20


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    "part",
    ["a", " ", "9", "\n", "]: [", "[", '{"a":', "cpu1/", "model name\n", "processor : ", "\\", '"',
     "PyTorchObserver{", "P50 Latency ", "zone 1 ", "Temperature{mValue=1, ", "@@x\n", " 1 1 1 "],
)  # fmt: skip
def test_a_long_answer_takes_no_long_time(name: str, part: str) -> None:
    """No pattern that tries every place again, and again from there."""
    text, parse = PARSERS[name]
    started = time.monotonic()
    for long in (part * (LONG // len(part)), text[:20] + part * (LONG // len(part))):
        try:
            parse(long)
        except DeviceError as error:
            assert len(str(error)) < 1500
    assert time.monotonic() - started < 5


def test_every_section_of_the_identity_is_needed() -> None:
    for name in IDENTITY.split("@@")[1:]:
        with pytest.raises(DeviceError, match="does not identify itself"):
            parse_identity(IDENTITY.replace(f"@@{name.splitlines()[0]}\n", ""))
    assert "echo @@usable" in IDENTIFY


def test_a_model_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"", b"\x00", b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x02\x5a\x00"):
        path.write_bytes(content)
        with pytest.raises(DeviceError, match="cannot be used"):
            read_inputs(path)


def test_text_of_a_device_is_shown_and_not_acted_on() -> None:
    assert printable("\x1b[31mred\n") == r"\x1b[31mred\n"
    assert printable("größe 😀") == "größe 😀"
    assert printable("x" * 400) == "x" * 300 + "…"
    error = DeviceError("a\x07b", ESCAPES.decode("utf-8", "replace"), "\x9b")
    assert str(error).isprintable()
