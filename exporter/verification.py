"""Proof that an artifact has the same integers and, as near as it must be, the same logits.

    mobilellm verify BUNDLE

A check never raises for what it finds: everything found is in the list, with where and how much.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exporter.backends import Runner, backend
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import SEAL, file_problems, is_bundle, open_bundle, sealed_files
from exporter.errors import InputError
from exporter.evaluation.agreement import Agreement, compare_logits
from exporter.files import differing_files
from exporter.inference.reference import score_each
from exporter.model.checkpoint import Checkpoint
from exporter.progress import Progress, TensorCounter
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, damaged_tensors
from exporter.quantization.schemes import QuantizedTensor
from exporter.text.tokenizer import load_tokenizer

SAMPLE_TEXT = Path(__file__).parent / "evaluation" / "sample.txt"
#: Prefill is tried at these lengths; from the last of them the text is continued by decoding.
PREFILL_LENGTHS = (1, 17, 64)
DECODE_STEPS = 128
#: With float activations: KL in nats, share of other choices, difference in standard deviations.
EXACT_KL, EXACT_TOP1, EXACT_DIFFERENCE = 1e-4, 0.01, 0.02
#: With int8 activations, on top of that: how many times the simulated cost is allowed.
NOISE, NOISE_TOP1 = 2.0, 0.05


@dataclass(frozen=True)
class Check:
    """One finding; `limit` None means that the value is only reported."""

    check: str
    target: str | None
    subject: str
    passed: bool
    value: float
    limit: float | None
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Tokens to compare logits on; `real` when they come from text and not from a generator."""

    tokens: tuple[int, ...]
    source: str
    real: bool


def check_quantized_files(quantized: QuantizedCheckpoint) -> list[Check]:
    """The hash of every file of a quantized checkpoint; one check a file."""
    hashes = quantized.manifest["files"]
    return _file_checks(tuple(hashes), differing_files(quantized.path, hashes))


def check_bundle_files(path: Path) -> list[Check]:
    """The hash of every file of a bundle; one check a file. Raises InputError where there is no
    bundle."""
    if not is_bundle(path):
        open_bundle(path)  # says why not
    try:
        return _file_checks(sealed_files(path), file_problems(path))
    except InputError as error:  # the seal itself is damaged
        return [Check("files", None, SEAL, False, 1, 0, error.problem)]


def _file_checks(names: tuple[str, ...], problems: Mapping[str, str]) -> list[Check]:
    return [
        Check(
            "files", None, name, name not in problems, name in problems, 0, problems.get(name, "")
        )
        for name in dict.fromkeys((*names, *problems))
    ]


def check_quantized(quantized: QuantizedCheckpoint) -> list[Check]:
    """Codes in range, scales on the portable grid, floats finite; one check a tensor."""
    problems = damaged_tensors(quantized)
    return [
        Check("quantized", None, name, name not in problems, 0.0, None, problems.get(name, ""))
        for name in quantized.schemes
    ]


def check_integers(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, on_tensor: Callable[[str], None]
) -> list[Check]:
    """Codes and scales of the artifact against the quantized checkpoint, bit for bit."""
    artifact = finished.artifact
    target = artifact.target.target
    checks, seen = list[Check](), set[str]()
    stored: tuple[str, QuantizedTensor | Tensor] | None = None
    try:
        for name, place, found in backend(target).weights(artifact, quantized):
            seen.add(name)
            if stored is None or stored[0] != name:  # table and filter of one weight follow
                stored = name, quantized.read(name)
            count, note = _differences(stored[1], found)
            subject = f"{name} ({place})"
            checks.append(Check("integers", target, subject, count == 0, count, 0, note))
            on_tensor(name)
    except InputError as error:
        checks.append(Check("integers", target, error.subject, False, 1, 0, error.problem))
    except Exception as error:  # a damaged file can break its toolkit's parser in any way
        note = f"cannot be read ({type(error).__name__}: {error})"
        checks.append(Check("integers", target, str(artifact.path), False, 1, 0, note))
    for name in quantized.schemes:
        if name not in seen:
            checks.append(Check("integers", target, name, False, 1, 0, "was not found in it"))
    return checks


