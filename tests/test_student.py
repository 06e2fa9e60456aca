"""The student of the distillation: its logits, and its gradients against those of autograd."""

from typing import Any

import pytest
import torch
from calibrating import Replaced, small_checkpoint
from conftest import FAMILIES, MakeCheckpoint
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration.loss import TeacherLogits, compare, divergence, teacher_logits
from exporter.calibration.student import RoundedLinear, RoundedWeight, Student
from exporter.inference.reference import score
from exporter.model.checkpoint import Checkpoint
from exporter.model.decoder import attend_causal, load_decoder
from exporter.quantization.activations import round_rows_to_int8
from exporter.quantization.gptq import GptqResult
from exporter.quantization.rounding import SMALLEST_SCALE, quantize, to_scale_grid
from exporter.quantization.schemes import CODE_RANGE, FLOAT, QuantizedTensor, Scheme

EMBEDDING = "model.embed_tokens.weight"
SCHEMES = pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, 64), Scheme(4)], ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def starts_of(
    checkpoint: Checkpoint, scheme: Scheme, floats: tuple[str, ...] = ()
) -> dict[str, GptqResult]:
    shapes = checkpoint.config.parameter_shapes()
    weights = {
        name: checkpoint.float_weight(name)
        for name, shape in shapes.items()
        if len(shape) == 2 and name not in floats
    }
    return {
        name: GptqResult(quantize(weight, scheme, "mse"), weight)
        for name, weight in weights.items()
    }


def with_integers(checkpoint: Checkpoint, starts: dict[str, GptqResult]) -> Replaced:
    return Replaced(checkpoint, {name: one.rounded.dequantize() for name, one in starts.items()})


# One rounded weight.


def clipping(scheme: Scheme, rows: int = 40, columns: int = 128) -> GptqResult:
    """A weight with scales so small that some of it lies outside of the codes."""
    weight = random(rows, columns)
    rounded = quantize(weight, scheme, "absmax")
    scales = to_scale_grid(rounded.scales * 0.4)
    return GptqResult(QuantizedTensor(rounded.codes, scales, scheme), weight)


def by_autograd(codes: Tensor, log_scales: Tensor, bits: int) -> Tensor:
    """Straight-through estimators: what rounds is detached, all else is autograd's."""
    lowest, highest = CODE_RANGE[bits]
    on_grid = to_scale_grid(log_scales.exp()).detach()
    scale = (on_grid * (log_scales - log_scales.detach()).exp())[..., None]
    clipped = codes.clamp(lowest - 0.5, highest + 0.5)
    code = clipped + (clipped.round().clamp(lowest, highest) - clipped).detach()
    return (code.unflatten(1, (log_scales.shape[1], -1)) * scale).flatten(1)


@pytest.mark.parametrize("rows", [40, 6000], ids=["one block", "several blocks"])
@SCHEMES
def test_the_gradients_of_a_rounded_weight_are_those_of_autograd(scheme: Scheme, rows: int) -> None:
    start = clipping(scheme, rows)
    lowest, highest = CODE_RANGE[scheme.bits or 0]
    learned, arriving = RoundedWeight(start), random(rows, 128, seed=1)
    codes, log_scales = (
        parameter.detach().clone().requires_grad_()
        for parameter in (learned.codes, learned.log_scales)
    )
    outside = (codes < lowest - 0.5) | (codes > highest + 0.5)
    assert 0.005 < outside.float().mean() < 0.5
    result, expected = learned(torch.float32), by_autograd(codes, log_scales, learned.bits)
    torch.testing.assert_close(result, expected)
    result.backward(arriving)
    expected.backward(arriving)
    torch.testing.assert_close(learned.codes.grad, codes.grad)
    torch.testing.assert_close(learned.log_scales.grad, log_scales.grad, rtol=1e-4, atol=1e-4)
    assert learned.codes.grad is not None
    assert torch.equal(learned.codes.grad == 0, outside)


@SCHEMES
def test_a_scale_is_learned_without_changing_a_code(scheme: Scheme) -> None:
    learned = RoundedWeight(clipping(scheme))
    before = learned.quantized()
    with torch.no_grad():
        learned.log_scales += 0.1 * random(*learned.log_scales.shape)
    after = learned.quantized()
    assert torch.equal(after.codes, before.codes)
    assert not torch.equal(after.scales, before.scales)


@SCHEMES
def test_a_rounded_weight_is_what_it_would_be_stored_as(scheme: Scheme) -> None:
    learned = RoundedWeight(clipping(scheme))
    stored = learned.quantized()
    assert torch.equal(learned(torch.float32), stored.dequantize())
    assert torch.equal(to_scale_grid(stored.scales), stored.scales)
    assert torch.equal(learned(torch.bfloat16), stored.dequantize().bfloat16())


@SCHEMES
def test_a_start_that_is_not_trained_comes_back_with_its_own_codes(scheme: Scheme) -> None:
    weight = random(40, 128)
    rounded = quantize(weight, scheme, "mse")
    stored = RoundedWeight(GptqResult(rounded, weight)).quantized()
    assert torch.equal(stored.codes, rounded.codes)
    assert torch.equal(stored.scales, rounded.scales)


