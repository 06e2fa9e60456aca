"""All measurements of `mobilellm evaluate` on one model; bad input is refused before they start."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from exporter.errors import InputError
from exporter.evaluation.generations import (
    GenerationScore,
    Written,
    check_prompts,
    compare_texts,
    write_texts,
)
from exporter.evaluation.layers import LayerKL, kl_by_layer
from exporter.evaluation.perplexity import TextScore, score_text
from exporter.evaluation.result import Inputs, check_output, evaluation_result, result_identity
from exporter.evaluation.tasks import TaskScore, read_problems, score_problems
from exporter.files import write_json
from exporter.inference.loaded_model import (
    LoadedModel,
    open_model,
    open_quantized_of,
    open_simulated,
)
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import Checkpoint
from exporter.model.decoder import Decoder
from exporter.progress import Progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.text.documents import Document, read_documents
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class Measures:
    """The measurements to make. The fields are the options of the command line.

    Raises InputError for values that are out of range or do not go together.
    """

    data: Path | None = None
    field: str | None = None
    max_tokens: int = 8192
    sequence_length: int = 512
    prefill: int = 1
    reference: str | None = None
    task: Path | None = None
    limit: int | None = None
    generations: int = 0
    max_new_tokens: int = 512
    simulate: bool = False
    layers: bool = False
    output: Path | None = None

    def __post_init__(self) -> None:
        least = 1 if self.limit is None else self.limit
        for flag, value, wanted in (
            ("--sequence-length", self.sequence_length, 2),
            ("--max-tokens", self.max_tokens, self.sequence_length),
            ("--prefill", self.prefill, 1),
            ("--limit", least, 1),
            ("--generations", self.generations, 0),
            ("--max-new-tokens", self.max_new_tokens, 1),
        ):
            if value < wanted:
                reason = "less than one sequence" if flag == "--max-tokens" else "out of range"
                raise InputError(f"{flag} {value}", f"is {reason}", f"Give {wanted} or more")
        if self.prefill >= self.sequence_length:
            raise InputError(
                f"--prefill {self.prefill}",
                f"leaves nothing to predict of {self.sequence_length} tokens",
                "Give less than --sequence-length",
            )
        for flag, missing, remedy in (
            ("evaluate", not (self.data or self.task), "Give --data FILE, --task FILE, or both"),
            ("--field", self.field is not None and not self.data, "Give --data FILE with it"),
            ("--generations", self.generations and not self.task, "Give --task FILE with it"),
            ("--limit", self.limit is not None and not self.task, "Give --task FILE with it"),
            ("--generations", self.generations and not self.reference, "Give --reference with it"),
            ("--reference", self.reference and not (self.data or self.generations),
             "Give --data FILE or --generations N with it"),
            ("--layers", self.layers and not (self.data and self.reference),
             "Give --data FILE and --reference CHECKPOINT with it"),
        ):  # fmt: skip
            if missing:
                raise InputError(flag, "has nothing to measure", remedy)
        if self.simulate and self.task:
            raise InputError(
                "--simulate", "is for --data only", "Run the artifact itself on the --task"
            )
        if self.simulate and self.output:
            raise InputError(
                "--simulate", "measures no artifact, whose result --output is", "Leave one out"
            )

    def settings(self) -> dict[str, object]:
        """The options that change figures, None for those of a measurement that is not made."""
        text = ("field", "max_tokens", "sequence_length", "prefill") if self.data else ()
        task = ("limit", "max_new_tokens", "generations") if self.task else ()
        names = "field max_tokens sequence_length prefill limit max_new_tokens generations".split()
        asked = {name: getattr(self, name) if name in text + task else None for name in names}
        return {**asked, "simulate": self.simulate}


@dataclass(frozen=True)
class Evaluation:
    """The results, None for those not asked for. `kind` names the model's form and runtime."""

    kind: str
    text: TextScore | None
    task: TaskScore | None
    generations: GenerationScore | None
    layers: Sequence[LayerKL] | None = None

    def figures(self) -> dict[str, object]:
        """All figures by name, None for those that were not measured."""
        named = dict.fromkeys(
            field.name for kind in (TextScore, TaskScore, GenerationScore) for field in fields(kind)
        )
        found = [asdict(score) for score in (self.text, self.task, self.generations) if score]
        layers = None if self.layers is None else [asdict(layer) for layer in self.layers]
        return {
            "kind": self.kind,
            **named,
            **{k: v for one in found for k, v in one.items()},
            "kl_by_layer": layers,
        }


