"""The kernels of the native runner for ExecuTorch's custom attention: against float64 arithmetic,
against the official kernels, and whole programs in every runner."""

import json
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.extension.llm.custom_ops import custom_ops as _custom_ops  # noqa: F401
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

from devices import runner
from devices.errors import BadDeviceError
from exporter.bundle.bundle import Bundle
from exporter.text.tokenizer import load_tokenizer

QUESTION = "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?"
STEPS = 24
EMULATOR = "qemu-aarch64"
DRIVER = Path(__file__).with_name("attention_driver.cpp")
#: Against float64, in the worst element of an output that is 1 at most.
TOLERANCE = 1e-5
#: Products of a query with a key, times the width: of most cases, and of one in fifty.
SMALL, LARGE = 2e5, 4e6
CASES = 10_000
TYPES = {np.dtype(np.float32): 6, np.dtype(np.int8): 1, np.dtype(np.int64): 4}
Array = np.ndarray
Argument = Array | int | float | bool | str | None


def encoded(argument: Argument) -> bytes:
    """An argument as `attention_driver.cpp` reads it."""
    match argument:
        case None:
            return struct.pack("<q", 0)
        case bool():
            return struct.pack("<qq", 3, argument)
        case int():
            return struct.pack("<qq", 1, argument)
        case float():
            return struct.pack("<qd", 2, argument)
        case str():
            return struct.pack("<qq", 5, len(argument)) + argument.encode()
    head = struct.pack(f"<{3 + argument.ndim}q", 4, TYPES[argument.dtype], argument.ndim,
                       *argument.shape)  # fmt: skip
    return head + np.ascontiguousarray(argument).tobytes()


