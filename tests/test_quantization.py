"""Integers on the portable scale grid, the quantized checkpoint, the folder of its float values."""

import json
import shutil
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LLAMA, LLAMA4, NANO, MakeCheckpoint, random_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporter.backends.executorch.schemes import FILTER, TABLE
from exporter.backends.onnx.schemes import UNSIGNED
from exporter.errors import InputError
from exporter.files import differing_files, sha256
from exporter.inference.reference import score
from exporter.model.checkpoint import COMPANION_FILES, Checkpoint, open_checkpoint
from exporter.model.config import parse_config
from exporter.quantization.dequantized import write_dequantized
from exporter.quantization.packing import TWOS_COMPLEMENT, Packing
from exporter.quantization.plan import QuantizationPlan, plan_schemes
from exporter.quantization.quantized_checkpoint import (
    MANIFEST,
    WEIGHTS,
    QuantizedCheckpoint,
    damaged_tensors,
    finished_quantized,
    open_quantized,
    quantized_identity,
    source_hashes,
    write_quantized,
)
from exporter.quantization.rounding import LARGEST_SCALE, SMALLEST_SCALE, quantize, to_scale_grid
from exporter.quantization.schemes import (
    CODE_RANGE,
    FLOAT,
    GROUP_SIZES,
    QuantizedTensor,
    Scheme,
    parse_scheme,
)

INT4, INT8 = Scheme(4, 32), Scheme(8)
SCHEMES = [Scheme(4, 32), Scheme(4, 64), Scheme(4, 256), Scheme(4), Scheme(8, 32), Scheme(8)]
METHODS = ["absmax", "mse"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
CODES = f"{Q_PROJ}.codes"
V_PROJ = "model.layers.1.self_attn.v_proj.weight"


# Integers.


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _one_outlier() -> Tensor:
    weight = normal(8, 256) * 0.02
    weight[:, 5] = 3.0
    return weight


#: Every kind of weight that a group may hold, [8, 256].
KINDS: dict[str, Tensor] = {
    "normal": normal(8, 256) * 0.02,
    "bfloat16": (normal(8, 256) * 0.02).to(torch.bfloat16),
    "float16": (normal(8, 256) * 0.02).to(torch.float16),
    "wide": normal(8, 256) * torch.logspace(-6, 2, 256)[torch.randperm(256)],
    "rows of every size": normal(8, 256) * torch.logspace(-9, 3, 8)[:, None],
    "zero rows": torch.cat((torch.zeros(4, 256), normal(4, 256))),
    "all zero": torch.zeros(8, 256),
    "tiny": normal(8, 256) * 1e-8,
    "subnormal": torch.full((8, 256), 1e-42),
    "large": normal(8, 256) * 1e4,
    "constant": torch.full((8, 256), 0.3),
    "constant negative": torch.full((8, 256), -0.3),
    "positive only": normal(8, 256).abs(),
    "negative only": -normal(8, 256).abs(),
    "one outlier": _one_outlier(),
}
each_kind = pytest.mark.parametrize("weight", KINDS.values(), ids=KINDS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def group_errors(weight: Tensor, result: QuantizedTensor) -> Tensor:
    """Squared error of each group [out_features, groups], in float64."""
    difference = result.dequantize().double() - weight.double()
    return difference.unflatten(1, (result.scales.shape[1], -1)).square().sum(-1)


@each_kind
@each_scheme
def test_every_scale_is_exact_in_bfloat16_and_in_float16(scheme: Scheme, weight: Tensor) -> None:
    for method in METHODS:
        scales = quantize(weight, scheme, method).scales
        assert scales.shape == scheme.scale_shape(tuple(weight.shape)), method
        assert torch.equal(scales.to(torch.bfloat16).to(torch.float32), scales), method
        assert torch.equal(scales.to(torch.float16).to(torch.float32), scales), method
        assert (scales >= SMALLEST_SCALE).all(), method


@each_kind
@each_scheme
def test_codes_are_within_their_range(scheme: Scheme, weight: Tensor) -> None:
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    for method in METHODS:
        codes = quantize(weight, scheme, method).codes
        assert (codes.dtype, codes.shape) == (torch.int8, weight.shape), method
        assert lowest <= codes.min() <= codes.max() <= highest, method


@each_kind
@each_scheme
def test_absmax_clips_nothing(scheme: Scheme, weight: Tensor) -> None:
    """A value that is not clipped is at most half a step from its code."""
    result = quantize(weight, scheme, "absmax")
    steps = result.scales.repeat_interleave(256 // result.scales.shape[1], 1)
    assert ((result.dequantize() - weight.float()).abs() <= steps * 0.500001).all()


@each_kind
@each_scheme
def test_mse_is_nowhere_worse_than_absmax(scheme: Scheme, weight: Tensor) -> None:
    mse, absmax = (group_errors(weight, quantize(weight, scheme, m)) for m in ("mse", "absmax"))
    assert (mse <= absmax * (1 + 1e-6)).all()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4)], ids=str)
