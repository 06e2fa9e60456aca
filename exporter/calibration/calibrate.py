"""A whole calibration: text, sensitivities, GPTQ and distillation, in the order of a recipe."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
from exporter.calibration.self_generation import read_prompts, written_text
from exporter.calibration.sensitivity import (
    Sensitivity,
    check_budget,
    model_bits,
    parse_budget,
    search,
    sensitivities,
)
from exporter.calibration.settings import Calibration
from exporter.calibration.student import Student
from exporter.calibration.teacher import Teacher, open_teacher
from exporter.errors import InputError
from exporter.files import read_json, replacing, write_json, write_tensors
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

START, IDENTITY = "start.safetensors", "identity.json"
#: In `START`, beside the parts of a scheme: the float weight that was rounded.
_WEIGHT = "weight"

#: Of what lies in the folder of an unfinished run. In format 1, codes and scales lay unpacked.
_FOLDER_FORMAT = 2


@dataclass(frozen=True)
class WeightRounding:
    """How weights are rounded, before distillation where there is one."""

    checkpoint: Checkpoint
    method: str
    calibration: Calibration
    text: CalibrationText
    precision: torch.dtype
    progress: Progress

    def __call__(self, schemes: Mapping[str, Scheme]) -> dict[str, GptqResult]:
        """Every weight that `schemes` quantizes."""
        quantized = {name: scheme for name, scheme in schemes.items() if scheme != FLOAT}
        if self.method == "gptq":
            weights = self._token_weights
            each = gptq_weights(self.checkpoint, schemes, self.tokens, self.precision, weights)
            on_step = partial(self.progress, "gptq")
        else:
            each = self._one_by_one(quantized)
            on_step = partial(self.progress, "round")
        found = dict[str, GptqResult]()
        for name, one in each:
            found[name] = one
            on_step(len(found), len(quantized), name)
        return found

    def _one_by_one(self, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, GptqResult]]:
        """Each weight without a look at the others or at the text."""
        for name, scheme in schemes.items():
            weight = self.checkpoint.float_weight(name)
            yield name, GptqResult(quantize(weight, scheme, self.method), weight)

    @property
    def tokens(self) -> Tensor:
        """What GPTQ fits weights to: [sequences, seq]."""
        return self.text.train(self.calibration.gptq_sequences)

    @cached_property
    def _token_weights(self) -> dict[str, Tensor]:
        """They do not depend on schemes: worked out once, also where a search rounds first."""
        seed, on_step = self.calibration.seed, partial(self.progress, "weigh tokens")
        return token_weights(self.checkpoint, self.tokens, self.precision, seed, on_step)


@dataclass(frozen=True)
class CalibrationInputs:
    """All that is known before any weight is rounded.

    `source` and `teacher_source` are the hashes of the checkpoint's and of the teacher's files;
    `wider` names the weights to which a budget gives 8 bits, after their `sensitivities`.
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
    wider: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Everything of the calibration that decides the integers, for the manifest."""
        settings = self.calibration.model_dump()
        del settings["data"], settings["cache_teacher"], settings["teacher"]
        other = self.teacher_source != self.source
        return {
            **settings,
            **({"teacher": dict(self.teacher_source)} if other else {}),
            "precision": str(self.precision).removeprefix("torch."),
            "text": self.text.identity(),
            "processes": parallel.world_size(),
            "wider": list(self.wider),
        }


def calibration_inputs(
    checkpoint: Checkpoint,
    quantization: Quantization,
    calibration: Calibration,
    schemes: Mapping[str, Scheme],
    source: Mapping[str, str],
    progress: Progress,
) -> CalibrationInputs:
    """Read the text, or let the checkpoint write it, and search where there is a budget.

    `source` has the hashes of the checkpoint's files. What takes long comes out of the cache when
    it was done before. Raises InputError.
    """
    keep_freed_memory()
    _check_length(calibration, checkpoint)
    check_sources(calibration)
    for one in calibration.data:
        if one.prompts:
            read_prompts(Path(one.prompts), one.field)
    teacher = open_teacher(calibration, checkpoint)
    precision = _precision(calibration)
    budget, used, subject = 0, model_bits(schemes, checkpoint.config), "quantization.budget"
    if quantization.budget:
        budget = parse_budget(quantization.budget, subject, checkpoint.config)
        check_budget(used, budget, subject)
    if parallel.rank():
        parallel.wait_for_all()  # until the first process has written the cache
    on_text = partial(progress, "write calibration text")
    text = read_text(
        checkpoint,
        calibration,
        [
            written_text(checkpoint, one, calibration, precision, source, on_text)
            for one in calibration.data
            if one.self_generated
        ],
    )
    method = quantization.method
    rounded_by = calibration.start if method == "distill" else method
    rounding = WeightRounding(checkpoint, rounded_by, calibration, text, precision, progress)
    found, wider = tuple[Sensitivity, ...](), tuple[str, ...]()
    if budget:
        found = _sensitivities(rounding, schemes, source)
        wider = search(found, used, budget, subject)
    if not parallel.rank():
        parallel.wait_for_all()
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
        found,
        wider,
    )


def _check_length(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Refuse sequences that the model was not made for. Raises InputError."""
    longest = checkpoint.config.max_position_embeddings
    if calibration.sequence_length > longest:
        raise InputError(
            "calibration.sequence_length",
            f"{calibration.sequence_length} is more than the model's {longest}",
            "Lower it",
        )


