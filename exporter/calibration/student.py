"""The student of a distillation: its weights are rounded in every forward pass.

The parameters are unrounded codes (weights divided by their scales) and scales. Gradients pass
through the rounding unchanged (the straight-through estimator). Scales are trained as logarithms
and rounded to the portable grid before use, as they are stored. A change of a scale changes no
code, unlike with learned step sizes (LSQ: Esser et al., arXiv 1902.08153), so the errors that GPTQ
compensated stay compensated.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from exporter.model.config import EMBEDDING
from exporter.model.decoder import Decoder, FloatWeights, attend_causal, fill_weights
from exporter.quantization.activations import Rounding
from exporter.quantization.gptq import GptqResult
from exporter.quantization.rounding import row_blocks, to_scale_grid
from exporter.quantization.schemes import CODE_RANGE, QuantizedTensor, Scheme


class _Rounded(torch.autograd.Function):
    """Unrounded codes [rows, columns] and log_scales [rows, groups] → rounded code times scale
    [rows, columns] in `dtype`.

    Works on blocks of rows that fit in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, log_scales: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, log_scales)
        ctx.bits = bits
        result = torch.empty(codes.shape, dtype=dtype)
        for rows in row_blocks(codes):
            scale = to_scale_grid(log_scales[rows].exp())[..., None]
            rounded = codes[rows].round().clamp_(*CODE_RANGE[bits])
            result[rows] = _grouped(rounded, log_scales).mul_(scale).flatten(1)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        codes, log_scales = ctx.saved_tensors
        lowest, highest = CODE_RANGE[ctx.bits]
        to_codes, to_scales = torch.empty_like(codes), torch.empty_like(log_scales)
        for rows in row_blocks(codes):
            scale = to_scale_grid(log_scales[rows].exp())[..., None]
            block = codes[rows]
            scaled = _grouped(gradient[rows].float(), log_scales).mul(scale)
            rounded = _grouped(block.round().clamp_(lowest, highest), log_scales)
            to_scales[rows] = rounded.mul_(scaled).sum(-1)
            in_range = (block >= lowest - 0.5) & (block <= highest + 0.5)
            to_codes[rows] = scaled.flatten(1).mul_(in_range)
        return to_codes, to_scales, None, None


def _grouped(values: Tensor, log_scales: Tensor) -> Tensor:
    """A view of `values` [rows, columns] as [rows, groups, group_size]."""
    return values.view(len(values), log_scales.shape[1], -1)


def unshard(parameter: Tensor) -> Tensor:
    """The full parameter; one whose rows are sharded over processes is gathered."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class RoundedWeight(nn.Module):
    """A trained weight [out_features, in_features], as unrounded codes and logarithms of scales.

    `initial` gives the weight and the scales before training.
    """

    def __init__(self, initial: GptqResult) -> None:
        super().__init__()
        scheme = initial.rounded.scheme
        assert scheme.bits is not None
        self.scheme, self.bits = scheme, scheme.bits
        scales = initial.rounded.scales
        self.codes = nn.Parameter((_grouped(initial.weight, scales) / scales[..., None]).flatten(1))
        self.log_scales = nn.Parameter(scales.log())

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out_features, in_features] in `dtype`."""
        rounded: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]  # of torch
            self.codes, self.log_scales, self.bits, dtype
        )
        return rounded

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """Codes and scales as they would be stored now."""
        codes = unshard(self.codes).round().clamp_(*CODE_RANGE[self.bits]).to(torch.int8)
        return QuantizedTensor(codes, to_scale_grid(unshard(self.log_scales).exp()), self.scheme)


class RoundedLinear(nn.Module):
    """A linear layer without bias whose weight is a `RoundedWeight`."""

    def __init__(self, initial: GptqResult, rounding: Rounding | None) -> None:
        super().__init__()
        self.rounded, self.rounding = RoundedWeight(initial), rounding

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in_features], rounded by `rounding` if there is one → [..., out_features]."""
        x = _straight_through(x, self.rounding) if self.rounding else x
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return F.linear(x, self.rounded(kind))


class RoundedEmbedding(nn.Module):
    """An embedding; a tied output layer uses the table that the last lookup rounded."""

    def __init__(self, initial: GptqResult) -> None:
        super().__init__()
        self.rounded = RoundedWeight(initial)
        self.table: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [batch, seq] → float32 [batch, seq, hidden]."""
        self.table = self.rounded(torch.float32)
        return F.embedding(tokens, self.table)


class Student(nn.Module):
    """A decoder whose quantized weights are trained; all other weights are fixed.

    `initial` maps the name of each quantized weight to its rounding before training. `rounding`
    simulates a runtime's rounding of the inputs of every matrix product. `context` is the longest
    sequence in tokens.
    """

    def __init__(
        self,
        source: FloatWeights,
        initial: Mapping[str, GptqResult],
        context: int,
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__()
        self.rounding = rounding
        with torch.device("meta"):
            self.decoder = Decoder(source.config, context)
        tied = source.config.tie_word_embeddings
        for name, result in initial.items():
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            learned: nn.Module = (
                RoundedEmbedding(result) if name == EMBEDDING else RoundedLinear(result, rounding)
            )
            setattr(self.decoder.get_submodule(parent), child, learned)
        if tied and EMBEDDING in initial:
            self.decoder.lm_head = nn.Identity()  # type: ignore[assignment]  # see `output_weight`
        fill_weights(self.decoder, source, "")
        for weight in self.learned().values():
            weight.requires_grad_(True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [batch, seq] → the inputs of the output layer [batch, seq, hidden], and the weight
        of that layer [vocab_size, hidden]."""
        positions = torch.arange(tokens.shape[1])
        states = self.decoder.hidden_states(tokens, positions, attend_causal)
        states = _straight_through(states, self.rounding) if self.rounding else states
        return states, self.output_weight()

    def output_weight(self) -> Tensor:
        """The output layer's weight [vocab_size, hidden]; a tied one is that of the last lookup."""
        embedding, output = self.decoder.model.embed_tokens, self.decoder.lm_head
        weight: Tensor
        if isinstance(output, RoundedLinear):
            weight = output.rounded(torch.float32)
            return weight
        if isinstance(embedding, RoundedEmbedding) and isinstance(output, nn.Identity):
            assert embedding.table is not None
            return embedding.table
        weight = output.weight
        return weight

    def learned(self) -> dict[str, RoundedWeight]:
        """The trained weights, by their names in the checkpoint."""
        return {
            name.removeprefix("decoder.").removesuffix(".rounded") + ".weight": module
            for name, module in self.named_modules()
            if isinstance(module, RoundedWeight)
        }

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each trained weight, by name."""
        return {name: weight.scheme for name, weight in self.learned().items()}

    def quantized(self) -> dict[str, QuantizedTensor]:
        """Codes and scales of each trained weight as they would be stored now, by name."""
        return {name: weight.quantized() for name, weight in self.learned().items()}


def _straight_through(x: Tensor, rounding: Rounding) -> Tensor:
    """`x` rounded; the gradient passes through the rounding unchanged."""
    return x + (rounding(x.detach().float()) - x.detach()).to(x.dtype)