def test_mse_is_better_than_absmax_on_ordinary_weights(scheme: Scheme) -> None:
    weight = normal(64, 256)
    mse, absmax = (
        group_errors(weight, quantize(weight, scheme, m)).sum() for m in ("mse", "absmax")
    )
    assert mse < 0.95 * absmax


@each_scheme
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_codes_times_a_scale_on_the_grid_come_back_exactly(
    method: str, scheme: Scheme
) -> None:
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(lowest, highest + 1, (8, 256), generator=generator, dtype=torch.int8)
    grouped = codes.unflatten(1, (scheme.scale_shape((8, 256))[1], -1))
    grouped[..., 0], grouped[..., 1] = lowest, highest
    scales = to_scale_grid(normal(8, grouped.shape[1], seed=1).abs() + 0.01)
    weight = QuantizedTensor(codes, scales, scheme).dequantize()
    result = quantize(weight, scheme, method)
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.scales, scales)


@each_scheme
def test_dequantize_is_codes_times_scales(scheme: Scheme) -> None:
    result = quantize(normal(8, 256), scheme, "mse")
    width = 256 // result.scales.shape[1]
    codes, scales, weight = result.codes.numpy(), result.scales.numpy(), result.dequantize()
    assert weight.dtype == torch.float32
    for row in range(8):
        for column in range(256):
            expected = np.float32(codes[row, column]) * scales[row, column // width]
            assert weight[row, column].item() == expected, (row, column)


@each_kind
def test_zero_stays_exactly_zero(weight: Tensor) -> None:
    holed = weight.clone()
    holed[:, ::3] = 0
    assert not quantize(holed, INT4, "mse").dequantize()[:, ::3].any()


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    weight = normal(4, 64)
    changed = weight.clone()
    changed[:, 32:] *= 100
    one, other = quantize(weight, INT4, "mse"), quantize(changed, INT4, "mse")
    assert torch.equal(one.scales[:, 0], other.scales[:, 0])
    assert torch.equal(one.codes[:, :32], other.codes[:, :32])
    assert not torch.equal(one.scales[:, 1], other.scales[:, 1])


def test_a_weight_of_many_blocks_is_quantized_like_its_rows() -> None:
    weight = normal(3000, 256)  # three blocks of rows and a part of one
    whole = quantize(weight, INT4, "mse")
    for row in (0, 1023, 1024, 2047, 2048, 2999):
        alone = quantize(weight[row : row + 1], INT4, "mse")
        assert torch.equal(whole.codes[row : row + 1], alone.codes), row
        assert torch.equal(whole.scales[row : row + 1], alone.scales), row


def test_the_scale_grid_is_kept_where_it_is() -> None:
    """Every number with 8 significant bits from 2^-14 to 65280: all there are."""
    grid = torch.tensor([(128 + m) * 2.0**e for e in range(-21, 9) for m in range(128)])
    assert (grid[0].item(), grid[-1].item()) == (SMALLEST_SCALE, LARGEST_SCALE)
    assert torch.equal(to_scale_grid(grid), grid)


@pytest.mark.parametrize(
    ("scale", "nearest"),
    [
        (0.0, SMALLEST_SCALE),
        (1e-30, SMALLEST_SCALE),
        (1.0, 1.0),
        (1.003, 1.0),
        (1.005, 1.0078125),
        (0.1, 0.10009765625),
        (65500.0, LARGEST_SCALE),
        (1e30, LARGEST_SCALE),
    ],
)
def test_a_scale_goes_to_the_nearest_on_the_grid(scale: float, nearest: float) -> None:
    assert to_scale_grid(torch.tensor([scale])).item() == nearest


#: Every way in which a format keeps codes.
PACKINGS = {
    "two's complement": TWOS_COMPLEMENT,
    "XNNPACK": FILTER,
    "an embedding of ExecuTorch": TABLE,
    "MatMulNBits": UNSIGNED,
}
each_packing = pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)


@each_packing
def test_unpacking_is_the_inverse_of_packing_for_every_byte(packing: Packing) -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    for bits, lowest, highest in ((4, -8, 7), (8, -128, 127)):
        codes = packing.unpack(packed, bits)
        assert (codes.dtype, codes.shape) == (torch.int8, (16, 16 * 8 // bits))
        assert (codes.min(), codes.max()) == (lowest, highest)
        assert torch.equal(packing.pack(codes, bits), packed)


@each_packing
def test_packing_is_the_inverse_of_unpacking_for_every_pair_of_codes(packing: Packing) -> None:
    pairs = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.int8)] * 2)
    for codes in (pairs, pairs.t().contiguous().t()):  # also where they do not lie in order
        assert torch.equal(packing.unpack(packing.pack(codes, 4), 4), codes)


