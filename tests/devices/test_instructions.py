"""Instructions and bytes of an emulated Arm CPU: what is counted is exact, the same in every run,
and moves when the model executes other code."""

import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from commands import run
from undelegated import lower_with_undelegated_output

from devices import runner
from devices.engines import Model
from devices.errors import BadDeviceError
from devices.instructions import tools, validate
from devices.instructions.counter import Settings, count
from devices.instructions.emulation import (
    Blocks,
    describe_machine,
    execute,
    machine,
    read_places,
)
from devices.instructions.symbols import read_symbols
from devices.plots import draw
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
LOOP = """
.globl _start
_start: mov x0, #{passes}
        adr x1, place
        mov x2, #0
again:  {code}
        subs x0, x0, #1
        b.ne again
        mov x8, #93
        svc #0
        .balign 64
place:  .space 512
"""
COPY = """
#include <string.h>
static char from[1000000], to[1000000];
static void mark(void) { __asm__ volatile("hint #112" ::: "memory"); }
int main(void) {
  memcpy(to, from, 1000);
  mark();
  memcpy(to, from, sizeof from);
  mark();
  return 0;
}
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
    return model_of(portable_bundle)


def model_of(bundle: Bundle) -> Model:
    finished = bundle.artifacts["executorch"]
    return profiling.job(bundle, finished, profiling.Request(devices=())).model


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


def sums(blocks: Blocks) -> Counter[str]:
    """The sum of each column over all blocks."""
    found = Counter[str]()
    for (_, _, column), number in blocks.items():
        found[column] += number
    return found


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
    with machine(built, "max", {"here": tmp_path}) as made:
        assert execute(made, ["here/loop"], tools.SHORT).code == 0
        (blocks,) = read_places(made)
    assert {file for file, _, _ in blocks} == {str(tmp_path / "loop")}
    assert sums(blocks) == {
        "instructions": 1 + 11 * passes + 2, "simd": 9 * passes, "dot_product": 4 * passes,
        "i8mm": 3 * passes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "loaded", "stored"),
    [
        ("ldr x2, [x1]", 8, 0),
        ("ldrb w2, [x1]", 1, 0),
        ("ldr q2, place", 16, 0),
        ("ldp x2, x3, [x1]", 16, 0),
        ("ldp q2, q3, [x1]; stp q2, q3, [x1, #32]", 32, 32),
        ("ld1 {v2.16b-v5.16b}, [x1]", 64, 0),
        ("st3 {v2.4s-v4.4s}, [x1]", 0, 48),
        ("ld1 {v2.h}[3], [x1]", 2, 0),
        ("ld2r {v2.2d, v3.2d}, [x1]", 16, 0),
        ("ldadd w2, w3, [x1]", 4, 4),
        ("ldaxr x2, [x1]; stlxr w4, x2, [x1]", 8, 8),
        ("dc zva, x1", 0, 64),
        ("prfm pldl1keep, [x1]; add x2, x2, x3", 0, 0),
    ],
)
def test_the_bytes_of_a_loop_are_those_of_its_loads_and_stores(
    code: str, loaded: int, stored: int, built: tools.Tools, tmp_path: Path
) -> None:
    passes = 7
    (tmp_path / "loop.s").write_text(LOOP.format(passes=passes, code=code.replace("; ", "\n")))
    compile_arm(
        tmp_path / "loop.s", tmp_path / "loop", "-nostdlib", "-static", "-Wa,-march=armv8.6-a",
        "-Wl,-N,--no-warn-rwx-segments",
    )  # fmt: skip
    cpu = "cortex-a76"
    with machine(built, cpu, {"here": tmp_path}) as made:
        assert execute(made, ["here/loop"], tools.SHORT).code == 0
        found = sums(read_places(made)[-1])
    assert (found["loaded"], found["stored"], found["unsized"]) == (
        passes * loaded, passes * stored, 0,
    )  # fmt: skip


def test_a_copy_of_n_bytes_loads_and_stores_n_bytes(built: tools.Tools, tmp_path: Path) -> None:
    (tmp_path / "copy.c").write_text(COPY)
    compile_arm(tmp_path / "copy.c", tmp_path / "copy", "-O1", "-static", "-fno-builtin")
    with machine(built, "cortex-a76", {"here": tmp_path}) as made:
        assert execute(made, ["here/copy"], tools.SHORT).code == 0
        before, after, _ = map(sums, read_places(made))
    # Besides the bytes, what memcpy and its call save and restore.
    for way in ("loaded", "stored"):
        assert 1_000_000 <= after[way] - before[way] < 1_000_200


def test_accesses_of_sve_are_counted_as_of_unknown_size(built: tools.Tools, tmp_path: Path) -> None:
    code = "ptrue p0.b\nld1b z0.b, p0/z, [x1]\nst1b z0.b, p0, [x1]"
    (tmp_path / "loop.s").write_text(LOOP.format(passes=3, code=code))
    compile_arm(
        tmp_path / "loop.s", tmp_path / "loop", "-nostdlib", "-static", "-Wa,-march=armv8.2-a+sve",
        "-Wl,-N,--no-warn-rwx-segments",
    )  # fmt: skip
    with machine(built, "max", {"here": tmp_path}) as made:
        assert execute(made, ["here/loop"], tools.SHORT).code == 0
        found = sums(read_places(made)[-1])
    assert (found["loaded"], found["stored"], found["unsized"]) == (0, 0, 6)


#: Instructions whose bytes QEMU does not see as they are: its exclusive stores load too, or do
#: nothing where another program is in between, and DC ZVA calls no plugin.
NOT_SEEN = ((0x3FE00000, 0x08000000), (0xBFE00000, 0x88200000), (0xFFFFFFE0, 0xD50B7420))
#: In a process with threads it sees atomic operations and compare-and-swap as stores alone.
ATOMIC = ((0x3B200C00, 0x38200000), (0x3FA00000, 0x08A00000))


def differing(seen: Path, not_seen: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
    """The lines of `accesses.c` whose encoding tells other bytes than QEMU saw, and how many lines
    have bytes at all."""
    wrong, right = list[str](), 0
    for line in seen.read_text().splitlines():
        word, executions, *bytes_ = line.split()
        loaded, stored, *real = map(int, bytes_)
        if any(int(word, 16) & mask == bits for mask, bits in not_seen):
            continue
        if [int(executions) * loaded, int(executions) * stored] != real:
            wrong.append(line)
        right += any(real)
    return wrong, right


@pytest.fixture(scope="module")
def watch(built: tools.Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin that has QEMU call for every access."""
    plugin = tmp_path_factory.mktemp("watch") / "accesses.so"
    source = Path(__file__).with_name("accesses.c")
    options = ["-O2", "-shared", "-fPIC", f"-I{tools.SOURCES}", str(source), "-o", str(plugin)]
    subprocess.run(["gcc", *options], check=True)
    return plugin