@dataclass(frozen=True)
class Driver:
    """The compiled driver, with the number of its threads and the kernels that it takes."""

    command: tuple[str, ...]

    def run(self, calls: Sequence[tuple[Sequence[Argument], Array]]) -> list[tuple[int, Array]]:
        """The error code and the result of each call, whose last argument is shaped like it."""
        given = list[bytes]()
        for arguments, result in calls:
            given += [struct.pack("<q", len(arguments) + 1), *map(encoded, arguments)]
            given.append(encoded(result)[: (3 + result.ndim) * 8])
        done = subprocess.run(self.command, input=b"".join(given), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        answers, at = [], 0
        for arguments, result in calls:
            changed = arguments[2] if arguments[0] == "llama::update_cache.out" else result
            assert isinstance(changed, np.ndarray)
            (code,) = struct.unpack_from("<q", done.stdout, at)
            data = np.frombuffer(done.stdout, changed.dtype, changed.size, at + 8)
            answers.append((code, data.reshape(changed.shape)))
            at += 8 + data.nbytes
        assert at == len(done.stdout)
        return answers


def compiled(built: runner.Build, machine: str, out: Path) -> Path:
    """The driver, in a folder `out` with the runner's libraries."""
    (out / "lib").symlink_to(built.folder / "lib")
    runner.compile_program(machine, DRIVER, out, out / "driver")
    return out / "driver"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    machine = platform.machine()
    return compiled(runner.build(machine), machine, tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def arm() -> runner.Build:
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"{EMULATOR} is not installed")
    try:
        return runner.build("aarch64")
    except BadDeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def arm_program(arm: runner.Build, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return emulated(arm, compiled(arm, "aarch64", tmp_path_factory.mktemp("arm")))


def emulated(built: runner.Build, program: Path) -> list[str]:
    """A command line that runs a program for Arm here, with the runner's libraries."""
    libraries = built.folder / "lib"
    loader = [str(libraries / built.loader), "--library-path", str(libraries), str(program)]
    return [EMULATOR, "-cpu", "cortex-a76", *loader]


def generated(command: Sequence[object], options: Sequence[object]) -> list[int]:
    """The tokens that the native runner writes."""
    done = subprocess.run(
        [*map(str, command), *map(str, options)], capture_output=True, text=True, check=True
    )
    phases = {line["phase"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert "end" in phases
    found: list[int] = phases["generate"]["tokens"]
    return found


@dataclass(frozen=True)
class Case:
    """Random arguments of ``llama::custom_sdpa``, whose keys beyond the filled ones are NaN."""

    q: Array
    k: Array
    v: Array
    start: int
    mask: Array | None
    causal: bool
    scale: float | None

    def call(self) -> tuple[Sequence[Argument], Array]:
        arguments = ("llama::custom_sdpa.out", self.q, self.k, self.v, self.start, self.mask, 0.0,
                     self.causal, self.scale)  # fmt: skip
        return arguments, np.empty(self.q.shape, np.float32)

    def expected(self) -> Array:
        """Softmax attention in float64: [batch, queries, heads, width]."""
        q, (_, queries, heads, width) = self.q.astype(np.float64), self.q.shape
        keys = self.k.shape[1] if self.mask is not None else self.start + queries
        k, v = (
            np.repeat(x[:, :keys].astype(np.float64), heads // x.shape[2], axis=2)
            for x in (self.k, self.v)
        )
        scale = width**-0.5 if self.scale is None else self.scale
        scores = np.matmul(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1)) * scale
        if self.mask is not None:
            scores += self.mask
        if self.causal:
            later = np.arange(keys) > self.start + np.arange(queries)[:, None]
            scores = np.where(later, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.matmul(weights, v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def random_case(random: np.random.Generator) -> Case:
    """Most cases are small; one in three is a decode step."""
    kv_heads, group = int(random.integers(1, 5)), int(random.integers(1, 7))
    width = int(random.choice([random.integers(32, 257), 32, 64, 64, 80, 96, 128, 256]))
    batch = int(random.choice([1, 1, 1, 2]))
    size = LARGE if random.random() < 0.02 else SMALL
    most = size / (batch * kv_heads * group * width)
    queries = 1 if random.random() < 1 / 3 else int(1 + min(299, most**0.5, random.exponential(25)))
    start = int(min(4096, random.exponential(300), max(0, most / queries - queries)))
    context = start + queries + int(random.integers(0, 20))
    masked = random.random() < 0.15

    def normal(tokens: int, heads: int) -> Array:
        return random.standard_normal((batch, tokens, heads, width)).astype(np.float32)

    q, k, v = (
        normal(queries, kv_heads * group),
        normal(context, kv_heads),
        normal(context, kv_heads),
    )
    mask = None
    if masked:
        mask = random.standard_normal((queries, context)).astype(np.float32)
        mask[random.random(mask.shape) < 0.3] = -np.inf
        mask[:, 0] = 0
    else:
        k[:, start + queries :] = v[:, start + queries :] = np.nan
    causal = not masked and bool(random.random() < 0.85)
    scale = None if random.random() < 0.8 else float(random.uniform(-1, 2)) * width**-0.5
    return Case(q, k, v, start, mask, causal, scale)


def batches(count: int, seed: int) -> Iterator[list[Case]]:
    """So many cases, in lists of some hundred that fit into memory."""
    random = np.random.default_rng(seed)
    for first in range(0, count, 250):
        yield [random_case(random) for _ in range(min(250, count - first))]


def worst_of(driver: Driver, cases: list[Case]) -> float:
    answers = driver.run([case.call() for case in cases])
    worst = 0.0
    for case, (code, found) in zip(cases, answers, strict=True):
        assert code == 0
        assert np.isfinite(found).all()
        worst = max(worst, float(np.abs(found - case.expected()).max()))
    return worst


@pytest.mark.parametrize("threads", ["1", "2"])
def test_attention_is_that_of_float64_for_ten_thousand_random_shapes(
    program: Path, threads: str
) -> None:
    driver = Driver((str(program), threads))
    assert max(worst_of(driver, cases) for cases in batches(CASES // 2, int(threads))) < TOLERANCE


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine_computes_it(program: Path, kernels: str) -> None:
    driver = Driver((str(program), "1", kernels))
    if subprocess.run(driver.command, input=b"", check=False).returncode == 2:
        pytest.skip(f"this CPU has no {kernels}")
    assert max(worst_of(driver, cases) for cases in batches(500, seed=3)) < TOLERANCE


def test_arm_computes_it(arm_program: list[str]) -> None:
    driver = Driver((*arm_program, "1"))
    assert max(worst_of(driver, cases) for cases in batches(250, seed=4)) < TOLERANCE


def test_the_comparison_sees_one_key_too_many(program: Path) -> None:
    random = np.random.default_rng(5)
    cases = [case for case in (random_case(random) for _ in range(60)) if case.causal]
    driver = Driver((str(program), "1"))
    filled = [replace(case, k=np.nan_to_num(case.k), v=np.nan_to_num(case.v)) for case in cases]
    for case in filled:
        if case.start + case.q.shape[1] == case.k.shape[1] or (case.scale or 1) == 0:
            continue
        later = replace(case, start=case.start + 1)
        [(_, found)] = driver.run([later.call()])
        assert np.abs(found - case.expected()).max() > 10 * TOLERANCE


def test_the_official_kernel_agrees(program: Path) -> None:
    random = np.random.default_rng(6)
    # With a negative scale theirs turns masked scores into infinite ones.
    drawn = (random_case(random) for _ in range(100))
    cases = [case for case in drawn if case.scale is None or case.scale > 0]
    answers = Driver((str(program), "1")).run([case.call() for case in cases])
    for case, (_, found) in zip(cases, answers, strict=True):
        tensors = [torch.from_numpy(x) for x in (case.q, case.k, case.v)]
        mask = None if case.mask is None else torch.from_numpy(case.mask)
        official = torch.ops.llama.custom_sdpa(
            *tensors, case.start, mask, 0.0, case.causal, case.scale
        )
        assert np.abs(found - official.numpy()).max() < 2 * TOLERANCE


def quantized(x: Array) -> tuple[Array, Array, Array]:
    """int8 codes, scales and zero points [..., 1] of each row, and not symmetric."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scales = np.maximum((high - low) / 255, 1e-6).astype(np.float32)
    zero_points = np.clip(np.round(-128 - low / scales), -128, 127).astype(np.int8)
    codes = np.clip(np.round(x / scales) + zero_points, -128, 127).astype(np.int8)
    return codes, scales, zero_points


@pytest.mark.parametrize("tokens_at_2", [False, True])
def test_attention_over_an_int8_cache_is_that_of_its_floats(
    program: Path, arm_program: list[str], tokens_at_2: bool
) -> None:
    random = np.random.default_rng(7)
    calls, expected, official = list[tuple[list[Argument], Array]](), [], []
    while len(calls) < 60:
        case = random_case(random)
        if case.mask is not None or (case.scale or 1) < 0:
            continue
        parts = [quantized(np.nan_to_num(x)) for x in (case.q, case.k, case.v)]
        floats = [
            (codes.astype(np.float32) - zero_points) * scales
            for codes, scales, zero_points in parts
        ]
        wanted = replace(case, q=floats[0], k=floats[1], v=floats[2]).expected()
        order = (0, 2, 1, 3) if tokens_at_2 else (0, 1, 2, 3)
        (q, *of_q), (k, *of_k), (v, *of_v) = (
            [np.ascontiguousarray(x.transpose(order)) for x in part] for part in parts
        )
        rest = [of_q[1], of_q[0], of_k[1], of_k[0], of_v[1], of_v[0], tokens_at_2]
        call = [q, k, v, case.start, None, 0.0, case.causal, case.scale, *rest]
        name = "llama::custom_quantized_sdpa.out"
        calls.append(([name, *call], np.empty(q.shape, np.float32)))
        expected.append(wanted.transpose(order))
        given = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in call]
        official.append(torch.ops.llama.custom_quantized_sdpa(*given).numpy())
    for command in ([str(program)], arm_program):
        answers = Driver((*command, "1")).run(calls)
        for (code, found), wanted, theirs in zip(answers, expected, official, strict=True):
            assert code == 0
            assert np.abs(found - wanted).max() < TOLERANCE
            assert np.abs(found - theirs).max() < 2 * TOLERANCE


def test_large_scores_give_finite_weights_and_a_row_without_keys_zeros(program: Path) -> None:
    random = np.random.default_rng(8)
    q, k, v = (random.standard_normal((1, n, h, 64)).astype(np.float32)
               for n, h in ((40, 6), (300, 2), (300, 2)))  # fmt: skip
    mask = np.zeros((40, 300), np.float32)
    mask[7] = -np.inf
    driver = Driver((str(program), "1"))
    large = Case(q * 1e15, k * 1e15, v, 260, None, True, None)
    hidden = Case(q, k, v, 0, mask, False, None)
    [(_, first), (_, second)] = driver.run([large.call(), hidden.call()])
    assert np.isfinite(first).all() and np.abs(first).max() <= np.abs(v).max() * (1 + TOLERANCE)
    assert (second[0, 7] == 0).all()
    others = np.delete(np.arange(40), 7)
    wanted = replace(hidden, q=q[:, others], mask=mask[others]).expected()
    assert np.abs(second[:, others] - wanted).max() < TOLERANCE


def test_a_cache_changes_at_its_new_positions_alone(program: Path) -> None:
    random = np.random.default_rng(9)
    calls, expected = list[tuple[list[Argument], Array]](), []
    for dtype in (np.float32, np.int8):
        cache = random.integers(-99, 99, (2, 30, 3, 5)).astype(dtype)
        value = random.integers(-99, 99, (2, 4, 3, 5)).astype(dtype)
        calls.append((["llama::update_cache.out", value, cache, 7], np.empty(1, np.float32)))
        after = cache.copy()
        after[:, 7:11] = value
        expected.append(after)
    for (code, found), after in zip(Driver((str(program), "1")).run(calls), expected, strict=True):
        assert code == 0
        assert (found == after).all()


INVALID = 0x12


@pytest.mark.parametrize(
    "change",
    [
        {"start": 100},
        {"start": -1},
        {"k": np.zeros((1, 20, 4, 32), np.float32)},
        {"k": np.zeros((1, 20, 2, 16), np.float32), "v": np.zeros((1, 20, 2, 16), np.float32)},
        {"v": np.zeros((1, 19, 2, 32), np.float32)},
        {"mask": np.zeros((4, 20), np.float32)},
        {"mask": np.zeros((4, 19), np.float32), "causal": False},
        {"q": np.zeros((1, 4, 6, 32), np.int8)},
        {"q": np.zeros((4, 6, 32), np.float32)},
    ],
    ids=["the start", "no position", "the keys' heads", "the width", "the values' length",
         "a mask and causal", "the mask's width", "the type", "the dimensions"],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], program: Path) -> None:
    random = np.random.default_rng(10)
    q, k, v = (random.standard_normal((1, n, h, 32)).astype(np.float32)
               for n, h in ((4, 6), (20, 2), (20, 2)))  # fmt: skip
    case = Case(q, k, v, 3, None, True, None)
    driver = Driver((str(program), "1"))
    [(good, _), (bad, found)] = driver.run([case.call(), replace(case, **change).call()])
    assert (good, bad) == (0, INVALID)
    assert (found == 0).all()


def test_one_program_writes_the_same_text_in_the_official_runner_here_and_on_arm(
    finished_bundle: Bundle, arm: runner.Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The default artifact, as it is."""
    finished = finished_bundle.artifacts["executorch"]
    assert finished.artifact.target.attention == "custom_sdpa"
    model, words = finished.artifact.path / "model.pte", finished.artifact.path / "tokenizer.json"
    tokenizer = load_tokenizer(finished.artifact.path)
    text = tokenizer.prompt_text(QUESTION, raw=False)
    prompt = tokenizer.encode(text)
    pieces = list[str]()
    official = TextLLMRunner(str(model), str(words))
    official.generate(text, GenerationConfig(echo=False, max_new_tokens=STEPS, temperature=0.0),
                      pieces.append)  # fmt: skip
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(" ".join(map(str, prompt)))
    options = ["--model", model, "--tokens", tokens, "--generate", STEPS]
    here = [runner.build(platform.machine()).runner]
    found = [generated(command, options) for command in (here, emulated(arm, arm.runner))]
    assert found[0] == found[1]
    assert len(pieces) > STEPS // 2
    assert tokenizer.decode_whole(found[0]).startswith("".join(pieces))
