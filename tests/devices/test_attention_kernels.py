"""The kernels of the native runner for ExecuTorch's custom attention: against float64 arithmetic,
against the official kernels, and whole programs in every runner."""

import platform
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from devices import runner

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
        done = subprocess.run(
            self.command, input=b"".join(given), capture_output=True, check=False
        )
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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    machine = platform.machine()
    built = runner.build(machine)
    out = tmp_path_factory.mktemp("driver")
    (out / "lib").symlink_to(built.folder / "lib")
    runner.compile_program(machine, DRIVER, out, out / "driver")
    return out / "driver"


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
    worst = max(worst_of(driver, cases) for cases in batches(CASES // 2, seed=int(threads)))
    print(threads, worst)
    assert worst < TOLERANCE