def test_every_kind_of_access_has_the_bytes_that_qemu_sees(
    built: tools.Tools, watch: Path, tmp_path: Path
) -> None:
    source = Path(__file__).with_name("accesses.s")
    options = ["-nostdlib", "-static", "-Wa,-march=armv8.6-a", "-Wl,-N,--no-warn-rwx-segments"]
    compile_arm(source, tmp_path / "accesses", *options)
    command = [built.program, "-cpu", "max", "-plugin", f"{watch},out={tmp_path / 'seen'}"]
    subprocess.run([*command, str(tmp_path / "accesses")], check=True)
    wrong, right = differing(tmp_path / "seen", NOT_SEEN)
    assert wrong == []
    assert right > 80


def test_a_run_of_the_model_accesses_the_bytes_that_qemu_sees(
    built: tools.Tools, watch: Path, model: Model, tmp_path: Path
) -> None:
    """Every instruction of the runner, of its libraries and of libc that one step executes."""
    made = runner.build(tools.ARCHITECTURE)
    (tmp_path / "tokens").write_text(" ".join(map(str, model.tokens)))
    subprocess.run(
        [
            built.program, "-cpu", "cortex-a76", "-plugin", f"{watch},out={tmp_path / 'seen'}",
            f"{made.folder}/lib/{made.loader}", "--library-path", f"{made.folder}/lib",
            str(made.runner), "--model", str(model.folder / model.main), "--tokens",
            str(tmp_path / "tokens"), "--depths", "0", "--steps", "1",
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wrong, right = differing(tmp_path / "seen", [*NOT_SEEN, *ATOMIC])
    assert wrong == []
    assert right > 5000


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


def test_a_longer_cache_that_is_not_filled_costs_no_instruction(
    model: Model, counted: dict[str, Any], portable_bundle: Bundle, tmp_path: Path
) -> None:
    target = portable_bundle.artifacts["executorch"].artifact.target
    longer = target.model_copy(update={"max_context": 2 * target.max_context})
    backend("executorch").lower(portable_bundle.quantized, longer, tmp_path)
    changed = replace(model, folder=tmp_path, files=(model.main,), context=longer.max_context)
    assert decode_of(changed)["per_token"] == pytest.approx(figures(counted)[1], rel=1e-3)


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


SHORT = ["prompt_lengths=[4]", "depths=[2]"]


def test_a_profile_counts_on_several_cpus_and_says_that_it_is_no_time(
    portable_bundle: Bundle, built: tools.Tools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    done = run(
        capsys, "profile", portable_bundle.path, "--device", "count:cortex-a53", "--device",
        "count:neoverse-n1", "-o", out, "--plot", plot, *SHORT,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "not a time" in done.out
    assert "executorch, neoverse-n1, decode at depth 2" in done.out
    assert plot.stat().st_size > 10_000
    result = read_result(out)
    (content,) = result.counts()
    assert [one["cpu"] for one in content["counts"]] == ["cortex-a53", "neoverse-n1"]
    hashes = portable_bundle.artifacts["executorch"].manifest["files"]
    assert content["files"] == {"model.pte": hashes["model.pte"]}
    dot_products = [one["decode"][0]["classes"]["dot_product"] for one in content["counts"]]
    assert dot_products[0] == 0 < dot_products[1]
    left_out = {one["target"]: one["status"] for one in result.content["not_counted"]}
    assert left_out == {
        target: "skipped" for target in portable_bundle.artifacts if target != "executorch"
    }


def test_a_profile_counts_what_the_counter_does(
    model: Model, portable_bundle: Bundle, tmp_path: Path
) -> None:
    overrides = ["prompt_lengths=[4,9000]", "depths=[2,250]"]
    request = profiling.Request(["count:cortex-a76"], ["executorch"], overrides)
    made = profiling.profile(portable_bundle.path, request, lambda *_: None)
    assert made.passed
    (found,) = made.report["counts"]
    reasons = {"prefill 9000": "the context is 256", "decode after 250": "the context is 256"}
    assert found.pop("not_counted") == reasons
    wanted = count(model, Settings(depths=(2,), prompts=((2, 4),)), lambda *_: None)
    assert found == wanted


def test_counts_and_times_of_one_profile_stay_apart(
    portable_bundle: Bundle, built: tools.Tools, tmp_path: Path
) -> None:
    overrides = [*SHORT, "max_repeats=1", "sustained_seconds=0", "decode_steps=2"]
    request = profiling.Request(
        ["host", "count:cortex-a76"], ["executorch"], overrides, threads=1
    )  # fmt: skip
    made = profiling.profile(portable_bundle.path, request, lambda *_: None).report
    assert [session["device"] for session in made["sessions"]] == ["host"]
    assert [one["cpu"] for one in made["counts"][0]["counts"]] == ["cortex-a76"]
    assert not any("cortex-a76" in str(session["samples"]) for session in made["sessions"])
    draw(made, tmp_path / "both.svg")
    draw({**made, "counts": []}, tmp_path / "times.svg")
    drawn = {name: (tmp_path / name).stat().st_size for name in ("both.svg", "times.svg")}
    assert drawn["both.svg"] > 1.2 * drawn["times.svg"]  # axes of their own


@pytest.mark.parametrize(
    ("bundle", "tolerance"),
    # In the portable form, XNNPACK's memory grows with the cache at each step, unless a prompt has
    # made it grow before.
    [("exact_bundle", 1e-3), ("portable_bundle", 0.02)],
)
def test_an_unfilled_cache_takes_as_many_instructions_as_a_filled_one(
    bundle: str, tolerance: float, built: tools.Tools, request: pytest.FixtureRequest
) -> None:
    """Counting at a depth does not decode up to it first."""
    model = model_of(request.getfixturevalue(bundle))
    made = runner.build(tools.ARCHITECTURE)
    with machine(built, "cortex-a76", {"runner": made.folder, "model": model.folder}) as cpu:
        (cpu.folder / "tokens.txt").write_text(" ".join(map(str, model.tokens)))

        def step(unfilled: int) -> Counter[str]:
            found = []
            for steps in ("2", "6"):
                command = [
                    f"runner/lib/{made.loader}", "--preload", f"./tools/{tools.CLOCK}",
                    "--library-path", "runner/lib", f"runner/{runner.RUNNER}", "--model",
                    f"model/{model.main}", "--tokens", "tokens.txt", "--depths", "100", "--steps",
                    steps, "--unfilled", str(unfilled), "--huge-pages", "0",
                ]  # fmt: skip
                assert execute(cpu, command, 600.0).code == 0
                found.append(sums(read_places(cpu)[-1]))
            found[1].subtract(found[0])
            return found[1]

        filled, unfilled = step(0), step(1)
    for column in ("instructions", "loaded", "stored"):
        assert unfilled[column] == pytest.approx(filled[column], rel=tolerance)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "count:apple-m9"], "CPU apple-m9: is not known to QEMU. Known: "),
        (["--device", "count:"], "--device count:: names no CPU. Give count:CPU, such as"),
        (["--device", "count:a b"], "names no CPU"),
        (["--device", "count:max", "depths=[250]", "prompt_lengths=[300]"], "has room for none"),
        (["--device", "count:max", "--target", "onnx"], "onnx: has no runner whose instructions"),
        (["--device", "count:max", "--target", "coreml"], "is not in "),
        (["--device", "count:max", "-o", "/"], "Is a folder"),
        (["--device", "count:max", "--runner", "x"], "which counts the native runner"),
        (["--device", "count:max", "--baseline", "x"], "compares times, and a count has none"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_the_reason(
    options: list[object], reason: str, portable_bundle: Bundle, built: tools.Tools,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = run(capsys, "profile", portable_bundle.path, *options)
    assert done.code == 2
    assert reason in " ".join(done.err.split())


def test_the_earlier_command_names_the_device_that_took_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = run(capsys, "count", "BUNDLE", "--cpu", "cortex-a76")
    assert done.code == 2
    assert "mobilellm profile BUNDLE --device count:cortex-a76" in done.err


def test_devices_lists_the_cpus_to_count_on(
    built: tools.Tools, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    listed = run(capsys, "devices", "--json").json["counting"]
    assert listed[:2] == ["count:cortex-a76", "count:max"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Run: apt install qemu-user" in run(capsys, "devices").out


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
        {"schema_version": 3},
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


def test_counts_of_the_first_version_have_no_bytes_and_those_of_the_second_must(
    counted: dict[str, Any],
) -> None:
    older = json.loads(json.dumps(counted))
    for phase in ("prefill", "decode"):
        del older["counts"][0][phase][0]["bytes"]
    with pytest.raises(BadDeviceError, match="'bytes' is a required property"):
        validate(older)
    validate(older | {"schema_version": 1})