def evaluate(source: str, target: str | None, asked: Measures, progress: Progress) -> Evaluation:
    """Measure a checkpoint, a quantized checkpoint, an artifact or a bundle (`target` picks its
    artifact), each in its own runtime, and write the result to the file `output`. Raises InputError
    before any long work."""
    if asked.output:
        check_output(asked.output, source)
    documents = read_documents(asked.data, asked.field) if asked.data else []
    problems = read_problems(asked.task, asked.limit) if asked.task else []
    if asked.simulate:
        model = open_simulated(source, target, asked.prefill)
    else:
        model = open_model(source, target)
    reference = open_model(asked.reference, None) if asked.reference else None
    tokenizer = load_tokenizer(model.tokenizer_folder)
    if reference:
        _check_same_tokens(reference, model, tokenizer)
    sequences = _sequences(documents, model, reference, tokenizer, asked) if documents else []
    prompts = [
        tokenizer.encode(tokenizer.prompt_text(problem.prompt, raw=False)) for problem in problems
    ]
    check_prompts(model, prompts)
    compared = prompts[: asked.generations]
    if reference:
        check_prompts(reference, compared)
    layered = _layered(source, reference) if asked.layers and reference else None
    identity = dict[str, object]()
    if asked.output:
        inputs = Inputs(model, reference, asked.data, asked.task, asked.settings())
        identity = result_identity(inputs)

    text = None
    if sequences:
        text = score_text(
            model.runner,
            sequences,
            partial(progress, "text"),
            reference.runner if reference else None,
            asked.prefill,
        )
    layers = None
    if layered:
        layers = kl_by_layer(*layered, sequences, partial(progress, "layers"), asked.prefill)
    task, generations = None, None
    if problems:
        written = _write(model, prompts, asked, "task", progress)
        task = score_problems(problems, written, tokenizer)
        if reference and compared:
            expected = _write(reference, compared, asked, "reference", progress)
            generations = compare_texts(expected, written[: len(compared)])
    evaluation = Evaluation(model.kind, text, task, generations, layers)
    if asked.output:
        write_json(asked.output, evaluation_result(identity, evaluation.figures()))
    return evaluation


def _layered(source: str, reference: LoadedModel) -> tuple[Decoder, QuantizedCheckpoint]:
    """The float model and the quantized checkpoint whose layers are compared. Raises InputError
    unless both are there and of the same shapes."""
    quantized = open_quantized_of(source)
    if quantized is None:
        raise InputError(
            "--layers", f"{source} has no quantized checkpoint", "Give a bundle or the checkpoint"
        )
    runner, given = reference.runner, reference.source
    if not isinstance(given, Checkpoint) or not isinstance(runner, ReferenceRunner):
        raise InputError(
            f"--reference {reference.tokenizer_folder}",
            "is not a float checkpoint, whose layers --layers replaces",
            "Give the checkpoint that the model was made from",
        )
    if given.config.parameter_shapes() != quantized.config.parameter_shapes():
        raise InputError(
            f"--reference {reference.tokenizer_folder}",
            "has weights of other names or shapes than the model",
            "Give the checkpoint that the model was made from",
        )
    return runner.decoder, quantized


def _write(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    asked: Measures,
    stage: str,
    progress: Progress,
) -> list[Written]:
    return write_texts(model, prompts, asked.max_new_tokens, partial(progress, stage))


def _sequences(
    documents: Sequence[Document],
    model: LoadedModel,
    reference: LoadedModel | None,
    tokenizer: TextTokenizer,
    asked: Measures,
) -> list[list[int]]:
    length = asked.sequence_length
    for one in (model, reference) if reference else (model,):
        if length - 1 > one.runner.context:  # the last token is only predicted
            raise InputError(
                f"--sequence-length {length}",
                f"is more than the {one.runner.context} tokens that the context of "
                f"{one.tokenizer_folder} holds",
                "Lower it",
            )
    texts = map(tokenizer.document_text, documents)
    sequences = cut_sequences(
        texts, tokenizer, model.bos_token_id, length, asked.max_tokens,
        "--data", "--sequence-length",
    )  # fmt: skip
    largest = max(max(tokens) for tokens in sequences)
    if largest >= model.runner.vocab_size:
        raise InputError(
            model.tokenizer_folder / "tokenizer.json",
            f"gives token {largest}, outside the model's vocabulary of {model.runner.vocab_size}",
            "The tokenizer does not belong to this model",
        )
    return sequences


def _check_same_tokens(
    reference: LoadedModel, model: LoadedModel, tokenizer: TextTokenizer
) -> None:
    """Raise InputError unless both have the same vocabulary: else logits cannot be compared."""
    theirs, ours = reference.runner.vocab_size, model.runner.vocab_size
    if theirs != ours:
        raise InputError(
            f"--reference {reference.tokenizer_folder}",
            f"has a vocabulary of {theirs} tokens, the model one of {ours}",
            "Give the checkpoint that the model was made from",
        )
    if not tokenizer.has_vocabulary_of(load_tokenizer(reference.tokenizer_folder)):
        raise InputError(
            f"--reference {reference.tokenizer_folder}",
            "has another tokenizer than the model",
            "Give the checkpoint that the model was made from",
        )
