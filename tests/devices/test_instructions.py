"""Instructions of an emulated Arm CPU: what is counted is exact, the same in every run, and moves
when the model executes other code."""

import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from commands import run
from undelegated import lower_with_undelegated_output

from devices.engines import Model
from devices.errors import BadDeviceError
from devices.instructions import tools, validate
from devices.instructions.counter import Settings, count
from devices.instructions.emulation import describe_machine
from devices.instructions.symbols import read_symbols
from devices.transports.client import run_client
from exporter import profiling
from exporter.backends import backend
from exporter.bundle.bundle import Bundle
from exporter.bundle.results import read_result

#: Of a figure, between two runs.
TOLERANCE = 1e-6
DECODE = Settings(prompts=())
#: Registers count the passes of a loop; `max` has all the instructions that are classified.
PROGRAM = """
.globl _start
_start: mov x0, #{passes}
again:  add v0.4s, v1.4s, v2.4s
        fmadd s0, s1, s2, s3
        sdot v3.4s, v4.16b, v5.16b
        udot v3.4s, v4.16b, v5.4b[1]
        usdot v3.4s, v4.16b, v5.16b
        sudot v3.4s, v4.16b, v5.4b[1]
        smmla v3.4s, v4.16b, v5.16b
        ummla v3.4s, v4.16b, v5.16b
        usmmla v3.4s, v4.16b, v5.16b
        subs x0, x0, #1
        b.ne again
        mov x8, #93
        svc #0
"""
LIBRARY = """
static int hidden(int x);
int (*pointer)(int) = hidden;
int first(int x) { return x - 2; }
static int hidden(int x) { return x * 3 + 1; }
int last(int x) { return pointer(x); }
"""


@pytest.fixture(scope="module")
def built() -> tools.Tools:
    try:
        tools.binutil("nm")
        return tools.build()
    except BadDeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(portable_bundle: Bundle, built: tools.Tools) -> Model:
    finished = portable_bundle.artifacts["executorch"]
    return profiling.job(portable_bundle, finished, profiling.Request(devices=())).model


@pytest.fixture(scope="module")
def counted(model: Model) -> dict[str, Any]:
    return count(model, Settings(), lambda *_: None)


def figures(counts: Mapping[str, Any]) -> tuple[float, float]:
    """Per token, of prefill and of decode."""
    (one,) = counts["counts"]
    return one["prefill"][0]["per_token"], one["decode"][0]["per_token"]


def decode_of(model: Model, settings: Settings = DECODE) -> Mapping[str, Any]:
    (figure,) = count(model, settings, lambda *_: None)["counts"][0]["decode"]
    assert isinstance(figure, dict)
    return figure


def compile_arm(source: Path, out: Path, *options: str) -> None:
    compiler = "gcc" if tools.binutil("nm").endswith("/nm") else "aarch64-linux-gnu-gcc"
    subprocess.run([compiler, *options, str(source), "-o", str(out)], check=True)


@pytest.mark.parametrize("passes", [1, 1000])
def test_the_plugin_counts_every_instruction_of_each_class(
    passes: int, built: tools.Tools, tmp_path: Path
) -> None:
    (tmp_path / "loop.s").write_text(PROGRAM.format(passes=passes))
    compile_arm(
        tmp_path / "loop.s", tmp_path / "loop",
        "-nostdlib", "-static", "-Wa,-march=armv8.6-a+i8mm+dotprod",
    )  # fmt: skip
    plugin = f"{built.folder / tools.PLUGIN},out={tmp_path / 'out'}"
    command = [built.program, "-cpu", "max", "-plugin", plugin, str(tmp_path / "loop")]
    subprocess.run(command, check=False)
    sums = [0, 0, 0, 0]
    for line in (tmp_path / "out").read_text().splitlines():
        executions, *numbers, _, file = line.split(" ")
        assert file == str(tmp_path / "loop")
        sums = [a + int(executions) * int(b) for a, b in zip(sums, numbers, strict=True)]
    assert sums == [1 + 11 * passes + 2, 9 * passes, 4 * passes, 3 * passes]


