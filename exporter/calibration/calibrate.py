"""The calibration of a recipe: text, sensitivity search, rounding (GPTQ) and distillation."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devices.files import cache_folder
from exporter.calibration import parallel
from exporter.calibration.cache import cache_lock
from exporter.calibration.data import CalibrationText, check_sources, hash_of, read_text
from exporter.calibration.distill import TrainingHistory, distill
from exporter.calibration.gptq import gptq_weights
from exporter.calibration.importance import token_weights
from exporter.calibration.memory import keep_freed_memory
from exporter.calibration.plots import plot_history, plot_sensitivities
from exporter.calibration.self_generation import read_prompts, self_generated_text
from exporter.calibration.sensitivity import (
    Sensitivity,
    check_budget,
    choose_int8_weights,
    model_bits,
    parse_budget,
    sensitivities,
)
from exporter.calibration.settings import Calibration
from exporter.calibration.student import Student
from exporter.calibration.teacher import Teacher, open_teacher
from exporter.errors import InputError
from exporter.files import read_json, replacing, write_json
from exporter.model.checkpoint import Checkpoint
from exporter.progress import Progress
from exporter.quantization.activations import round_rows_to_int8
from exporter.quantization.gptq import GptqResult
from exporter.quantization.quantized_checkpoint import source_hashes
from exporter.quantization.rounding import quantize
from exporter.quantization.schemes import (
    FLOAT,
    QuantizedTensor,
    Scheme,
    entry_name,
    pack_entries,
    unpack_entry,
)
from exporter.quantization.settings import Quantization
from exporter.tensors import open_own, write_tensors

START, IDENTITY = "start.safetensors", "identity.json"
#: Entry of `START`, next to the parts of the scheme: the float weight that was rounded.
_WEIGHT = "weight"

#: Format of the folder of an unfinished run. Format 1 had unpacked codes.
_FOLDER_FORMAT = 2


@dataclass(frozen=True)
class WeightRounding:
    """Rounds the weights, as the result or as the initial weights of a distillation."""

    checkpoint: Checkpoint
    method: str
    calibration: Calibration
    text: CalibrationText
    precision: torch.dtype
    progress: Progress

    def __call__(self, schemes: Mapping[str, Scheme]) -> dict[str, GptqResult]:
        """The rounding of every weight that `schemes` quantizes, by name."""
        quantized = {name: scheme for name, scheme in schemes.items() if scheme != FLOAT}
        if self.method == "gptq":
            weights = self._token_weights
            rounded = gptq_weights(self.checkpoint, schemes, self.tokens, self.precision, weights)
            on_step = partial(self.progress, "gptq")
        else:
            rounded = self._round_independently(quantized)
            on_step = partial(self.progress, "round")
        results = dict[str, GptqResult]()
        for name, result in rounded:
            results[name] = result
            on_step(len(results), len(quantized), name)
        return results

    def _round_independently(
        self, schemes: Mapping[str, Scheme]
    ) -> Iterator[tuple[str, GptqResult]]:
        """Round each weight by itself (`absmax` or `mse`); needs no calibration text."""
        for name, scheme in schemes.items():
            weight = self.checkpoint.float_weight(name)
            yield name, GptqResult(quantize(weight, scheme, self.method), weight)

    @property
    def tokens(self) -> Tensor:
        """The calibration tokens of GPTQ: [gptq_sequences, sequence_length]."""
        return self.text.train(self.calibration.gptq_sequences)

    @cached_property
    def _token_weights(self) -> dict[str, Tensor]:
        """Independent of the schemes, so the sensitivity search and the final rounding share
        them."""
        seed, on_step = self.calibration.seed, partial(self.progress, "weigh tokens")
        return token_weights(self.checkpoint, self.tokens, self.precision, seed, on_step)


@dataclass(frozen=True)
class CalibrationInputs:
    """The inputs of a calibration, complete before any weight is rounded.

    `source` and `teacher_source` are the hashes of the checkpoint's and of the teacher's files.
    `int8_weights` names the weights that the budget stores as int8, chosen from `sensitivities`.
    """

    calibration: Calibration
    method: str
    rounding: WeightRounding
    text: CalibrationText
    precision: torch.dtype
    source: Mapping[str, str]
    teacher: Checkpoint
    teacher_source: Mapping[str, str]
    sensitivities: tuple[Sensitivity, ...]
    int8_weights: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Every calibration setting and input that decides the integers, for the manifest."""
        other = self.teacher_source != self.source
        return {
            **self.calibration.identity(),
            **({"teacher": dict(self.teacher_source)} if other else {}),
            "precision": str(self.precision).removeprefix("torch."),
            "text": self.text.identity(),
            "processes": parallel.world_size(),
            "wider": list(self.int8_weights),
        }


