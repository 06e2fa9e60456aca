"""GPTQ: later columns compensate rounding errors, in one weight and over a whole model."""

import pytest
import torch
from calibrating import Replaced, divergence_of, small_checkpoint
from conftest import FAMILIES, NANO, MakeCheckpoint
from roundings import (
    EVERY_SCHEME,
    FEATURES,
    correlated_hessian,
    error,
    plainly_rounded,
    random_weight,
)
from torch import Tensor

from exporter.calibration.gptq import gptq_weights
from exporter.model.checkpoint import open_checkpoint
from exporter.quantization.gptq import GptqResult, gptq
from exporter.quantization.rounding import quantize, to_scale_grid
from exporter.quantization.schemes import CODE_RANGE, FLOAT, QuantizedTensor, Scheme
from exporter.text.documents import read_documents
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import load_tokenizer

Q_PROJ, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def one_by_one(weight: Tensor, hessian: Tensor, rounded: QuantizedTensor) -> Tensor:
    """Codes by Optimal Brain Quantization's own formula, float64: after each column its error goes
    to all later ones, and its row and column leave the inverse."""
    damped = hessian.double() + torch.eye(FEATURES) * 0.01 * hessian.diagonal().double().mean()
    order = damped.diagonal().argsort(descending=True, stable=True).tolist()
    inverse, rest = torch.linalg.inv(damped), weight.double().clone()
    scales = rounded.scales.double().repeat_interleave(FEATURES // rounded.scales.shape[1], 1)
    assert rounded.scheme.bits is not None
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for place, column in enumerate(order):
        code = (rest[:, column] / scales[:, column]).round().clamp(*CODE_RANGE[rounded.scheme.bits])
        codes[:, column] = code.to(torch.int8)
        lost = (rest[:, column] - code * scales[:, column]) / inverse[column, column]
        later = order[place + 1 :]
        rest[:, later] -= torch.outer(lost, inverse[column, later])
        inverse = (
            inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        )
    return codes


@EVERY_SCHEME
def test_gptq_loses_less_of_the_products_than_least_squared_error(scheme: Scheme) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    found = gptq(weight, hessian, scheme).rounded
    assert error(weight, found, hessian) < 0.6 * error(
        weight, quantize(weight, scheme, "mse"), hessian
    )


@EVERY_SCHEME
def test_gptq_is_optimal_brain_quantization_in_the_order_of_the_largest_inputs(
    scheme: Scheme,
) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    found = gptq(weight, hessian, scheme).rounded
    expected = one_by_one(weight, hessian, found)
    # A value that lies between two codes may go either way, and others follow it.
    assert (found.codes == expected).float().mean() > (0.99 if scheme.bits == 4 else 0.9)


@EVERY_SCHEME
def test_inputs_that_do_not_correlate_give_plain_rounding(scheme: Scheme) -> None:
    weight = random_weight()
    found = gptq(weight, torch.eye(FEATURES), scheme)
    assert torch.equal(found.rounded.codes, plainly_rounded(weight, found.rounded))
    assert torch.equal(found.weight, weight)


@EVERY_SCHEME
def test_codes_are_in_range_and_scales_on_the_portable_grid(scheme: Scheme) -> None:
    found = gptq(50 * random_weight(), correlated_hessian(), scheme).rounded
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    assert lowest <= found.codes.min() and found.codes.max() <= highest
    assert found.codes.dtype == torch.int8
    assert torch.equal(to_scale_grid(found.scales), found.scales)
    assert found.scales.shape == scheme.scale_shape(tuple(found.codes.shape))


@EVERY_SCHEME
def test_the_weight_that_comes_back_rounds_to_the_codes(scheme: Scheme) -> None:
    found = gptq(random_weight(), correlated_hessian(), scheme)
    assert torch.equal(plainly_rounded(found.weight, found.rounded), found.rounded.codes)
    assert not torch.equal(found.weight, random_weight())


@EVERY_SCHEME
def test_an_input_that_never_occurs_is_rounded_plainly(scheme: Scheme) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    hessian[40:70], hessian[:, 40:70] = 0, 0
    found = gptq(weight, hessian, scheme)
    assert torch.equal(found.weight[:, 40:70], weight[:, 40:70])
    assert error(weight, found.rounded, hessian) < 0.6 * error(
        weight, quantize(weight, scheme, "mse"), hessian
    )


@EVERY_SCHEME
def test_where_no_input_occurs_at_all_it_is_least_squared_error(scheme: Scheme) -> None:
    weight = random_weight()
    found = gptq(weight, torch.zeros(FEATURES, FEATURES), scheme).rounded
    plain = quantize(weight, scheme, "mse")
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


def test_a_weight_of_zeros_stays_zero() -> None:
    found = gptq(torch.zeros(8, FEATURES), correlated_hessian(), Scheme(4, 32)).rounded
    assert not found.codes.any()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_the_walk_covers_exactly_the_quantized_weights(
    base: dict[str, object], tied: bool, products: torch.dtype, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, base, tie_word_embeddings=tied)
    shapes = checkpoint.config.parameter_shapes()
    schemes = {name: Scheme(4, 32) if len(shape) == 2 else FLOAT for name, shape in shapes.items()}
    schemes["model.layers.1.self_attn.v_proj.weight"] = FLOAT
    schemes["model.layers.1.self_attn.o_proj.weight"] = Scheme(8)
    tokens = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(3))
    found = list(gptq_weights(checkpoint, schemes, tokens, products, {}))
    assert sorted(name for name, _ in found) == sorted(
        name for name, scheme in schemes.items() if scheme != FLOAT
    )
    for name, one in found:
        assert one.rounded.scheme == schemes[name]
        assert one.rounded.codes.shape == shapes[name]
    assert (found[-1][0] == EMBEDDING) is tied
    assert (found[0][0] == EMBEDDING) is not tied