def test_two_runs_give_the_same_count(model: Model, counted: dict[str, Any]) -> None:
    again = count(model, Settings(), lambda *_: None)
    assert figures(again) == pytest.approx(figures(counted), rel=TOLERANCE)
    assert again["files"] == counted["files"]


def test_the_functions_of_a_figure_add_up_to_it_and_have_their_names(
    counted: dict[str, Any],
) -> None:
    validate(counted)
    for phase in ("prefill", "decode"):
        figure = counted["counts"][0][phase][0]
        functions = figure["functions"]
        assert sum(one["per_token"] for one in functions) == pytest.approx(figure["per_token"])
        products = [one for one in functions if "qsi4c32p4x4" in one["function"]]
        # The kernels that are written for the dot products of this CPU.
        assert all(one["function"].endswith("neon_dotprod") for one in products)
        assert sum(one["per_token"] for one in products) > 0.1 * figure["per_token"]
        assert not any(one["near"] for one in products)
        assert figure["classes"]["dot_product"] > 0
        assert figure["classes"]["i8mm"] == 0
    libraries = {one["library"] for one in counted["counts"][0]["decode"][0]["functions"]}
    assert "mobilellm_runner" in libraries and "libc.so.6" in libraries


def test_nothing_in_the_counts_looks_like_a_time(counted: dict[str, Any]) -> None:
    def keys(content: object) -> set[str]:
        if isinstance(content, dict):
            return set(content).union(*map(keys, content.values()))
        return set().union(*map(keys, content)) if isinstance(content, list) else set()

    assert not {key for key in keys(counted) if any(w in key for w in ("ms", "second", "time"))}


def test_an_attention_over_a_longer_cache_moves_the_count(
    model: Model, counted: dict[str, Any], portable_bundle: Bundle, tmp_path: Path
) -> None:
    target = portable_bundle.artifacts["executorch"].artifact.target
    longer = target.model_copy(update={"max_context": 2 * target.max_context})
    backend("executorch").lower(portable_bundle.quantized, longer, tmp_path)
    changed = replace(model, folder=tmp_path, files=(model.main,), context=longer.max_context)
    assert decode_of(changed)["per_token"] > 1.2 * figures(counted)[1]


def test_a_product_outside_of_its_delegate_moves_the_count_and_is_named(
    model: Model, counted: dict[str, Any], portable_bundle: Bundle, tmp_path: Path
) -> None:
    target = portable_bundle.artifacts["executorch"].artifact.target
    lower_with_undelegated_output(portable_bundle.quantized, target, tmp_path)
    found = decode_of(replace(model, folder=tmp_path, files=(model.main,)))
    assert found["per_token"] > 1.5 * figures(counted)[1]
    assert found["functions"][0]["library"] == "libexecutorch_kernels_optimized.so"


