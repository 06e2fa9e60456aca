"""The recipe's `calibration` section."""

from typing import Annotated, Any, Literal

from pydantic import model_validator

from exporter.settings import Section, list_of, refusal, within

#: The keys that a calibration adds to `Calibration.identity` in the manifest.
RESULTS = ("teacher", "precision", "text", "processes", "wider")
#: Lower limit of values that must be above zero, because ranges include their limits.
_POSITIVE = 1e-12


class Source(Section):
    """One source of calibration text: a file, or text that the checkpoint generates.

    `path` is a file of text, JSONL or parquet; `field` names the field of a row. Without a `path`,
    the checkpoint generates `tokens` tokens: from the begin-of-text token, or as answers to the
    `prompts` of a file, or, with `continue_after`, as continuations of the first `continue_after`
    tokens of each text in that file. Sources are mixed by `weight`.
    """

    path: str = ""
    field: str = ""
    weight: Annotated[float, within(_POSITIVE)] = 1.0
    prompts: str = ""
    continue_after: int = 0
    tokens: Annotated[int, within(1)] = 65536
    temperature: Annotated[float, within(_POSITIVE)] = 1.0
    top_p: Annotated[float, within(_POSITIVE, 1.0)] = 1.0

    @property
    def self_generated(self) -> bool:
        """Whether the checkpoint generates the text."""
        return not self.path

    @model_validator(mode="after")
    def _check_prompts(self) -> "Source":
        if self.path and self.prompts:
            raise refusal(
                "has no use for a source with a path",
                "Leave the path out to let the checkpoint answer the prompts",
                key="prompts",
            )
        if self.continue_after and not self.prompts:
            raise refusal("needs texts to continue", "Name a file in prompts", "continue_after")
        return self


class Calibration(Section):
    """The calibration text, and the settings of GPTQ, sensitivity search and distillation.

    `held_out` is the share of every source that is not trained on; it decides which step of a
    distillation is kept. `start` is the rounding that distillation starts from. `teacher` is the
    checkpoint itself, or another one with the same tokenizer.

    Each step processes `batch_size` sequences per process, `accumulate` times. The loss is
    KL(teacher || student) at `temperature`, plus `hidden_weight` times the mean squared error of
    the last hidden states. With a `top_k`, the KL is over the `top_k` most likely tokens and one
    bucket for all others; 0 is over all tokens. `activations: int8` simulates XNNPACK's rounding of
    activations.

    `learning_rate` is that of the unrounded codes, in codes per step. `scale_learning_rate` is that
    of the logarithms of int4 scales; for int8 scales it is a sixteenth of that.
    """

    data: Annotated[tuple[Source, ...], list_of("sources")] = (Source(),)
    sequence_length: Annotated[int, within(8)] = 512
    held_out: Annotated[float, within(_POSITIVE, 0.5)] = 0.05
    gptq_sequences: Annotated[int, within(1)] = 32
    sensitivity_sequences: Annotated[int, within(1)] = 2
    start: Literal["mse", "gptq"] = "gptq"
    teacher: str = ""
    steps: Annotated[int, within(1)] = 400
    batch_size: Annotated[int, within(1)] = 2
    accumulate: Annotated[int, within(1)] = 1
    learning_rate: Annotated[float, within(_POSITIVE, 1.0)] = 2e-3
    scale_learning_rate: Annotated[float, within(0.0, 1.0)] = 5e-4
    warm_up: Annotated[int, within(0)] = 10
    temperature: Annotated[float, within(0.01, 100.0)] = 1.0
    top_k: Annotated[int, within(0)] = 0
    hidden_weight: Annotated[float, within(0.0)] = 0.0
    activations: Literal["float", "int8"] = "float"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    cache_teacher: bool = False
    evaluate_every: Annotated[int, within(1)] = 50
    held_out_sequences: Annotated[int, within(1)] = 16
    patience: Annotated[int, within(1)] = 4
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: Annotated[int, within(0, 2**63 - 1)] = 0

    def identity(self) -> dict[str, Any]:
        """The settings that decide the integers. Texts and teacher are left out: the manifest has
        their hashes."""
        return self.model_dump(mode="json", exclude={"data", "cache_teacher", "teacher"})

    @model_validator(mode="after")
    def _check_combinations(self) -> "Calibration":
        if not self.data:
            raise refusal("[] is not a list of sources", "Name one", "data")
        limit = self.sequence_length - 2
        for index, source in enumerate(self.data):
            if source.continue_after and not 1 <= source.continue_after <= limit:
                raise refusal(
                    f"{source.continue_after} is out of range",
                    f"Give a value between 1 and {limit}",
                    f"data.{index}.continue_after",
                )
        if self.cache_teacher and not (self.top_k and not self.hidden_weight):
            raise refusal(
                "needs a top_k, and no hidden_weight",
                "Set top_k to a few hundred: the logits of all tokens would not fit on the disk",
                "cache_teacher",
            )
        return self