def calibration_inputs(
    checkpoint: Checkpoint,
    quantization: Quantization,
    calibration: Calibration,
    schemes: Mapping[str, Scheme],
    source: Mapping[str, str],
    progress: Progress,
) -> CalibrationInputs:
    """Read or generate the calibration text, and run the sensitivity search if there is a budget.

    `source` has the hashes of the checkpoint's files. Generated text and measured sensitivities
    are cached. Raises InputError.
    """
    keep_freed_memory()
    _check_length(calibration, checkpoint)
    check_sources(calibration)
    for text_source in calibration.data:
        if text_source.prompts:
            read_prompts(Path(text_source.prompts), text_source.field)
    teacher = open_teacher(calibration, checkpoint)
    precision = _precision(calibration)
    budget, used, subject = 0, model_bits(schemes, checkpoint.config), "quantization.budget"
    if quantization.budget:
        budget = parse_budget(quantization.budget, subject, checkpoint.config)
        check_budget(used, budget, subject)
    if parallel.rank():
        parallel.barrier()  # until the first process has written the cache
    on_text = partial(progress, "write calibration text")
    text = read_text(
        checkpoint,
        calibration,
        [
            self_generated_text(checkpoint, text_source, calibration, precision, source, on_text)
            for text_source in calibration.data
            if text_source.self_generated
        ],
    )
    method = quantization.method
    rounded_by = calibration.start if method == "distill" else method
    rounding = WeightRounding(checkpoint, rounded_by, calibration, text, precision, progress)
    measured, int8_weights = tuple[Sensitivity, ...](), tuple[str, ...]()
    if budget:
        measured = _sensitivities(rounding, schemes, source)
        int8_weights = choose_int8_weights(measured, used, budget, subject)
    if not parallel.rank():
        parallel.barrier()
    teacher_source = source if teacher is checkpoint else source_hashes(teacher)
    return CalibrationInputs(
        calibration,
        method,
        rounding,
        text,
        precision,
        source,
        teacher,
        teacher_source,
        measured,
        int8_weights,
    )