def test_the_count_does_not_depend_on_the_machine_that_counts(
    model: Model, counted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its environment and the name of the folder are others here."""
    monkeypatch.setenv("MOBILELLM_TEST", "x" * 5000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = tmp_path / "a folder, with: signs"
    shutil.copytree(model.folder, folder)
    figure = decode_of(replace(model, folder=folder))
    assert figure["per_token"] == pytest.approx(figures(counted)[1], rel=TOLERANCE)


def test_the_machine_describes_itself_as_linux_does_on_a_real_one(
    built: tools.Tools, tmp_path: Path
) -> None:
    describe_machine(tmp_path, 0x414FD0B1)
    real = (Path(__file__).parent / "cpuinfo_a76").read_text().splitlines()
    found = (tmp_path / "proc" / "cpuinfo").read_text().splitlines()
    assert len(found) == 6
    assert [line for line in found if line not in real] == []


def test_code_of_a_stripped_function_is_near_the_one_before_it(
    built: tools.Tools, tmp_path: Path
) -> None:
    (tmp_path / "x.c").write_text(LIBRARY)
    options = ["-shared", "-fPIC", "-O1", "-fno-toplevel-reorder"]
    compile_arm(tmp_path / "x.c", tmp_path / "x.so", *options)
    whole = read_symbols(tmp_path / "x.so")
    places = {one.name: one for one in whole.sections}
    text, plt = places[".text"], places[".plt"]
    offsets = {f.name: f.address - text.address + text.offset for f in whole.functions}
    assert whole.function(offsets["hidden"] + 4) == ("hidden", False)
    strip = tools.binutil("nm").removesuffix("nm") + "strip"
    subprocess.run([strip, str(tmp_path / "x.so")], check=True)
    stripped = read_symbols(tmp_path / "x.so")
    assert stripped.function(offsets["first"]) == ("first", False)
    assert stripped.function(offsets["hidden"] + 4) == ("first", True)
    assert stripped.function(offsets["last"] + 4) == ("last", False)
    assert stripped.function(plt.offset + 8) == (".plt", False)
    assert stripped.function(1 << 30) == ("outside of all sections", True)


def test_count_writes_a_measurement_of_the_bundle_and_says_that_it_is_no_time(
    portable_bundle: Bundle, built: tools.Tools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "counts.json"
    done = run(
        capsys, "count", portable_bundle.path, "--depth", 2, "--prompt", "2:4", "--cpu",
        "cortex-a53", "--cpu", "neoverse-n1", "-o", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "not a time" in done.out
    content = read_result(out).content
    assert [one["cpu"] for one in content["counts"]] == ["cortex-a53", "neoverse-n1"]
    hashes = portable_bundle.artifacts["executorch"].manifest["files"]
    assert content["files"] == {"model.pte": hashes["model.pte"]}
    dot_products = [one["decode"][0]["classes"]["dot_product"] for one in content["counts"]]
    assert dot_products[0] == 0 < dot_products[1]
    assert "neoverse-n1, decode at depth 2" in done.out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cpu", "apple-m9"], "CPU apple-m9: is not known to QEMU. Known: "),
        (["--depth", 250], "depth 250: is not from 0 to 244"),
        (["--depth", -1], "depth -1: is not from 0"),
        (["--prompt", "64"], "--prompt 64: is not two lengths in tokens"),
        (["--prompt", "64:64"], "prompts 64:64: are not a shorter and a longer length"),
        (["--prompt", "64:300"], "prompts 64:300: are not"),
        (["--target", "onnx"], "onnx: has no runner whose instructions can be counted"),
        (["--target", "coreml"], "is not in "),
        (["-o", "/"], "Is a folder"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_the_reason(
    options: list[object], reason: str, portable_bundle: Bundle, built: tools.Tools,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = run(capsys, "count", portable_bundle.path, *options)
    assert done.code == 2
    assert reason in " ".join(done.err.split())


def test_a_program_with_another_delegate_is_refused_with_the_remedy(model: Model) -> None:
    with pytest.raises(BadDeviceError, match=r"Export with targets\.0\.delegate=xnnpack"):
        count(replace(model, native=False), DECODE, lambda *_: None)


def test_a_missing_program_is_named_with_the_command_that_installs_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadDeviceError, match=r"qemu-aarch64: is not installed\. Run: apt install"):
        count(model, DECODE, lambda *_: None)
    with pytest.raises(BadDeviceError, match=r"nm: is not installed\. Run: apt install binu"):
        tools.binutil("nm")


def test_an_interrupt_leaves_no_emulator_behind(tmp_path: Path) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    script = f"echo $$ > '{tmp_path / 'pid'}'; exec sleep 60"
    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            run_client("emulator", ["sh", "-c", script], 60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_an_emulator_that_loads_no_plugin_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    static = shutil.which("qemu-aarch64-static")
    if static is None:
        pytest.skip("qemu-user-static is not installed")
    (tmp_path / tools.EMULATOR).symlink_to(static)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(BadDeviceError, match="cannot run the plugin that counts"):
        count(model, DECODE, lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"counts": []},
        {"files": {}},
        {"seconds": 3},
        {"context": 0},
    ],
)
def test_counts_that_do_not_follow_the_schema_are_refused(
    change: dict[str, Any], counted: dict[str, Any]
) -> None:
    with pytest.raises(BadDeviceError, match="does not follow the schema"):
        validate(counted | change)
