"""The schema of an evaluation result: the file that ``mobilellm evaluate -o`` writes.

Figures are None where they were not measured, or where a perplexity is infinite. docs/quality.md
says what each means.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from exporter.settings import FileHashes, Section, Sha256, refusal

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
#: Such as ``model.layers.0``.
LayerName = Annotated[str, StringConstraints(pattern=r"^[\w.]{1,200}$")]


class DataFile(Section):
    """The plain name and the SHA-256 of a file of texts or problems."""

    file: str
    sha256: Sha256


class EvaluationSettings(Section):
    """The options that change figures, None for those of a measurement that was not made."""

    field: str | None = None
    max_tokens: Count | None = None
    sequence_length: Count | None = None
    prefill: Count | None = None
    limit: Count | None = None
    max_new_tokens: Count | None = None
    generations: Count | None = None
    simulate: bool = False


class PositionFigures(Section):
    """The figures of the positions `first`..`last` of every sequence."""

    first: Count
    last: Count
    perplexity: Number | None
    kl: Number | None
    top1_agreement: Share | None


class SameTokens(Section):
    """The share of equal tokens at the new positions `first`..`last` of the generations."""

    first: Count
    last: Count
    agreement: Share


class LayerFigure(Section):
    """The KL of one layer."""

    layer: LayerName
    kl: Number


class EvaluationFigures(Section):
    """All figures; `kind` says what ran the model."""

    kind: str
    tokens: Count | None = None
    sequences: Count | None = None
    perplexity: Number | None = None
    perplexity_error: Number | None = None
    reference_perplexity: Number | None = None
    kl: Number | None = None
    kl_error: Number | None = None
    top1_agreement: Share | None = None
    agreement_by_position: list[PositionFigures] | None = None
    problems: Count | None = None
    accuracy: Share | None = None
    answered: Share | None = None
    never_ended: Share | None = None
    mean_tokens: Number | None = None
    correct: list[Literal[0, 1]] | None = None
    generations: Count | None = None
    identical_generations: Share | None = None
    first_divergence: list[Count | None] | None = None
    median_first_divergence: Number | None = None
    generation_agreement_by_position: list[SameTokens] | None = None
    kl_by_layer: list[LayerFigure] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "EvaluationFigures":
        if self.correct is not None:
            count = len(self.correct)
            if count != self.problems or not count or self.accuracy != sum(self.correct) / count:
                raise refusal("does not add up to problems and accuracy", key="correct")
        return self


class Evaluation(Section):
    """The whole file.

    `files` has the hashes of the artifact's files, or of the quantized checkpoint's where `target`
    is None; `reference` those of the reference checkpoint. `versions` are those of the packages
    that ran the model.
    """

    result: Literal["evaluation"]
    schema_version: Literal[1]
    target: str | None
    files: FileHashes
    data: DataFile | None
    task: DataFile | None
    reference: FileHashes | None
    settings: EvaluationSettings
    versions: dict[str, str]
    figures: EvaluationFigures