def _check_length(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Refuse sequences longer than the model's positions. Raises InputError."""
    limit = checkpoint.config.max_position_embeddings
    if calibration.sequence_length > limit:
        raise InputError(
            "calibration.sequence_length",
            f"{calibration.sequence_length} is more than the model's {limit}",
            "Lower it",
        )


def _precision(calibration: Calibration) -> torch.dtype:
    """The type of matrix products; `auto` is bfloat16 if the processor has AVX512-BF16."""
    if calibration.precision == "auto":
        supported = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if supported else torch.float32
    return torch.bfloat16 if calibration.precision == "bfloat16" else torch.float32


def _sensitivities(
    rounding: WeightRounding, schemes: Mapping[str, Scheme], source: Mapping[str, str]
) -> tuple[Sensitivity, ...]:
    """The sensitivities from the cache, or measured and cached."""
    calibration, method, precision = rounding.calibration, rounding.method, rounding.precision
    tokens = rounding.text.train(calibration.sensitivity_sequences)
    gptq_tokens = rounding.tokens.tolist() if method == "gptq" else []
    plan = {name: str(scheme) for name, scheme in schemes.items()}
    parts = source, plan, method, tokens.tolist(), gptq_tokens, calibration.seed, str(precision)
    path = cache_folder() / f"{hash_of('sensitivity', *parts)}.json"
    if cached := _cached_sensitivities(path):
        return cached
    on_step = partial(rounding.progress, "measure sensitivity")
    with cache_lock(path, on_step):
        if cached := _cached_sensitivities(path):
            return cached
        rounded = {name: result.rounded for name, result in rounding(schemes).items()}
        measured = sensitivities(rounding.checkpoint, rounded, tokens, precision, on_step)
        write_json(path, {"sensitivities": [asdict(entry) for entry in measured]})
        return tuple(measured)


def _cached_sensitivities(path: Path) -> tuple[Sensitivity, ...]:
    """Empty if the file is missing or damaged."""
    with suppress(InputError, KeyError, TypeError):
        return tuple(Sensitivity(**entry) for entry in read_json(path)["sensitivities"])
    return ()


@dataclass(frozen=True)
class CalibrationResult:
    """The quantized weights by name, and the report files: name → content."""

    weights: Mapping[str, QuantizedTensor]
    reports: Mapping[str, bytes]


def calibrate(
    checkpoint: Checkpoint,
    inputs: CalibrationInputs,
    schemes: Mapping[str, Scheme],
    folder: Path,
    progress: Progress,
) -> CalibrationResult:
    """Quantize every weight by the recipe's method.

    `folder` holds the training state, from which a later call resumes after a kill.
    """
    quantized = {name: scheme for name, scheme in schemes.items() if scheme != FLOAT}
    calibration, text, precision = inputs.calibration, inputs.text, inputs.precision
    history = None
    if inputs.method == "distill":
        if not parallel.rank():
            _keep_or_clear(folder, {"source": inputs.source, **inputs.identity()}, quantized)
            if not (folder / START).is_file():
                _save(folder / START, inputs.rounding(schemes))
        parallel.barrier()
        initial = _load(folder / START, quantized)
        rounding = round_rows_to_int8 if calibration.activations == "int8" else None
        distilled = distill(
            Student(checkpoint, initial, calibration.sequence_length, rounding),
            Teacher(inputs.teacher, calibration, _teacher_cache(inputs)),
            calibration,
            text,
            folder,
            precision,
            partial(progress, "distil"),
        )
        weights, history = distilled.weights, distilled.history
    else:
        weights = {name: result.rounded for name, result in inputs.rounding(schemes).items()}
    return CalibrationResult(weights, _reports(inputs, history))


def _teacher_cache(inputs: CalibrationInputs) -> Path | None:
    """The cache folder of the teacher's logits; None if they are not cached."""
    calibration = inputs.calibration
    if not calibration.cache_teacher:
        return None
    settings = calibration.top_k, calibration.temperature, str(inputs.precision)
    return cache_folder() / hash_of("teacher", inputs.teacher_source, settings)


def _keep_or_clear(
    folder: Path, identity: Mapping[str, Any], schemes: Mapping[str, Scheme]
) -> None:
    """Keep the training state in `folder` if it belongs to this calibration; else delete it."""
    names = {name: str(scheme) for name, scheme in schemes.items()}
    content = {"format": _FOLDER_FORMAT, **identity, "schemes": names}
    expected = json.loads(json.dumps(content))  # tuples become lists, as in the file
    with suppress(InputError):
        if read_json(folder / IDENTITY) == expected:
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / IDENTITY, expected)


def _save(path: Path, initial: Mapping[str, GptqResult]) -> None:
    entries = pack_entries({name: result.rounded for name, result in initial.items()})
    weights = {entry_name(name, _WEIGHT): result.weight for name, result in initial.items()}
    write_tensors(path, entries | weights)


def _load(path: Path, schemes: Mapping[str, Scheme]) -> dict[str, GptqResult]:
    with open_own(path) as file:
        return {
            name: GptqResult(
                unpack_entry(name, scheme, file.get_tensor),
                file.get_tensor(entry_name(name, _WEIGHT)),
            )
            for name, scheme in schemes.items()
        }


def _reports(inputs: CalibrationInputs, history: TrainingHistory | None) -> dict[str, bytes]:
    """The loss history and the sensitivities, each as JSON and as a plot: file name → content."""
    reports = dict[str, bytes]()
    if history is not None:
        reports["distillation.json"] = _json(asdict(history) | {"best": asdict(history.best)})
        reports["distillation.png"] = plot_history(history)
    if inputs.sensitivities:
        rows = [
            asdict(entry) | {"wider": entry.name in inputs.int8_weights}
            for entry in inputs.sensitivities
        ]
        reports["sensitivity.json"] = _json({"sensitivities": rows})
        reports["sensitivity.png"] = plot_sensitivities(inputs.sensitivities, inputs.int8_weights)
    return reports


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_reports(folder: Path, reports: Mapping[str, bytes]) -> list[Path]:
    """Write the reports into `folder`, which is created; returns their paths."""
    for name, content in reports.items():
        with replacing(folder / name) as file:
            file.write(content)
    return [folder / name for name in reports]