def _differences(
    expected: QuantizedTensor | Tensor, found: QuantizedTensor | Tensor
) -> tuple[int, str]:
    """How many values differ, and the first of them in words."""
    if isinstance(expected, QuantizedTensor) and isinstance(found, QuantizedTensor):
        parts = {"code": (expected.codes, found.codes), "scale": (expected.scales, found.scales)}
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        parts = {"value": (expected.to(torch.float32), found)}
    else:
        return 1, "one is quantized, the other is not"
    total, notes = 0, list[str]()
    for kind, (wanted, got) in parts.items():
        if wanted.shape != got.shape:
            return 1, f"{kind}s have shape {list(got.shape)}, not {list(wanted.shape)}"
        # Compared as bits: NaN equals itself, and 0.0 is not -0.0.
        different = _bits(wanted) != _bits(got)
        count = int(different.sum())
        if count:
            first = tuple(different.nonzero()[0].tolist())
            notes.append(
                f"{count} {kind}s differ; at {list(first)} it is {got[first].item():g}, "
                f"the quantized checkpoint has {wanted[first].item():g}"
            )
        total += count
    return total, "; ".join(notes)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def verification_text(
    model: Checkpoint | QuantizedCheckpoint, context: int, file: Path | None
) -> Text:
    """The first tokens of `file`, or of the sample; seeded random ones without a tokenizer."""
    wanted, vocab_size = min(PREFILL_LENGTHS[-1] + DECODE_STEPS, context), model.config.vocab_size
    if not (model.path / "tokenizer.json").is_file():
        if file is not None:
            raise InputError(file, "cannot be read without the model's tokenizer.json")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (wanted,), generator=generator)
        return Text(tuple(ids.tolist()), "seeded random tokens (there is no tokenizer)", False)
    path = file or SAMPLE_TEXT
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read as text ({error})", "Give a UTF-8 file") from error
    begin = [] if model.bos_token_id is None else [model.bos_token_id]
    tokens = (begin + load_tokenizer(model.path).encode(content))[:wanted]
    if len(tokens) < min(3, wanted):
        raise InputError(path, f"gives {len(tokens)} tokens, too few to compare", "Give more text")
    if max(tokens) >= vocab_size:
        raise InputError(
            model.path / "tokenizer.json",
            f"gives token {max(tokens)}, outside the model's vocabulary of {vocab_size}",
            "The tokenizer does not belong to this model",
        )
    return Text(tuple(tokens), str(file or "the built-in sample text"), True)


def check_logits(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, text: Text
) -> list[Check]:
    """The artifact in its own runtime against the torch reference: prefill, then decoding; and
    against the reference interpreter, where there is one of what that runtime runs.

    The reference has float activations. Where the runtime rounds them to int8, the limits are
    measured: simulating that rounding in torch gives what it must cost on this text, and the
    artifact may cost `NOISE` times as much. (The artifact and the simulation are not compared
    with each other: over many layers their roundings part, and they differ like two samples.)
    """
    artifact = finished.artifact
    target = artifact.target.target
    module = backend(target)
    lengths = _prefill_lengths(len(text.tokens))
    try:
        logits = run_teacher_forced(module.load(artifact), text.tokens, lengths)
        interpreter = module.cross_check(artifact)
        opinion = run_teacher_forced(interpreter, text.tokens, lengths) if interpreter else logits
    except Exception as error:  # the runtimes raise what they like
        note = f"the runtime failed ({type(error).__name__}: {error})"
        return [Check("logits", target, str(artifact.path), False, 1, 0, note)]
    positions = [length - 1 for length in lengths] + list(range(lengths[-1], len(text.tokens)))
    activations = _LargestActivations(partial(module.largest_activation, artifact.target))
    rounding = module.rounding(quantized.schemes, artifact.target, lengths[-1])
    roundings = [None, rounding] if rounding else [None]
    reference, *simulated = score_each(quantized, text.tokens, positions, roundings, activations)
    activations("lm_head", "output", reference)
    found = compare_logits(reference, logits)
    expected = compare_logits(reference, simulated[0]) if simulated else None
    kl, top1, difference = _limits(expected, reference.std().item(), text.real)
    largest = found.max_difference
    steps = len(text.tokens) - lengths[-1]
    prefills = ", ".join(map(str, lengths))
    subject = f"prefill of {prefills} and {steps} decode steps on {text.source}"

    def check(name: str, value: float, passed: bool, limit: float | None, note: str) -> Check:
        return Check(f"logits.{name}", target, subject, passed, value, limit, note)

    apart = compare_logits(opinion, logits).kl
    second = [check("interpreter", apart, apart <= kl, kl, "")] if interpreter else []
    worst = f"worst at position {positions[found.worst]}"
    simulated_kl = f"; rounded activations simulated cost {expected.kl:.2g}" if expected else ""
    return [
        *activations.checks(target),
        check("kl", found.kl, found.kl <= kl, kl, worst + simulated_kl),
        check("top1", found.top1, top1 is None or found.top1 >= top1, top1, ""),
        check("max_difference", largest, largest <= difference, difference, ""),
        *second,
    ]


