"""Verification: an artifact has the quantized checkpoint's codes and scales, and its logits.

    mobilellm verify BUNDLE

A check does not raise: each returns a list of findings with the place, the value and its limit.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exporter.backends import Artifact, Runner, backend
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import (
    CHECKSUMS,
    file_problems,
    is_bundle,
    open_bundle,
    read_checksums,
)
from exporter.errors import InputError
from exporter.evaluation.agreement import Agreement, compare_logits
from exporter.files import differing_files
from exporter.foreign import read_bytes
from exporter.inference.artifact_runner import ArtifactRunner
from exporter.inference.reference import score_each
from exporter.model.checkpoint import Checkpoint
from exporter.progress import Progress, TensorCounter
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, damaged_tensors
from exporter.quantization.schemes import QuantizedTensor
from exporter.text.documents import DATA_BYTES
from exporter.text.tokenizer import load_tokenizer

SAMPLE_TEXT = Path(__file__).parent / "evaluation" / "sample.txt"
#: Lengths of the prefills in tokens; the decode steps continue the last one.
PREFILL_LENGTHS = (1, 17, 64)
DECODE_STEPS = 128
#: Limits with float activations: mean KL in nats, top-1 disagreement, and the largest difference
#: of a logit in standard deviations of the logits.
FLOAT_KL, FLOAT_TOP1, FLOAT_DIFFERENCE = 1e-4, 0.01, 0.02
#: Added with rounded activations: this factor times the simulated error, and top-1 disagreement.
ROUNDING_FACTOR, ROUNDING_TOP1 = 2.0, 0.05


@dataclass(frozen=True)
class Check:
    """One finding; a `limit` of None means that the value is reported only."""

    check: str
    target: str | None
    subject: str
    passed: bool
    value: float
    limit: float | None
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Tokens to compare logits on; `real` is False for random tokens."""

    tokens: tuple[int, ...]
    source: str
    real: bool


def check_quantized_files(quantized: QuantizedCheckpoint) -> list[Check]:
    """The hash of every file of a quantized checkpoint; one check per file."""
    hashes = quantized.manifest["files"]
    return _file_checks(hashes, differing_files(quantized.path, hashes))


def check_bundle_files(path: Path) -> list[Check]:
    """The hash of every file of a bundle; one check per file. Raises InputError if the folder is
    not a finished bundle."""
    if not is_bundle(path):
        open_bundle(path)  # raises with the reason
    try:
        return _file_checks(read_checksums(path), file_problems(path))
    except InputError as error:  # SHA256SUMS itself is damaged
        return [Check("files", None, CHECKSUMS, False, 1, 0, error.problem)]


def _file_checks(names: Iterable[str], problems: Mapping[str, str]) -> list[Check]:
    return [
        Check(
            "files", None, name, name not in problems, name in problems, 0, problems.get(name, "")
        )
        for name in dict.fromkeys((*names, *problems))
    ]


def check_quantized(quantized: QuantizedCheckpoint) -> list[Check]:
    """Codes in range, scales on the portable grid, floats finite; one check per tensor."""
    problems = damaged_tensors(quantized)
    return [
        Check("quantized", None, name, name not in problems, 0.0, None, problems.get(name, ""))
        for name in quantized.schemes
    ]


def check_integers(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, on_tensor: Callable[[str], None]
) -> list[Check]:
    """Compare the artifact's codes and scales with the quantized checkpoint's, bit for bit."""
    artifact = finished.artifact
    target = artifact.target.target
    checks, seen = list[Check](), set[str]()
    stored: tuple[str, QuantizedTensor | Tensor] | None = None
    try:
        for name, place, weight in backend(target).weights(artifact, quantized):
            seen.add(name)
            if stored is None or stored[0] != name:  # all copies of a weight are consecutive
                stored = name, quantized.read(name)
            count, note = differences(
                stored[1], weight, ("the quantized checkpoint", "the artifact")
            )
            subject = f"{name} ({place})"
            checks.append(Check("integers", target, subject, count == 0, count, 0, note))
            on_tensor(name)
    except InputError as error:
        checks.append(Check("integers", target, error.subject, False, 1, 0, error.problem))
    except Exception as error:  # a toolkit's parser may raise anything for a damaged file
        note = f"cannot be read ({type(error).__name__}: {error})"
        checks.append(Check("integers", target, str(artifact.path), False, 1, 0, note))
    for name in quantized.schemes:
        if name not in seen:
            checks.append(Check("integers", target, name, False, 1, 0, "is not in the artifact"))
    return checks


