"""The recipe's `calibration` section."""

from typing import Annotated, Literal

from pydantic import model_validator

from exporter.settings import Section, list_of, refusal, within

#: What is above zero: ranges include their ends.
_POSITIVE = 1e-12


class Source(Section):
    """A file of text, JSONL or parquet (`field` names what to read of a row), or, without a
    `path`, `tokens` tokens that the checkpoint writes itself: from nothing, or answers to the
    `prompts` of a file, or, with `continue_after`, how it goes on after so many tokens of each of
    them. Sources are mixed by `weight`."""

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
        """Whether the checkpoint writes it."""
        return not self.path

    @model_validator(mode="after")
    def _prompts_are_of_use(self) -> "Source":
        if self.path and self.prompts:
            raise refusal(
                "has no use for a source with a path",
                "Leave the path out, and the checkpoint answers the prompts",
                key="prompts",
            )
        if self.continue_after and not self.prompts:
            raise refusal("needs texts to go on with", "Name a file with prompts", "continue_after")
        return self


class Calibration(Section):
    """The text that GPTQ, distillation and the sensitivity search learn from, and how they do.

    `held_out` is the share of every source that nothing is learned from: it decides which step of
    a distillation is kept. `start` is what distillation starts from. Steps of `batch_size`
    sequences (times `accumulate`) minimize KL(teacher || student) at `temperature`, over the
    `top_k` likeliest tokens and all others as one (0: over all), plus `hidden_weight` times the
    squared error of the last hidden states. `activations: int8` rounds them as XNNPACK does.
    `learning_rate` is that of real codes, in codes a step; `scale_learning_rate` is that of the
    logarithms of int4 scales, of which int8 has a sixteenth.
    The teacher is the checkpoint itself, or another one of the same tokenizer.
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

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Calibration":
        if not self.data:
            raise refusal("[] is not a list of sources", "Name one", "data")
        longest = self.sequence_length - 2
        for index, source in enumerate(self.data):
            if source.continue_after and not 1 <= source.continue_after <= longest:
                raise refusal(
                    f"{source.continue_after} is out of range",
                    f"Give a value between 1 and {longest}",
                    f"data.{index}.continue_after",
                )
        if self.cache_teacher and not (self.top_k and not self.hidden_weight):
            raise refusal(
                "needs a top_k, and no hidden_weight",
                "Set top_k to some hundred: all logits of all tokens do not fit a disk",
                "cache_teacher",
            )
        return self