@pytest.mark.parametrize(
    ("low", "high", "byte"),
    [(0, 0, 0x00), (7, 0, 0x07), (0, 7, 0x70), (-1, 0, 0x0F), (0, -8, 0x80), (-8, 7, 0x78)],
)
def test_even_columns_lie_in_the_low_nibble(low: int, high: int, byte: int) -> None:
    assert TWOS_COMPLEMENT.pack(torch.tensor([[low, high]], dtype=torch.int8), 4).item() == byte


@pytest.mark.parametrize(
    ("packing", "byte"), [(FILTER, 0xF0), (UNSIGNED, 0xF0), (TABLE, 0x0F), (TWOS_COMPLEMENT, 0x78)]
)
def test_the_lowest_and_the_highest_code_lie_as_each_format_wants_them(
    packing: Packing, byte: int
) -> None:
    assert packing.pack(torch.tensor([[-8, 7]], dtype=torch.int8), 4).item() == byte


@pytest.mark.parametrize(
    ("packing", "byte"), [(FILTER, 0x81), (UNSIGNED, 0x01), (TABLE, 0x81), (TWOS_COMPLEMENT, 0x81)]
)
def test_a_code_of_int8_lies_as_each_format_wants_it(packing: Packing, byte: int) -> None:
    assert packing.pack(torch.tensor([[-127]], dtype=torch.int8), 8).item() == byte


@each_packing
@pytest.mark.parametrize("bits", [2, 5, 6, 16])
def test_codes_of_other_bits_are_packed_nowhere(packing: Packing, bits: int) -> None:
    codes = torch.zeros(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"codes of {bits} bits"):
        packing.pack(codes, bits)
    with pytest.raises(ValueError, match=f"codes of {bits} bits"):
        packing.unpack(codes.view(torch.uint8), bits)


@pytest.mark.parametrize("bits", [0, 3, 5, 6, 16])
def test_there_is_no_scheme_of_other_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"no scheme of {bits} bits"):
        Scheme(bits)


def test_a_weight_left_in_float_has_no_codes() -> None:
    with pytest.raises(ValueError, match="has no codes"):
        FLOAT.parts((4, 64))


@each_scheme
def test_a_weight_is_stored_in_the_parts_that_its_scheme_names(scheme: Scheme) -> None:
    result = quantize(normal(8, 256), scheme, "absmax")
    stored = scheme.pack(result)
    described = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.items()}
    assert described == scheme.parts((8, 256))
    found = scheme.unpack(stored.__getitem__)
    assert torch.equal(found.codes, result.codes)
    assert torch.equal(found.scales, result.scales)
    assert (found.scales.dtype, found.scheme) == (torch.float32, scheme)


def test_a_method_that_needs_more_than_the_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="'gptq'"):
        quantize(normal(8, 64), INT4, "gptq")


@pytest.mark.parametrize(
    ("text", "scheme"),
    [("float", FLOAT), ("int4", Scheme(4)), ("int8", Scheme(8))]
    + [(f"int{bits}-g{size}", Scheme(bits, size)) for bits in (4, 8) for size in GROUP_SIZES],
)
def test_a_scheme_is_read_and_written_alike(text: str, scheme: Scheme) -> None:
    assert parse_scheme(text, "here") == scheme
    assert str(scheme) == text