def test_the_smallest_scale_survives_being_learned_as_a_logarithm() -> None:
    rounded = quantize(torch.zeros(2, 32), Scheme(4, 32), "mse")
    stored = RoundedWeight(GptqResult(rounded, torch.zeros(2, 32))).quantized()
    assert (stored.scales == SMALLEST_SCALE).all()


# The whole student.


@pytest.mark.parametrize("floats", [(), (EMBEDDING,)], ids=["all", "float embedding"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_the_student_computes_what_a_decoder_of_its_integers_does_to_the_last_bit(
    base: dict[str, Any], tied: bool, floats: tuple[str, ...], make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, base, tie_word_embeddings=tied)
    starts = starts_of(checkpoint, Scheme(4, 32), floats)
    student = Student(checkpoint, starts, 24)
    tokens = torch.randint(96, (3, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states, weight = student(tokens)
        logits = load_decoder(with_integers(checkpoint, starts), 24).score(tokens)
    assert torch.equal(F.linear(states, weight), logits)
    assert sorted(student.learned()) == sorted(starts)
    for name, stored in student.quantized().items():
        assert torch.equal(stored.codes, starts[name].rounded.codes), name
        assert torch.equal(stored.scales, starts[name].rounded.scales), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_only_quantized_weights_and_their_scales_learn(
    tied: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, tie_word_embeddings=tied)
    student = Student(checkpoint, starts_of(checkpoint, Scheme(4, 32)), 24)
    states, weight = student(torch.arange(24)[None])
    F.linear(states, weight).square().mean().backward()
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * len(student.learned())
    for name, parameter in student.named_parameters():
        learns = name.endswith((".rounded.codes", ".rounded.log_scales"))
        assert learns is parameter.requires_grad is (parameter.grad is not None), name
        assert not learns or parameter.grad.abs().sum() > 0, name


def test_a_tied_embedding_learns_from_both_of_its_uses(make_checkpoint: MakeCheckpoint) -> None:
    """Its gradient is the sum of what an embedding and an output layer of their own would get."""
    checkpoint = small_checkpoint(make_checkpoint)
    starts = starts_of(checkpoint, Scheme(4, 32))
    tokens = torch.arange(24)[None]
    student = Student(checkpoint, starts, 24)
    states, weight = student(tokens)
    F.linear(states, weight).square().mean().backward()
    table = starts[EMBEDDING].rounded.dequantize().requires_grad_()
    output = starts[EMBEDDING].rounded.dequantize().requires_grad_()
    decoder = load_decoder(with_integers(checkpoint, starts), 24)
    decoder.model.embed_tokens = Lookup(table)
    F.linear(
        decoder.hidden_states(tokens, torch.arange(24), attend_causal), output
    ).square().mean().backward()
    assert table.grad is not None and output.grad is not None
    learned = student.learned()[EMBEDDING]
    scales = starts[EMBEDDING].rounded.scales
    expected = (table.grad + output.grad).unflatten(1, (scales.shape[1], -1)) * scales[..., None]
    assert learned.codes.grad is not None
    inside = learned.codes.grad != 0
    torch.testing.assert_close(
        learned.codes.grad, expected.flatten(1) * inside, rtol=1e-3, atol=1e-6
    )


class Lookup(torch.nn.Module):
    """An embedding whose table belongs to someone else."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = [table]

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table[0])


def test_a_student_with_int8_activations_computes_what_the_reference_simulates(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    starts = starts_of(checkpoint, Scheme(4, 32))
    tokens = list(range(5, 29))
    with torch.no_grad():
        states, weight = Student(checkpoint, starts, 24, round_rows_to_int8)(torch.tensor([tokens]))
    expected, exact = (
        score(with_integers(checkpoint, starts), tokens, range(24), rounding)
        for rounding in (round_rows_to_int8, None)
    )
    found = F.linear(states[0], weight)
    assert (found - expected).abs().mean() < 0.02 * (exact - expected).abs().mean()


def test_rounded_activations_pass_their_gradient_straight_through() -> None:
    weight = random(16, 32)
    start = GptqResult(quantize(weight, Scheme(4, 32), "mse"), weight)
    layer = RoundedLinear(start, round_rows_to_int8)
    x, arriving = random(5, 32, seed=2).requires_grad_(), random(5, 16, seed=3)
    found = layer(x)
    torch.testing.assert_close(
        found, round_rows_to_int8(x.detach()) @ start.rounded.dequantize().t()
    )
    assert not torch.allclose(found, x @ start.rounded.dequantize().t(), atol=1e-3)
    found.backward(arriving)
    torch.testing.assert_close(x.grad, arriving @ start.rounded.dequantize())


# The loss.

VOCABULARY, HIDDEN = 50, 16


def kl_by_autograd(logits: Tensor, student: Tensor, top_k: int, temperature: float) -> Tensor:
    """Mean KL times temperature²: over all tokens, or over the likeliest and one bucket more."""
    log_p, log_q = ((one / temperature).log_softmax(-1) for one in (logits, student))
    if top_k:
        ids = logits.topk(top_k).indices
        p, q = (
            torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), -1)
            for kept in (one.exp().gather(-1, ids) for one in (log_p, log_q))
        )
        log_p, log_q = p.log(), q.log()
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


@pytest.mark.parametrize("positions", [7, 600])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 6])
def test_the_loss_and_its_gradients_are_those_of_autograd(
    top_k: int, temperature: float, positions: int
) -> None:
    """600 positions are three blocks, the last one not full."""
    logits = 2 * random(positions, VOCABULARY)
    states = random(positions, HIDDEN, seed=1).requires_grad_()
    weight = random(VOCABULARY, HIDDEN, seed=2).mul(0.5).requires_grad_()
    teacher = teacher_logits(logits, top_k, temperature)
    loss = divergence(states, weight, teacher, temperature)
    (3 * loss).backward()
    exact_states, exact_weight = (
        one.detach().double().requires_grad_() for one in (states, weight)
    )
    expected = kl_by_autograd(logits.double(), exact_states @ exact_weight.t(), top_k, temperature)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > 0.05
    for found, exact in ((states, exact_states), (weight, exact_weight)):
        assert found.grad is not None and exact.grad is not None
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 1])
def test_as_many_tokens_as_there_are_is_all_of_them(top_k: int) -> None:
    logits = random(3, VOCABULARY)
    found = teacher_logits(logits, top_k, 2.0)
    assert found.ids is None
    assert torch.equal(found.log_probabilities, (logits / 2).log_softmax(-1))


@pytest.mark.parametrize("top_k", [0, 6])
def test_a_student_that_says_the_same_has_no_loss_and_no_gradient(top_k: int) -> None:
    states, weight = random(9, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN, seed=1)
    teacher = teacher_logits(F.linear(states.detach(), weight), top_k, 1.0)
    loss = divergence(states, weight, teacher)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert states.grad is not None and states.grad.abs().max() < 1e-6


def test_a_teacher_that_is_sure_of_its_tokens_gives_a_finite_loss() -> None:
    """Nothing is left for the bucket of all others."""
    logits = torch.full((4, VOCABULARY), -100.0)
    logits[:, 3] = 100
    states = random(4, HIDDEN).requires_grad_()
    teacher = teacher_logits(logits, 2, 1.0)
    loss = divergence(states, random(VOCABULARY, HIDDEN, seed=1), teacher)
    loss.backward()
    assert loss.isfinite() and states.grad is not None and states.grad.isfinite().all()
    sure = torch.zeros(4, HIDDEN)
    sure[:, 0] = 100
    output = torch.zeros(VOCABULARY, HIDDEN)
    output[3, 0] = 1
    assert divergence(sure, output, teacher).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_under_bfloat16_is_near_the_exact_one() -> None:
    logits = 2 * random(40, VOCABULARY)
    states, weight = random(40, HIDDEN, seed=1), random(VOCABULARY, HIDDEN, seed=2)
    gradients = []
    for enabled in (False, True):
        leaf = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            divergence(leaf, weight, teacher_logits(logits, 0, 1.0)).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    exact, low = gradients
    assert not torch.equal(exact, low)
    assert F.cosine_similarity(exact.flatten(), low.flatten(), dim=0) > 0.999


def test_compare_gives_sums_over_positions() -> None:
    teacher, student = random(600, HIDDEN), random(600, HIDDEN, seed=1)
    theirs, ours = random(VOCABULARY, HIDDEN, seed=2), random(VOCABULARY, HIDDEN, seed=3)
    kl, same = compare(teacher, theirs, student, ours)
    logits, others = F.linear(teacher, theirs), F.linear(student, ours)
    assert kl == pytest.approx(600 * kl_by_autograd(logits, others, 0, 1.0).item(), rel=1e-4)
    assert same == (logits.argmax(-1) == others.argmax(-1)).sum().item()
    assert 0 < same < 600
    assert compare(teacher, theirs, teacher, theirs) == (pytest.approx(0, abs=1e-4), 600)


def test_a_teacher_of_few_tokens_keeps_their_probabilities_and_ids() -> None:
    logits = random(5, VOCABULARY)
    found = teacher_logits(logits, 4, 1.0)
    assert isinstance(found, TeacherLogits) and found.ids is not None
    assert found.ids.dtype == torch.int32
    expected = logits.log_softmax(-1).gather(-1, found.ids.long())
    assert torch.equal(found.log_probabilities, expected)
    assert torch.equal(found.ids[:, 0].long(), logits.argmax(-1))


def test_schemes_name_what_is_learned(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    student = Student(checkpoint, starts_of(checkpoint, Scheme(8)), 8)
    shapes = checkpoint.config.parameter_shapes()
    assert student.schemes() == {n: Scheme(8) for n, s in shapes.items() if len(s) == 2}
    assert FLOAT not in student.schemes().values()