def test_an_embedding_that_stays_float_is_left_out(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    schemes = dict.fromkeys(checkpoint.config.parameter_shapes(), FLOAT) | {Q_PROJ: Scheme(4, 32)}
    found = dict(gptq_weights(checkpoint, schemes, torch.arange(32)[None], torch.float32, {}))
    assert list(found) == [Q_PROJ]


def test_each_weight_is_fitted_to_what_the_rounded_ones_before_it_give(
    make_checkpoint: MakeCheckpoint,
) -> None:
    """The first weight sees exact inputs; a later one other codes than with those before exact."""
    checkpoint = small_checkpoint(make_checkpoint)
    later = "model.layers.1.self_attn.q_proj.weight"
    shapes = checkpoint.config.parameter_shapes()
    tokens = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(3))
    all_of_it = {
        name: Scheme(4, 32) if len(shape) == 2 and name != EMBEDDING else FLOAT
        for name, shape in shapes.items()
    }
    alone = dict.fromkeys(shapes, FLOAT) | {Q_PROJ: Scheme(4, 32), later: Scheme(4, 32)}
    walked, apart = (
        dict(gptq_weights(checkpoint, schemes, tokens, torch.float32, {}))
        for schemes in (all_of_it, alone)
    )
    assert torch.equal(walked[Q_PROJ].rounded.codes, apart[Q_PROJ].rounded.codes)
    assert not torch.equal(walked[later].rounded.codes, apart[later].rounded.codes)


def test_on_the_demo_checkpoint_gptq_keeps_more_than_mse_and_mse_more_than_absmax() -> None:
    checkpoint = open_checkpoint(NANO)
    tokenizer = load_tokenizer(NANO)
    path = NANO.parent / "tasks" / "arithmetic.jsonl"
    texts = (tokenizer.document_text(document) for document in read_documents(path))
    begin = checkpoint.bos_token_id
    sequences = torch.tensor(cut_sequences(texts, tokenizer, begin, 64, None))
    held_out, train = sequences[:6], sequences[6:38]
    shapes = checkpoint.config.parameter_shapes()
    schemes = {name: Scheme(4, 32) if len(shape) == 2 else FLOAT for name, shape in shapes.items()}
    rounded: dict[str, dict[str, GptqResult | QuantizedTensor]] = {
        method: {
            name: quantize(checkpoint.float_weight(name), scheme, method)
            for name, scheme in schemes.items()
            if scheme != FLOAT
        }
        for method in ("absmax", "mse")
    }
    rounded["gptq"] = dict(gptq_weights(checkpoint, schemes, train, torch.float32, {}))
    kl = {
        method: divergence_of(
            checkpoint,
            Replaced(
                checkpoint,
                {
                    name: (one.rounded if isinstance(one, GptqResult) else one).dequantize()
                    for name, one in weights.items()
                },
            ),
            held_out,
        )
        for method, weights in rounded.items()
    }
    assert kl["gptq"] < 0.8 * kl["mse"]
    assert kl["mse"] < kl["absmax"]