def check_models(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    progress: Progress,
    damaged: Collection[str] = (),
) -> list[Check]:
    """Quantized checkpoint, integers and logits; a `damaged` file never reaches a runtime."""
    checks = check_quantized(quantized)
    for target, finished in artifacts.items():
        counter = TensorCounter(progress, f"verify {target}: integers", len(quantized.schemes))
        checks += check_integers(quantized, finished, counter)
        stage = f"verify {target}: logits"
        progress(stage, 0, 1)
        needed = [f"{target}/{name}" for name in finished.manifest["files"]]
        broken = [name for name in needed if name in damaged]
        if broken or target not in texts:
            subject = (broken or sorted(damaged))[0]
            note = "not run: the file is damaged"
            checks.append(Check("logits", target, subject, False, 1, 0, note))
            continue
        checks += check_logits(quantized, finished, texts[target])
        progress(stage, 1, 1)
    return checks


_WIDER = "overflows in float16: set the target's activations to float32"
_CACHED = "overflows in the cache, which is float16 whatever the activations are"


class _LargestActivations:
    """The largest activation of each layer in the reference, of those that have a limit."""

    def __init__(self, limit: Callable[[str], float | None]) -> None:
        self._limit = limit
        self._found = dict[str, tuple[float, float, str]]()

    def __call__(self, name: str, which: str, values: Tensor) -> None:
        limit = self._limit(which)
        if limit is None:
            return
        prefix, _, part = name.partition("layers.")[2].partition(".")
        layer = f"model.layers.{prefix}" if prefix else name
        largest, place = values.abs().max().item(), f"{which} of {part or name}"
        if largest > limit:
            place += f"; {_CACHED if which in ('keys', 'values') else _WIDER}"
        self._found[layer] = max(self._found.get(layer, (0.0, 0.0, "")), (largest, limit, place))

    def checks(self, target: str) -> list[Check]:
        return [
            Check("range", target, layer, largest <= limit, largest, limit, place)
            for layer, (largest, limit, place) in self._found.items()
        ]


def _limits(
    expected: Agreement | None, spread: float, real_text: bool
) -> tuple[float, float | None, float]:
    """Largest KL, least top-1 agreement, largest difference; `spread` is that of the logits.

    Random tokens have no top-1 limit: they leave so many near ties that it would mean nothing.
    """
    kl, top1, difference = EXACT_KL, 1 - EXACT_TOP1, EXACT_DIFFERENCE * spread
    if expected is not None:
        kl += NOISE * expected.kl
        top1 = expected.top1 - NOISE_TOP1
        difference += NOISE * expected.max_difference
    return kl, top1 if real_text else None, difference


def run_teacher_forced(
    runner: Runner, tokens: Sequence[int], prefill_lengths: Sequence[int]
) -> Tensor:
    """Logits after each prefill, and after every further token from the last one on."""
    rows = [runner.prefill(list(tokens[:length])) for length in prefill_lengths]
    rows += [runner.decode(token) for token in tokens[prefill_lengths[-1] :]]
    return torch.stack(rows)


def _prefill_lengths(available: int) -> tuple[int, ...]:
    """Lengths that leave at least half of a short text for decoding."""
    half = max(1, available // 2)
    return tuple(sorted({min(length, half) for length in PREFILL_LENGTHS}))


def failures(checks: Sequence[Check]) -> Iterator[Check]:
    return (check for check in checks if not check.passed)