def differences(
    expected: QuantizedTensor | Tensor, actual: QuantizedTensor | Tensor, names: tuple[str, str]
) -> tuple[int, str]:
    """The number of values that differ, and a note with the place of the first.

    `names` are those of the two models in the note, the expected one first.
    """
    if isinstance(expected, QuantizedTensor) and isinstance(actual, QuantizedTensor):
        parts = {"code": (expected.codes, actual.codes), "scale": (expected.scales, actual.scales)}
    elif isinstance(expected, Tensor) and isinstance(actual, Tensor):
        parts = {"value": (expected.to(torch.float32), actual.to(torch.float32))}
    else:
        return 1, "one is quantized, the other is not"
    total, notes = 0, list[str]()
    for kind, (wanted, got) in parts.items():
        if wanted.shape != got.shape:
            return 1, f"{kind}s have shape {list(got.shape)}, not {list(wanted.shape)}"
        # As bits, NaN equals itself and 0.0 differs from -0.0.
        different = _bits(wanted) != _bits(got)
        count = int(different.sum())
        if count:
            first = tuple(different.nonzero()[0].tolist())
            notes.append(
                f"{count} {kind}s differ; at {list(first)} {names[1]} has "
                f"{got[first].item():g}, {names[0]} {wanted[first].item():g}"
            )
        total += count
    return total, "; ".join(notes)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def verification_text(
    model: Checkpoint | QuantizedCheckpoint, context: int, file: Path | None
) -> Text:
    """The first tokens of `file`, or of the sample text; random tokens of a fixed seed if the model
    has no tokenizer. Raises InputError for a file that cannot be used."""
    wanted, vocab_size = min(PREFILL_LENGTHS[-1] + DECODE_STEPS, context), model.config.vocab_size
    if not (model.path / "tokenizer.json").is_file():
        if file is not None:
            raise InputError(file, "cannot be read without the model's tokenizer.json")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (wanted,), generator=generator)
        return Text(tuple(ids.tolist()), "seeded random tokens (there is no tokenizer)", False)
    path = file or SAMPLE_TEXT
    try:
        content = read_bytes(path, DATA_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read as text ({error})", "Give a UTF-8 file") from error
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    tokens = (bos + load_tokenizer(model.path).encode(content))[:wanted]
    if len(tokens) < min(3, wanted):
        raise InputError(path, f"gives {len(tokens)} tokens, too few to compare", "Give more text")
    if max(tokens) >= vocab_size:
        raise InputError(
            model.path / "tokenizer.json",
            f"gives token {max(tokens)}, outside the model's vocabulary of {vocab_size}",
            "The tokenizer does not belong to this model",
        )
    return Text(tuple(tokens), str(file or "the built-in sample text"), True)


#: Loads an artifact in its runtime, or in the way that the variant names.
Load = Callable[[Artifact, str], Runner]


def load_in_this_process(artifact: Artifact, variant: str) -> Runner:
    """A `Load` for artifacts of our own: a damaged one may end this process."""
    runner: Runner = backend(artifact.target.target).load(artifact, variant)
    return runner


def run_artifact(
    artifact: Artifact, text: Text, load: Load = load_in_this_process
) -> dict[str, Tensor]:
    """The logits [steps, vocab_size] of an artifact in its runtime, by the name '', and in each
    other way to run it, by its name."""
    lengths = _prefill_lengths(len(text.tokens))
    variants = "", *backend(artifact.target.target).cross_checks(artifact)
    return {
        variant: run_teacher_forced(load(artifact, variant), text.tokens, lengths)
        for variant in variants
    }


#: By target: gives the logits of `run_artifact`, or raises what it raises.
Runs = Mapping[str, Callable[[], dict[str, Tensor]]]


@contextmanager
def running(
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    damaged: Collection[str] = (),
) -> Iterator[Runs]:
    """Run the artifacts one after the other in child processes, while the block does other work.

    An artifact without a text, or with a file in `damaged`, is not run.
    """
    current: ArtifactRunner | None = None

    def load(artifact: Artifact, variant: str) -> Runner:
        nonlocal current
        current = ArtifactRunner(artifact, variant)
        return current

    pool = ThreadPoolExecutor(1)
    try:
        yield {
            target: pool.submit(run_artifact, finished.artifact, texts[target], load).result
            for target, finished in artifacts.items()
            if target in texts and not _damaged(finished, damaged)
        }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if current is not None:
            current.stop()  # if the block was left early


def check_logits(
    quantized: QuantizedCheckpoint,
    finished: FinishedArtifact,
    text: Text,
    run: Callable[[], dict[str, Tensor]] | None = None,
) -> list[Check]:
    """Compare the artifact's logits in its own runtime, prefill and decode, with the reference's.

    If the backend has other ways to run it, the runtime's logits are compared with theirs. `run`
    gives the logits of `run_artifact`; by default the artifact runs in this process.

    The torch reference has float activations. If the runtime rounds activations, the limits are
    measured: that rounding is simulated in torch on the same text, and the artifact's error may be
    `ROUNDING_FACTOR` times the simulated one. (The artifact is not compared with the simulation:
    over many layers their rounding errors become independent.)
    """
    artifact = finished.artifact
    target = artifact.target.target
    module = backend(target)
    lengths = _prefill_lengths(len(text.tokens))
    try:
        others = dict(run() if run else run_artifact(artifact, text))
        logits = others.pop("")
    except InputError as error:
        return [Check("logits", target, error.subject, False, 1, 0, error.problem)]
    except Exception as error:  # a runtime in this process may raise anything
        note = f"the runtime failed ({type(error).__name__}: {error})"
        return [Check("logits", target, str(artifact.path), False, 1, 0, note)]
    positions = [length - 1 for length in lengths] + list(range(lengths[-1], len(text.tokens)))
    activations = _LargestActivations(partial(module.largest_activation, artifact.target))
    rounding = module.rounding(quantized.schemes, artifact.target, lengths[-1])
    roundings = [None, rounding] if rounding else [None]
    reference, *simulated = score_each(quantized, text.tokens, positions, roundings, activations)
    activations("lm_head", "output", reference)
    measured = compare_logits(reference, logits)
    expected = compare_logits(reference, simulated[0]) if simulated else None
    kl, top1, difference = _limits(expected, reference.std().item(), text.real)
    largest = measured.max_difference
    steps = len(text.tokens) - lengths[-1]
    prefills = ", ".join(map(str, lengths))
    subject = f"prefill of {prefills} and {steps} decode steps on {text.source}"

    def check(name: str, value: float, passed: bool, limit: float | None, note: str) -> Check:
        return Check(f"logits.{name}", target, subject, passed, value, limit, note)

    divergences = {name: compare_logits(found, logits).kl for name, found in others.items()}
    worst = f"worst at position {positions[measured.worst]}"
    simulated_kl = f"; simulated activation rounding has KL {expected.kl:.2g}" if expected else ""
    return [
        *activations.checks(target),
        check("kl", measured.kl, measured.kl <= kl, kl, worst + simulated_kl),
        check("top1", measured.top1, top1 is None or measured.top1 >= top1, top1, ""),
        check("max_difference", largest, largest <= difference, difference, ""),
        *(check(name, value, value <= kl, kl, "") for name, value in divergences.items()),
    ]


def check_models(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    runs: Runs,
    progress: Progress,
    damaged: Collection[str] = (),
) -> list[Check]:
    """Check the quantized checkpoint, then the integers and logits of each artifact.

    `runs` are those of `running`. An artifact that it does not run fails, and the file in `damaged`
    is named.
    """
    checks = check_quantized(quantized)
    for target, finished in artifacts.items():
        counter = TensorCounter(progress, f"verify {target}: integers", len(quantized.schemes))
        checks += check_integers(quantized, finished, counter)
        stage = f"verify {target}: logits"
        progress(stage, 0, 1)
        if target in runs:
            checks += check_logits(quantized, finished, texts[target], runs[target])
            progress(stage, 1, 1)
        else:
            subject = (*_damaged(finished, damaged), *sorted(damaged), str(finished.artifact.path))
            note = "not run: the file is damaged"
            checks.append(Check("logits", target, subject[0], False, 1, 0, note))
    return checks


def _damaged(finished: FinishedArtifact, damaged: Collection[str]) -> list[str]:
    """The files of the artifact that are in `damaged`."""
    names = (f"{finished.artifact.target.target}/{name}" for name in finished.manifest["files"])
    return [name for name in names if name in damaged]


_ACTIVATION_OVERFLOW = "overflows in float16: set the target's activations to float32"
_CACHE_OVERFLOW = "overflows in the cache, which is float16 for any type of activations"


class _LargestActivations:
    """Records the largest activation of each layer in the reference, where the target has a limit.

    `limit` maps the kind of an activation to its largest allowed absolute value, or None.
    """

    def __init__(self, limit: Callable[[str], float | None]) -> None:
        self._limit = limit
        self._found = dict[str, tuple[float, float, str]]()

    def __call__(self, name: str, kind: str, values: Tensor) -> None:
        limit = self._limit(kind)
        if limit is None:
            return
        prefix, _, part = name.partition("layers.")[2].partition(".")
        layer = f"model.layers.{prefix}" if prefix else name
        largest, place = values.abs().max().item(), f"{kind} of {part or name}"
        if largest > limit:
            in_cache = kind in ("keys", "values")
            place += f"; {_CACHE_OVERFLOW if in_cache else _ACTIVATION_OVERFLOW}"
        self._found[layer] = max(self._found.get(layer, (0.0, 0.0, "")), (largest, limit, place))

    def checks(self, target: str) -> list[Check]:
        return [
            Check("range", target, layer, largest <= limit, largest, limit, place)
            for layer, (largest, limit, place) in self._found.items()
        ]


def _limits(
    expected: Agreement | None, logit_std: float, real_text: bool
) -> tuple[float, float | None, float]:
    """The largest KL, the smallest top-1 agreement and the largest difference of a logit.

    `expected` is the agreement with simulated activation rounding, None with float activations;
    `logit_std` is the standard deviation of the reference's logits. Random tokens have no top-1
    limit, because many of their top logits are nearly equal.
    """
    kl, top1, difference = FLOAT_KL, 1 - FLOAT_TOP1, FLOAT_DIFFERENCE * logit_std
    if expected is not None:
        kl += ROUNDING_FACTOR * expected.kl
        top1 = expected.top1 - ROUNDING_TOP1
        difference += ROUNDING_FACTOR * expected.max_difference
    return kl, top1 if real_text else None, difference


def run_teacher_forced(
    runner: Runner, tokens: Sequence[int], prefill_lengths: Sequence[int]
) -> Tensor:
    """Logits [steps, vocab_size]: after each prefill, then after each decode step over the tokens
    that follow the last prefill."""
    rows = [runner.prefill(list(tokens[:length])) for length in prefill_lengths]
    rows += [runner.decode(token) for token in tokens[prefill_lengths[-1] :]]
    return torch.stack(rows)


def _prefill_lengths(available: int) -> tuple[int, ...]:
    """The prefill lengths for a text of `available` tokens: at most half of it."""
    half = max(1, available // 2)
    return tuple(sorted({min(length, half) for length in PREFILL_LENGTHS}))


def failures(checks: Sequence[Check]) -> Iterator[Check]:
    """The checks that did not pass."""
    return (check for check in checks if not check.passed)