def _precision(calibration: Calibration) -> torch.dtype:
    """The type of matrix products: bfloat16 where the processor multiplies it."""
    if calibration.precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if calibration.precision == "bfloat16" else torch.float32


def _sensitivities(
    rounding: WeightRounding, schemes: Mapping[str, Scheme], source: Mapping[str, str]
) -> tuple[Sensitivity, ...]:
    """Measured, or as they were measured before."""
    calibration, method, precision = rounding.calibration, rounding.method, rounding.precision
    tokens = rounding.text.train(calibration.sensitivity_sequences)
    fitted = rounding.tokens.tolist() if method == "gptq" else []
    plan = {name: str(scheme) for name, scheme in schemes.items()}
    parts = source, plan, method, tokens.tolist(), fitted, calibration.seed, str(precision)
    path = cache_folder() / f"{hash_of('sensitivity', *parts)}.json"
    if kept := _kept_sensitivities(path):
        return kept
    on_step = partial(rounding.progress, "measure sensitivity")
    with cache_lock(path, on_step):
        if kept := _kept_sensitivities(path):
            return kept
        rounded = {name: start.rounded for name, start in rounding(schemes).items()}
        found = sensitivities(rounding.checkpoint, rounded, tokens, precision, on_step)
        write_json(path, {"sensitivities": [asdict(one) for one in found]})
        return tuple(found)


def _kept_sensitivities(path: Path) -> tuple[Sensitivity, ...]:
    """Nothing where they are not there, or damaged."""
    with suppress(InputError, KeyError, TypeError):
        return tuple(Sensitivity(**one) for one in read_json(path)["sensitivities"])
    return ()


@dataclass(frozen=True)
class CalibrationResult:
    """The integers, and the reports as files: name → content."""

    weights: Mapping[str, QuantizedTensor]
    reports: Mapping[str, bytes]


def calibrate(
    checkpoint: Checkpoint,
    inputs: CalibrationInputs,
    schemes: Mapping[str, Scheme],
    folder: Path,
    progress: Progress,
) -> CalibrationResult:
    """Round every weight as the recipe says. `folder` keeps what a killed run had reached."""
    quantized = {name: scheme for name, scheme in schemes.items() if scheme != FLOAT}
    calibration, text, precision = inputs.calibration, inputs.text, inputs.precision
    history = None
    if inputs.method == "distill":
        if not parallel.rank():
            _claim(folder, {"source": inputs.source, **inputs.identity()}, quantized)
            if not (folder / START).is_file():
                _save(folder / START, inputs.rounding(schemes))
        parallel.wait_for_all()
        starts = _load(folder / START, quantized)
        rounding = round_rows_to_int8 if calibration.activations == "int8" else None
        distilled = distill(
            Student(checkpoint, starts, calibration.sequence_length, rounding),
            Teacher(inputs.teacher, calibration, _answers_folder(inputs)),
            calibration,
            text,
            folder,
            precision,
            partial(progress, "distil"),
        )
        weights, history = distilled.weights, distilled.history
    else:
        weights = {name: start.rounded for name, start in inputs.rounding(schemes).items()}
    return CalibrationResult(weights, _reports(inputs, history))


def _answers_folder(inputs: CalibrationInputs) -> Path | None:
    """Where the teacher's answers are kept, if they are."""
    calibration = inputs.calibration
    if not calibration.cache_teacher:
        return None
    settings = calibration.top_k, calibration.temperature, str(inputs.precision)
    return cache_folder() / hash_of("teacher", inputs.teacher_source, settings)


def _claim(folder: Path, identity: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> None:
    """Go on with what lies in `folder` if it is of the same calibration; else clear it."""
    names = {name: str(scheme) for name, scheme in schemes.items()}
    whole = {"format": _FOLDER_FORMAT, **identity, "schemes": names}
    plain = json.loads(json.dumps(whole))
    with suppress(InputError):
        if read_json(folder / IDENTITY) == plain:
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / IDENTITY, plain)


def _save(path: Path, starts: Mapping[str, GptqResult]) -> None:
    entries = pack_entries({name: start.rounded for name, start in starts.items()})
    weights = {entry_name(name, _WEIGHT): start.weight for name, start in starts.items()}
    write_tensors(path, entries | weights)


def _load(path: Path, schemes: Mapping[str, Scheme]) -> dict[str, GptqResult]:
    with safe_open(path, framework="pt") as file:
        return {
            name: GptqResult(
                unpack_entry(name, scheme, file.get_tensor),
                file.get_tensor(entry_name(name, _WEIGHT)),
            )
            for name, scheme in schemes.items()
        }


def _reports(inputs: CalibrationInputs, history: TrainingHistory | None) -> dict[str, bytes]:
    """What was measured, as tables and plots."""
    reports = dict[str, bytes]()
    if history is not None:
        reports["distillation.json"] = _json(asdict(history) | {"best": asdict(history.best)})
        reports["distillation.png"] = plot_history(history)
    if inputs.sensitivities:
        rows = [asdict(one) | {"wider": one.name in inputs.wider} for one in inputs.sensitivities]
        reports["sensitivity.json"] = _json({"sensitivities": rows})
        reports["sensitivity.png"] = plot_sensitivities(inputs.sensitivities, inputs.wider)
    return reports


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_reports(folder: Path, reports: Mapping[str, bytes]) -> list[Path]:
    """Write the reports into `folder`, which is made for them."""
    for name, content in reports.items():
        with replacing(folder / name) as file:
            file.write(content)
    return [folder / name for name in reports]