@pytest.mark.parametrize(
    "text",
    ["", "int3", "int16", "int4-g", "int4-g0", "int4-g48", "int4-g512", "int4-32", "INT4", "Float",
     "int4-g32 ", " int8", "int4-g-32", "int8\n", "fp16", 4, None, True,
     ["int4"]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_scheme_is_refused_with_the_schemes_there_are(text: object) -> None:
    with pytest.raises(InputError) as raised:
        parse_scheme(text, "quantization.linear")
    message = str(raised.value)
    assert message.startswith(f"quantization.linear: {text!r} is not a scheme")
    assert "32, 64, 128, 256" in message


@pytest.mark.parametrize(
    ("scheme", "shape", "parts"),
    [
        ("int4-g64", (8, 96), ["groups of 64", "width 96"]),
        ("int8-g256", (8, 128), ["groups of 256", "width 128"]),
        ("int4", (8, 33), ["even input width", "33"]),
        ("int4-g32", (64,), ["needs a matrix", "[64]"]),
        ("int8", (64,), ["needs a matrix", "[64]"]),
    ],
)
def test_a_shape_that_a_scheme_cannot_hold_has_a_reason(
    scheme: str, shape: tuple[int, ...], parts: list[str]
) -> None:
    problem = parse_scheme(scheme, "").problem_with(shape)
    assert problem
    assert all(part in problem for part in parts)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [("int4-g32", (1, 32)), ("int8", (7, 33)), ("int4", (7, 34)), ("float", (5,))],
)
def test_a_shape_that_a_scheme_can_hold_has_no_problem(scheme: str, shape: tuple[int, ...]) -> None:
    assert parse_scheme(scheme, "").problem_with(shape) is None


@each_scheme
def test_stored_bytes_are_those_of_packed_codes_and_float16_scales(scheme: Scheme) -> None:
    result = quantize(normal(8, 256), scheme, "absmax")
    packed = scheme.pack(result)
    assert scheme.stored_bytes((8, 256)) == sum(part.nbytes for part in packed.values())
    assert packed["codes"].nbytes == 256 * (scheme.bits or 0)


# Plans.


def shapes_of(config: dict[str, Any] = LLAMA4) -> dict[str, tuple[int, ...]]:
    return parse_config(config, Path("config.json")).parameter_shapes()


def planned(
    overrides: dict[str, Scheme] | None = None, embedding: Scheme = INT8, linear: Scheme = INT4
) -> QuantizationPlan:
    return plan_schemes(shapes_of(), linear, embedding, overrides or {}, "mse")


def test_linear_layers_and_embedding_have_their_schemes_and_norms_stay_float() -> None:
    schemes = planned().schemes
    assert list(schemes) == list(shapes_of())
    for name, shape in shapes_of().items():
        expected = FLOAT if len(shape) == 1 else INT8 if name == EMBEDDING else INT4
        assert schemes[name] == expected, name


def test_an_output_layer_of_its_own_is_a_linear_layer() -> None:
    plan = plan_schemes(shapes_of(LLAMA), INT4, INT8, {}, "mse")
    assert plan.schemes[HEAD] == INT4


def test_every_float_weight_has_its_reason_and_nothing_else_has() -> None:
    plan = planned({"*.v_proj.*": FLOAT}, embedding=FLOAT)
    floats = {name for name, scheme in plan.schemes.items() if scheme == FLOAT}
    assert set(plan.reasons) == floats
    assert plan.reasons[NORM] == "a normalization weight, one vector"
    assert plan.reasons[V_PROJ] == plan.reasons[EMBEDDING] == "the recipe keeps it in float"


def test_an_override_sets_what_its_pattern_matches_and_nothing_else() -> None:
    schemes = planned({"model.layers.1.*_proj.weight": INT8}).schemes
    plain = planned().schemes
    changed = {name for name in schemes if schemes[name] != plain[name]}
    assert changed == {n for n in schemes if n.startswith("model.layers.1.") and "_proj" in n}
    assert all(schemes[name] == INT8 for name in changed)


@pytest.mark.parametrize("last", [INT4, INT8, FLOAT], ids=str)
def test_the_last_override_that_matches_wins(last: Scheme) -> None:
    overrides = {"*.q_proj.*": INT8, Q_PROJ: FLOAT, "*.0.*_proj.*": last}
    assert planned(overrides).schemes[Q_PROJ] == last


@pytest.mark.parametrize("pattern", ["*.qkv_proj.*", "model.layers.2.*", "Q_PROJ", "q_proj", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(InputError) as raised:
        planned({pattern: INT8})
    assert f"quantization.overrides: {pattern}" in str(raised.value)
    assert "matches no tensor" in str(raised.value)
    assert Q_PROJ in raised.value.remedy


def test_a_group_that_does_not_divide_is_refused_with_its_tensor() -> None:
    with pytest.raises(InputError) as raised:
        planned(linear=Scheme(4, 64))
    assert "self_attn.o_proj.weight" in str(raised.value)
    assert "groups of 64 do not divide its input width 96" in str(raised.value)
    assert "override" in raised.value.remedy


def test_a_group_that_does_not_divide_can_be_overridden() -> None:
    schemes = planned({"*.o_proj.*": INT4}, linear=Scheme(4, 64)).schemes
    assert schemes["model.layers.0.self_attn.o_proj.weight"] == INT4
    assert schemes[Q_PROJ] == Scheme(4, 64)


def test_a_norm_in_integers_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.norm\.weight: int8 needs a matrix"):
        planned({"model.norm.weight": INT8})


# The quantized checkpoint.


def no_tensor(name: str) -> None:
    """Show no progress."""


def write(checkpoint: Checkpoint, out: Path, **overrides: Scheme) -> QuantizedCheckpoint:
    """int4 with an int8 embedding, one float matrix, and what the test adds."""
    patterns = {V_PROJ: FLOAT, **overrides}
    shapes = checkpoint.config.parameter_shapes()
    plan = plan_schemes(shapes, INT4, INT8, patterns, "mse")
    identity = quantized_identity(checkpoint, plan, source_hashes(checkpoint))
    done = finished_quantized(out, identity)
    return done or write_quantized(checkpoint, plan, identity, out, no_tensor)


def small(make: MakeCheckpoint, **options: Any) -> Checkpoint:
    """A small checkpoint with text files beside its weights."""
    return with_text_files(make(**options))


def with_text_files(folder: Path) -> Checkpoint:
    (folder / "generation_config.json").write_text('{ "eos_token_id":5 }')
    (folder / "tokenizer.json").write_bytes(b"\x00 any bytes \xff\r\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n\n")
    (folder / "README.md").write_text("not part of the model")
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source")
    save_file(random_weights(LLAMA4, torch.bfloat16), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA4))
    return with_text_files(folder)


@pytest.fixture(scope="module")
def finished(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The quantized checkpoint of `source`, made once. Read only: `quantized_copy` may change."""
    return write(source, tmp_path_factory.mktemp("finished") / "quantized")


@pytest.fixture
def quantized_copy(finished: QuantizedCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path, tmp_path / "quantized"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def safetensors_by_hand(file: Path) -> dict[str, np.ndarray]:
    """A reader written from safetensors' own specification, for the dtypes of our format."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    kinds = {"I8": "i1", "U8": "u1", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}
    found, end = {}, 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end, "no gaps, in the order of the header"
        end = stop
        array = np.frombuffer(body[start:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        found[name] = array
    assert end == len(body)
    return found


def nibbles_by_hand(packed: np.ndarray) -> np.ndarray:
    """docs/quantized-checkpoint.md: column 2j in the low nibble of byte j, two's complement."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    for low, column in ((packed & 15, 0), (packed >> 4, 1)):
        codes[:, column::2] = np.where(low > 7, low.astype(np.int16) - 16, low)
    return codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_file_holds_what_its_readme_says(
    dtype: torch.dtype, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = small(make_checkpoint, dtype=dtype)
    quantized = write(checkpoint, tmp_path / "quantized")
    stored = safetensors_by_hand(tmp_path / "quantized" / "quantized.safetensors")
    for name in checkpoint.tensors:
        weight, scheme = checkpoint.read(name), quantized.schemes[name]
        if scheme == FLOAT:
            assert np.array_equal(stored.pop(name), weight.float().numpy()), name
            continue
        expected = quantize(weight, scheme, "mse")
        codes, scales = stored.pop(f"{name}.codes"), stored.pop(f"{name}.scales")
        codes = nibbles_by_hand(codes) if scheme.bits == 4 else codes
        assert (codes.dtype, scales.dtype) == (np.int8, np.float16)
        assert np.array_equal(codes, expected.codes.numpy()), name
        assert np.array_equal(scales.astype(np.float32), expected.scales.numpy()), name
        groups = np.repeat(scales.astype(np.float32), codes.shape[1] // scales.shape[1], 1)
        assert np.array_equal(codes * groups, quantized.float_weight(name).numpy()), name
    assert not stored, "nothing else is in the file"


def test_the_library_of_safetensors_reads_the_file_alike(finished: QuantizedCheckpoint) -> None:
    theirs = load_file(finished.path / WEIGHTS)
    ours = safetensors_by_hand(finished.path / WEIGHTS)
    assert set(theirs) == set(ours)
    assert all(np.array_equal(theirs[name].float().numpy(), ours[name]) for name in ours)


def test_the_order_in_the_file_is_that_of_the_computation(finished: QuantizedCheckpoint) -> None:
    stored = safetensors_by_hand(finished.path / WEIGHTS)
    names = [name.removesuffix(".codes").removesuffix(".scales") for name in stored]
    assert list(dict.fromkeys(names)) == list(finished.config.parameter_shapes())


def test_a_tied_output_layer_is_stored_once(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    weights = random_weights(LLAMA4, torch.bfloat16)
    checkpoint = small(make_checkpoint, weights={**weights, HEAD: weights[EMBEDDING].clone()})
    write(checkpoint, tmp_path / "quantized")
    stored = safetensors_by_hand(tmp_path / "quantized" / WEIGHTS)
    assert not [name for name in stored if name.startswith("lm_head")]
    assert f"{EMBEDDING}.codes" in stored


def test_an_untied_output_layer_is_stored_beside_the_embedding(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    write(small(make_checkpoint, base=LLAMA), tmp_path / "quantized")
    stored = safetensors_by_hand(tmp_path / "quantized" / WEIGHTS)
    assert {f"{HEAD}.codes", f"{EMBEDDING}.codes"} <= set(stored)


def test_configuration_and_tokenizer_files_are_the_sources_byte_for_byte(
    source: Checkpoint, finished: QuantizedCheckpoint
) -> None:
    given, written = contents(source.path), contents(finished.path)
    companions = set(given) & set(COMPANION_FILES)
    assert len(companions) == 4
    assert set(written) == companions | {WEIGHTS, MANIFEST}
    assert all(written[name] == given[name] for name in companions)


def test_the_manifest_says_what_was_done_to_what(
    source: Checkpoint, finished: QuantizedCheckpoint
) -> None:
    manifest = json.loads((finished.path / "quantization.json").read_text())
    assert set(manifest) == {
        "format_version", "model_type", "tensors", "method", "source", "files", "versions"
    }  # fmt: skip
    assert manifest["format_version"] == 1
    assert (manifest["model_type"], manifest["method"]) == ("llama4_text", "mse")
    assert manifest["tensors"][Q_PROJ] == {"scheme": "int4-g32"}
    assert manifest["tensors"][EMBEDDING] == {"scheme": "int8"}
    assert set(manifest["tensors"][NORM]) == {"scheme", "reason"}
    assert manifest["versions"]["torch"] == metadata.version("torch")
    read = [*COMPANION_FILES, "model.safetensors"]
    for key, folder, names in (
        ("source", source.path, read),
        ("files", finished.path, [*COMPANION_FILES, WEIGHTS]),
    ):
        present = {name: folder / name for name in names if (folder / name).is_file()}
        assert manifest[key] == {name: sha256(path) for name, path in present.items()}


def test_a_quantized_checkpoint_opened_again_is_the_one_written(
    finished: QuantizedCheckpoint,
) -> None:
    again = open_quantized(finished.path)
    assert again == finished
    assert (again.bos_token_id, again.eos_token_ids) == (0, (5,))


def test_two_writes_are_equal_to_the_last_byte(
    source: Checkpoint, finished: QuantizedCheckpoint, tmp_path: Path
) -> None:
    write(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished.path)


def test_a_quantized_checkpoint_does_not_depend_on_how_the_checkpoint_is_sharded(
    source: Checkpoint, finished: QuantizedCheckpoint, tmp_path: Path
) -> None:
    two = Path(shutil.copytree(source.path, tmp_path / "sharded"))
    weights = load_file(two / "model.safetensors")
    (two / "model.safetensors").unlink()
    names = list(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, two / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write(open_checkpoint(two), tmp_path / "quantized")
    assert sha256(tmp_path / "quantized" / WEIGHTS) == sha256(finished.path / WEIGHTS)


def test_a_finished_quantized_checkpoint_is_left_as_it_is(
    source: Checkpoint, quantized_copy: Path
) -> None:
    before = {path.name: path.stat().st_ino for path in quantized_copy.iterdir()}
    write(source, quantized_copy)
    assert {path.name: path.stat().st_ino for path in quantized_copy.iterdir()} == before


def _unfinish(quantized: Path) -> None:
    (quantized / MANIFEST).unlink()
    (quantized / WEIGHTS).write_bytes((quantized / WEIGHTS).read_bytes()[:1000])


def _flip(quantized: Path) -> None:
    data = bytearray((quantized / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (quantized / WEIGHTS).write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "manifest deleted": lambda quantized: (quantized / MANIFEST).unlink(),
    "killed while writing": _unfinish,
    "only a temporary file": lambda quantized: [
        (quantized / WEIGHTS).rename(quantized / f".{WEIGHTS}.tmp"),
        (quantized / MANIFEST).unlink(),
    ],
    "one bit of the weights": _flip,
    "another tokenizer": lambda quantized: (quantized / "tokenizer.json").write_text("{}"),
    "a tokenizer deleted": lambda quantized: (quantized / "tokenizer.json").unlink(),
    "a file that the source does not have": lambda quantized: [
        (quantized / "vocab.json").write_text("{}"),
        (quantized / MANIFEST).unlink(),
    ],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_quantized_checkpoint_that_is_not_whole_is_written_again_equal(
    damage: Callable[[Path], object], source: Checkpoint, quantized_copy: Path
) -> None:
    whole = contents(quantized_copy)
    damage(quantized_copy)
    assert contents(quantized_copy) != whole
    write(source, quantized_copy)
    assert contents(quantized_copy) == whole


def test_a_quantized_checkpoint_of_another_plan_is_written_anew(
    source: Checkpoint, quantized_copy: Path
) -> None:
    other = write(source, quantized_copy, **{Q_PROJ: INT8})
    assert other.schemes[Q_PROJ] == INT8
    assert not differing_files(quantized_copy, other.manifest["files"])


def test_weights_too_large_for_the_grid_are_refused_by_name(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    weights = random_weights(LLAMA4, torch.float32)
    weights[Q_PROJ][0, 0] = 1e6
    checkpoint = small(make_checkpoint, weights=weights)
    with pytest.raises(InputError) as raised:
        write(checkpoint, tmp_path / "quantized")
    assert raised.value.subject == Q_PROJ
    assert "float16 cannot hold" in raised.value.problem
    assert "override" in raised.value.remedy
    assert not (tmp_path / "quantized" / MANIFEST).exists()


# Damage that is found.


def rewrite(quantized: Path, change: Callable[[dict[str, Tensor]], object]) -> QuantizedCheckpoint:
    weights = load_file(quantized / WEIGHTS)
    change(weights)
    save_file(weights, quantized / WEIGHTS)
    return open_quantized(quantized)


def test_a_quantized_checkpoint_as_written_has_no_damaged_tensors(
    finished: QuantizedCheckpoint,
) -> None:
    assert damaged_tensors(finished) == {}


def _set(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[3] = value

    return change


BROKEN: dict[str, tuple[str, str, float, str]] = {
    "off the grid": (Q_PROJ, ".scales", 1 + 2**-10, "the scale 1.0009765625, which is not on"),
    "scale zero": (Q_PROJ, ".scales", 0.0, "the scale 0.0, which is not on"),
    "negative scale": (EMBEDDING, ".scales", -0.5, "the scale -0.5, which is not on"),
    "scale below the grid": (EMBEDDING, ".scales", 2.0**-15, "which is not on the portable grid"),
    "infinite scale": (Q_PROJ, ".scales", float("inf"), "the scale inf, which is not on"),
    "scale NaN": (Q_PROJ, ".scales", float("nan"), "the scale nan, which is not on"),
    "code -128": (EMBEDDING, ".codes", -128, "a code outside -127..127"),
    "norm NaN": (NORM, "", float("nan"), "holds NaN or infinity"),
    "matrix infinite": (V_PROJ, "", float("inf"), "holds NaN or infinity"),
}


@pytest.mark.parametrize(("name", "part", "value", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_tensor_that_breaks_the_format_is_named(
    name: str, part: str, value: float, problem: str, quantized_copy: Path
) -> None:
    problems = damaged_tensors(rewrite(quantized_copy, _set(f"{name}{part}", value)))
    assert list(problems) == [name]
    assert problem in problems[name]


# What is no quantized checkpoint.


def manifest_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(quantized: Path) -> None:
        manifest = json.loads((quantized / MANIFEST).read_text())
        change(manifest)
        (quantized / MANIFEST).write_text(json.dumps(manifest))

    return damage


def weights_with(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(quantized: Path) -> None:
        weights = load_file(quantized / WEIGHTS)
        change(weights)
        save_file(weights, quantized / WEIGHTS)

    return damage


def cut(size: int) -> Callable[[Path], object]:
    return lambda quantized: (quantized / WEIGHTS).write_bytes(
        (quantized / WEIGHTS).read_bytes()[:size]
    )


NO_QUANTIZED_CHECKPOINT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no manifest": (lambda w: (w / MANIFEST).unlink(), [MANIFEST, "no such file"]),
    "manifest cut": (lambda w: (w / MANIFEST).write_text("{"), [MANIFEST, "not valid JSON"]),
    "another version": (
        manifest_with(lambda m: m.update(format_version=2)),
        [MANIFEST, "format_version", "2 is not known", "reads 1", "quantize the checkpoint again"],
    ),
    "no version": (
        manifest_with(lambda m: m.pop("format_version")),
        ["format_version", "None is not known"],
    ),
    "no tensors": (
        manifest_with(lambda m: m.pop("tensors")),
        ["tensors", "is missing", "Quantize again"],
    ),
    "a tensor unlisted": (
        manifest_with(lambda m: m["tensors"].pop(Q_PROJ)),
        ["tensors", "does not list", "Quantize again"],
    ),
    "a tensor of no model": (
        manifest_with(lambda m: m["tensors"].update(x={"scheme": "int8"})),
        ["tensors", "does not list", "Quantize again"],
    ),
    "an unknown scheme": (
        manifest_with(lambda m: m["tensors"][Q_PROJ].update(scheme="int2")),
        [MANIFEST, Q_PROJ, "'int2' is not a scheme"],
    ),
    "no scheme": (manifest_with(lambda m: m["tensors"][Q_PROJ].clear()), [MANIFEST, Q_PROJ]),
    "a tensor as text": (
        manifest_with(lambda m: m["tensors"].update({Q_PROJ: "int4-g32"})),
        [MANIFEST, Q_PROJ],
    ),
    "another scheme": (
        manifest_with(lambda m: m["tensors"][Q_PROJ].update(scheme="int8")),
        [WEIGHTS, f"{Q_PROJ}.codes", "[96, 64]", "Quantize the checkpoint again"],
    ),
    "a scheme that does not fit": (
        manifest_with(lambda m: m["tensors"][NORM].update(scheme="int8")),
        [NORM],
    ),
    "no configuration": (lambda w: (w / "config.json").unlink(), ["config.json", "no such file"]),
    "no weights": (lambda w: (w / WEIGHTS).unlink(), [WEIGHTS, "not a whole safetensors file"]),
    "weights empty": (cut(0), [WEIGHTS, "not a whole safetensors file"]),
    "weights cut in the header": (cut(200), [WEIGHTS, "not a whole safetensors file"]),
    "weights cut at the end": (cut(-1), [WEIGHTS, "not a whole safetensors file"]),
    "codes missing": (
        weights_with(lambda t: t.pop(f"{Q_PROJ}.codes")),
        [WEIGHTS, f"{Q_PROJ}.codes", "missing or not of shape [96, 32]"],
    ),
    "scales missing": (
        weights_with(lambda t: t.pop(f"{Q_PROJ}.scales")),
        [WEIGHTS, f"{Q_PROJ}.scales", "missing or not of shape [96, 2]"],
    ),
    "scales of another shape": (
        weights_with(lambda t: t.update({f"{Q_PROJ}.scales": torch.ones(96, 4).half()})),
        [WEIGHTS, f"{Q_PROJ}.scales", "missing or not of shape [96, 2]"],
    ),
    "a float tensor missing": (
        weights_with(lambda t: t.pop(NORM)),
        [WEIGHTS, NORM, "missing or not of shape [64]"],
    ),
    "an extra tensor": (
        weights_with(lambda t: t.update({"model.extra": torch.ones(2)})),
        [WEIGHTS, "model.extra", "does not belong to this model"],
    ),
    "codes of another type": (
        weights_with(lambda t: t.update({f"{EMBEDDING}.codes": t[f"{EMBEDDING}.codes"].float()})),
        [WEIGHTS, f"{EMBEDDING}.codes"],
    ),
    "packed codes of another type": (
        weights_with(lambda t: t.update({CODES: t[CODES].view(torch.int8)})),
        [WEIGHTS, CODES],
    ),
    "scales of another type": (
        weights_with(lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].float()})),
        [WEIGHTS, f"{Q_PROJ}.scales"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "parts"), NO_QUANTIZED_CHECKPOINT.values(), ids=NO_QUANTIZED_CHECKPOINT
)
def test_what_is_no_whole_quantized_checkpoint_is_refused_with_the_entry(
    damage: Callable[[Path], object], parts: list[str], quantized_copy: Path
) -> None:
    damage(quantized_copy)
    with pytest.raises(InputError) as raised:
        open_quantized(quantized_copy)
    missing = [part for part in parts if part not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


# The folder with float values.


@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_the_dequantized_folder_in_float32_has_exactly_the_quantized_checkpoints_weights(
    base: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    quantized = write(small(make_checkpoint, base=base), tmp_path / "quantized")
    write_dequantized(quantized, torch.float32, tmp_path / "plain", no_tensor)
    plain = open_checkpoint(tmp_path / "plain")
    assert plain.config == quantized.config
    assert list(plain.tensors) == list(quantized.schemes)
    for name in plain.tensors:
        assert plain.tensors[name].dtype == torch.float32
        assert torch.equal(plain.read(name), quantized.float_weight(name)), name


def test_the_dequantized_folder_in_float16_is_exact_for_int4(tmp_path: Path) -> None:
    quantized = write_nano(tmp_path)
    write_dequantized(quantized, torch.float16, tmp_path / "plain", no_tensor)
    plain, compared = open_checkpoint(tmp_path / "plain"), 0
    for name, scheme in quantized.schemes.items():
        ours, theirs = quantized.float_weight(name), plain.float_weight(name)
        if scheme.bits == 4:
            exact = (ours == 0) | (ours.abs() >= 2**-14)
            assert torch.equal(ours[exact], theirs[exact]), name
            compared += int(exact.sum())
    assert compared > 1_000_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dequantized_folder_in_half_precision_is_rounded_once(
    dtype: torch.dtype, finished: QuantizedCheckpoint, tmp_path: Path
) -> None:
    write_dequantized(finished, dtype, tmp_path / "plain", no_tensor)
    plain = open_checkpoint(tmp_path / "plain")
    for name in plain.tensors:
        assert torch.equal(plain.read(name), finished.float_weight(name).to(dtype)), name


def test_the_dequantized_folder_has_the_sources_other_files(
    source: Checkpoint, finished: QuantizedCheckpoint, tmp_path: Path
) -> None:
    write_dequantized(finished, torch.float32, tmp_path / "plain", no_tensor)
    given, plain = contents(source.path), contents(tmp_path / "plain")
    assert set(plain) == set(given) - {"README.md"}
    written = {"model.safetensors", "config.json"}
    assert all(plain[name] == given[name] for name in plain if name not in written)
    config = {**json.loads(given["config.json"]), "dtype": "float32", "torch_dtype": "float32"}
    assert json.loads(plain["config.json"]) == config


def write_nano(out: Path) -> QuantizedCheckpoint:
    checkpoint = open_checkpoint(NANO)
    plan = plan_schemes(checkpoint.config.parameter_shapes(), INT4, INT4, {}, "absmax")
    return write_quantized(
        checkpoint,
        plan,
        quantized_identity(checkpoint, plan, source_hashes(checkpoint)),
        out / "nano",
        no_tensor,
    )


def test_the_dequantized_demo_in_transformers_has_the_logits_of_the_quantized_checkpoint(
    tmp_path: Path,
) -> None:
    quantized = write_nano(tmp_path)
    write_dequantized(quantized, torch.float32, tmp_path / "plain", no_tensor)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tokens = torch.randint(512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    ours = score(quantized, tokens, range(40), None)
    assert torch.allclose(ours, expected, atol=1e-4, rtol=0)
    float_logits = score(open_checkpoint(NANO), tokens, range(40), None)
    assert not torch.allclose(ours, float_logits, atol=1e-2), "int4 must show in the logits"
