"""The logits of an artifact, compared with those of the torch reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from exporter.backends import backend
from exporter.bundle.artifact import FinishedArtifact
from exporter.errors import InputError
from exporter.evaluation.agreement import Agreement, compare_logits
from exporter.inference.reference import score_each
from exporter.quantization.activations import Roundings
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.verification.checks import Check
from exporter.verification.runs import Text

#: Limits with float activations: mean KL in nats, top-1 disagreement, and the largest difference
#: of a logit in standard deviations of the logits.
FLOAT_KL, FLOAT_TOP1, FLOAT_DIFFERENCE = 1e-4, 0.01, 0.02
#: Added with rounded activations: this factor times the simulated error, and top-1 disagreement.
ROUNDING_FACTOR, ROUNDING_TOP1 = 2.0, 0.05


@dataclass(frozen=True)
class Reference:
    """The logits [steps, vocab_size] of the torch reference for one artifact, in float and, if its
    runtime rounds activations or the cache, with that rounding simulated. `ranges` are the checks
    of the largest activations."""

    logits: Tensor
    simulated: Tensor | None
    ranges: Sequence[Check]


def reference_logits(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
) -> dict[str, Reference]:
    """The reference of each artifact. Those with the same text share a pass over the weights."""
    found = dict[str, Reference]()
    for text in dict.fromkeys(texts[target] for target in artifacts):
        targets = [target for target in artifacts if texts[target] == text]
        ranges, roundings = dict[str, _LargestActivations](), dict[str, Roundings]()
        for target in targets:
            module, options = backend(target), artifacts[target].artifact.target
            ranges[target] = _LargestActivations(partial(module.largest_activation, options))
            rounding = Roundings(
                module.rounding(quantized.schemes, options, text.prefill_lengths[-1]),
                module.cache_rounding(options),
            )
            if rounding:
                roundings[target] = rounding

        def observe(name: str, kind: str, values: Tensor, ranges: Any = ranges) -> None:
            for one in ranges.values():
                one(name, kind, values)

        logits, *simulated = score_each(
            quantized, text.tokens, text.positions, [Roundings(), *roundings.values()], observe
        )
        observe("lm_head", "output", logits)
        rounded = dict(zip(roundings, simulated, strict=True))
        for target in targets:
            checks = ranges[target].checks(target)
            found[target] = Reference(logits, rounded.get(target), checks)
    return found


def compare_with_reference(
    finished: FinishedArtifact,
    text: Text,
    reference: Reference,
    run: Callable[[], Mapping[str, Tensor]],
) -> list[Check]:
    """Compare the artifact's logits in its own runtime, prefill and decode, with the reference's.

    `run` gives the logits of `run_artifact`. If the backend has other ways to run the artifact,
    their logits are compared with the runtime's.

    The torch reference has float activations. If the runtime rounds activations or its cache, the
    limits are measured: that rounding is simulated in torch on the same text, and the artifact's
    error may be `ROUNDING_FACTOR` times the simulated one. (The artifact is not compared with the
    simulation: over many layers their rounding errors become independent.)
    """
    artifact = finished.artifact
    target = artifact.target.target
    try:
        others = dict(run())
        logits = others.pop("")
    except InputError as error:
        return [Check("logits", target, error.subject, False, 1, 0, error.problem)]
    except Exception as error:  # a runtime in this process may raise anything
        note = f"the runtime failed ({type(error).__name__}: {error})"
        return [Check("logits", target, str(artifact.path), False, 1, 0, note)]
    measured, expected = compare_logits(reference.logits, logits), None
    if reference.simulated is not None:
        expected = compare_logits(reference.logits, reference.simulated)
    kl, top1, difference = _limits(expected, reference.logits.std().item(), text.real)
    largest = measured.max_difference
    prefills = ", ".join(map(str, text.prefill_lengths))
    steps = len(text.tokens) - text.prefill_lengths[-1]
    subject = f"prefill of {prefills} and {steps} decode steps on {text.source}"

    def check(name: str, value: float, passed: bool, limit: float | None, note: str) -> Check:
        return Check(f"logits.{name}", target, subject, passed, value, limit, note)

    divergences = {name: compare_logits(found, logits).kl for name, found in others.items()}
    worst = f"worst at position {text.positions[measured.worst]}"
    simulated_kl = f"; simulated activation rounding has KL {expected.kl:.2g}" if expected else ""
    return [
        *reference.ranges,
        check("kl", measured.kl, measured.kl <= kl, kl, worst + simulated_kl),
        check("top1", measured.top1, top1 is None or measured.top1 >= top1, top1, ""),
        check("max_difference", largest, largest <= difference, difference, ""),
        *(check(name, value, value <= kl, kl, "") for name, value in divergences.items()),
    ]


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
