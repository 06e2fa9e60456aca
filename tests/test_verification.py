"""Negative controls for `verify`: every kind of damage is found, located and counted."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import contents, flip, run
from conftest import LLAMA4, NANO, MakeCheckpoint
from executorch.exir._serialize import _program as pte
from lowering import check_logits
from safetensors.torch import load_file, save_file
from tampering import reseal

from exporter import pipeline
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.bundle import CHECKSUMS, Bundle, file_problems
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import EMBEDDING, parse_config
from exporter.model.rope import rope_frequencies
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.quantization.schemes import QuantizedTensor
from exporter.recipe import load_recipe
from exporter.verification.checks import Check, check_bundle_files, failures
from exporter.verification.integers import check_integers
from exporter.verification.runs import verification_text

Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.5.feed_forward.down_proj.weight"
NORM = "model.layers.3.post_attention_layernorm.weight"
FINAL_NORM = "model.norm.weight"
PTE = "executorch/model.pte"


@dataclass(frozen=True)
class Lowered:
    quantized: QuantizedCheckpoint
    folder: Path

    def copy(self, to: Path) -> FinishedArtifact:
        return open_artifact(Path(shutil.copytree(self.folder, to)))


@pytest.fixture(scope="module")
def int4(finished_bundle: Bundle) -> Lowered:
    return Lowered(finished_bundle.quantized, finished_bundle.path / "executorch")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    folder, recipe = tmp_path_factory.mktemp("int8"), load_recipe("mobilellm-r1-nano-int8")
    quantized = pipeline.quantize(recipe, open_checkpoint(NANO), folder / "quantized", no_progress)
    pipeline.lower(quantized, recipe.targets[0], folder / "artifact", no_progress)
    return Lowered(quantized, folder / "artifact")


@pytest.fixture(scope="module")
def executorch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verified in a fifth of the time that the demo bundle takes, which has all targets."""
    out = tmp_path_factory.mktemp("executorch") / "bundle"
    target = "targets=[{target: executorch, max_context: 1024}]"
    recipe = load_recipe("mobilellm-r1-nano-int4", [target])
    assert pipeline.export(recipe, open_checkpoint(NANO), out, no_progress).bundle is not None
    return out


@pytest.fixture
def executorch_copy(executorch_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(executorch_bundle, tmp_path / "bundle"))


def named_data(program: Path) -> dict[str, tuple[int, int]]:
    """Offset and size in the file of every named segment."""
    data = program.read_bytes()
    header = pte._get_extended_header(data[:64])
    assert header is not None
    content = pte._flatbuffer_to_program(data[: header.program_size])
    return {
        entry.key: (header.segment_base_offset + place.offset, place.size)
        for entry in content.named_data or []
        for place in [content.segments[entry.segment_index]]
    }


#: Both read the same bytes, codes and scales.
TIED = [f"{EMBEDDING} (filter)", f"{EMBEDDING} (table)"]


def failed(lowered: Lowered, artifact: FinishedArtifact) -> list[Check]:
    return list(failures(check_integers(lowered.quantized, artifact, lambda name: None)))


@pytest.mark.parametrize(
    ("recipe", "place", "subjects", "note"),
    [
        ("int4", Q_PROJ, [f"{Q_PROJ} (filter)"], "1 codes differ"),
        ("int4", f"{Q_PROJ}.scales", [f"{Q_PROJ} (filter)"], "1 scales differ"),
        ("int4", DOWN_PROJ, [f"{DOWN_PROJ} (filter)"], "1 codes differ"),
        ("int4", f"{DOWN_PROJ}.scales", [f"{DOWN_PROJ} (filter)"], "1 scales differ"),
        ("int4", EMBEDDING, TIED, "1 codes differ"),
        ("int4", f"{EMBEDDING}.scales", TIED, "1 scales differ"),
        ("int4", NORM, [f"{NORM} (constant)"], "1 values differ"),
        ("int4", FINAL_NORM, [f"{FINAL_NORM} (constant)"], "1 values differ"),
        ("int8", Q_PROJ, [f"{Q_PROJ} (filter)"], "1 codes differ"),
        ("int8", f"{Q_PROJ}.scales", [f"{Q_PROJ} (filter)"], "1 scales differ"),
        ("int8", EMBEDDING, TIED, "1 codes differ"),
        ("int8", f"{EMBEDDING}.scales", TIED, "1 scales differ"),
        ("int8", NORM, [f"{NORM} (constant)"], "1 values differ"),
    ],
)
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_of_the_program_is_reported_with_its_tensor_and_count(
    recipe: str,
    place: str,
    subjects: list[str],
    note: str,
    bit: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    lowered: Lowered = request.getfixturevalue(recipe)
    artifact = lowered.copy(tmp_path / "artifact")
    program = artifact.artifact.path / "model.pte"
    offset, size = named_data(program)[place]
    flip(program, offset + size // 3, bit)
    found = failed(lowered, artifact)
    assert [check.subject for check in found] == subjects
    assert {check.value for check in found} == {1}
    assert all(check.note.startswith(f"{note}; at [") for check in found), found


def test_several_flips_in_one_tensor_are_all_counted(int4: Lowered, tmp_path: Path) -> None:
    artifact = int4.copy(tmp_path / "artifact")
    program = artifact.artifact.path / "model.pte"
    offset, _ = named_data(program)[Q_PROJ]
    for index in (5, 6, 7):
        flip(program, offset + index)
        flip(program, offset + index, bit=4)
    (check,) = failed(int4, artifact)
    assert check.value == 6
    assert check.note.startswith("6 codes differ; at [0, 10] the artifact has ")


def test_the_first_difference_is_given_with_both_values(int4: Lowered, tmp_path: Path) -> None:
    artifact = int4.copy(tmp_path / "artifact")
    program = artifact.artifact.path / "model.pte"
    offset, _ = named_data(program)[Q_PROJ]
    flip(program, offset, bit=3)  # code plus 8 in the low nibble: its highest bit is worth 8
    weight = int4.quantized.read(Q_PROJ)
    assert isinstance(weight, QuantizedTensor)
    code = int(weight.codes[0, 0])
    (check,) = failed(int4, artifact)
    wrong = code - 8 if code >= 0 else code + 8
    assert (
        check.note
        == f"1 codes differ; at [0, 0] the artifact has {wrong}, the quantized checkpoint {code}"
    )


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_an_untouched_artifact_has_every_weight_of_the_quantized_checkpoint(
    recipe: str, request: pytest.FixtureRequest
) -> None:
    lowered: Lowered = request.getfixturevalue(recipe)
    checks = check_integers(lowered.quantized, open_artifact(lowered.folder), lambda name: None)
    assert all(check.passed for check in checks)
    names = {check.subject.split(" ")[0] for check in checks}
    assert names == set(lowered.quantized.schemes)


def test_no_quantized_weight_of_another_scheme_passes(int4: Lowered, int8: Lowered) -> None:
    checks = check_integers(int4.quantized, open_artifact(int8.folder), lambda name: None)
    passed = {check.subject.split(" ")[0] for check in checks if check.passed}
    quantized = {name for name, scheme in int4.quantized.schemes.items() if scheme.bits}
    assert passed & quantized == set()
    assert any(not check.passed for check in checks)


def test_a_flip_with_updated_checksums_is_found_by_its_integers(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(bundle_copy / PTE, named_data(bundle_copy / PTE)[Q_PROJ][0] + 9)
    reseal(bundle_copy)
    outcome = run(capsys, "verify", bundle_copy, "--quick", "--json")
    assert outcome.code == 1
    wrong = [check for check in outcome.json["checks"] if not check["passed"]]
    assert [(check["check"], check["subject"]) for check in wrong] == [
        ("integers", f"{Q_PROJ} (filter)")
    ]


def test_a_program_with_wrong_rope_frequencies_is_found_by_its_logits(
    executorch_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no weights: without deriving again, only running the program shows it."""
    data = (executorch_copy / PTE).read_bytes()
    config = open_quantized(executorch_copy / "quantized").config
    frequencies = rope_frequencies(config).numpy().tobytes()
    assert data.count(frequencies) == 1
    (executorch_copy / PTE).write_bytes(data.replace(frequencies, bytes(len(frequencies))))
    reseal(executorch_copy)
    outcome = run(capsys, "verify", executorch_copy, "--quick", "--json")
    assert outcome.code == 1
    wrong = {check["check"] for check in outcome.json["checks"] if not check["passed"]}
    assert wrong == {"logits.kl", "logits.top1", "logits.max_difference"}


#: Head sizes that groups of 32 divide.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def other_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = parse_config({**LLAMA4, **HEADS}, Path("config.json")).parameter_shapes()
    return {
        name: (torch.randn(shape, generator=generator) * 0.15 if len(shape) == 2 else
               torch.ones(shape)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }  # fmt: skip


def test_a_model_of_another_seed_fails_the_logits_with_the_values(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    recipe = load_recipe("mobilellm-r1-nano-int4", ["targets.0.max_context=128"])
    quantized_checkpoints = []
    for seed in (1, 2):
        folder = make_checkpoint(name=f"seed{seed}", weights=other_weights(seed), **HEADS)
        out = tmp_path / f"quantized{seed}"
        quantized_checkpoints.append(
            pipeline.quantize(recipe, open_checkpoint(folder), out, no_progress)
        )
    artifact = pipeline.lower(
        quantized_checkpoints[1], recipe.targets[0], tmp_path / "artifact", no_progress
    )
    text = verification_text(quantized_checkpoints[0], 128, None)
    own, foreign = (
        {check.check: check for check in check_logits(quantized, artifact, text)}
        for quantized in (quantized_checkpoints[1], quantized_checkpoints[0])
    )
    assert all(check.passed for check in own.values())
    kl = foreign["logits.kl"]
    assert not kl.passed
    assert kl.limit is not None
    assert kl.value > 100 * kl.limit > 0
    assert not foreign["logits.max_difference"].passed


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_program_never_reaches_the_runtime(share: float, executorch_copy: Path) -> None:
    program = executorch_copy / PTE
    program.write_bytes(program.read_bytes()[: int(program.stat().st_size * share)])
    checks = pipeline.verify(executorch_copy, no_progress)
    wrong = {(check.check, check.subject): check.note for check in failures(checks)}
    assert "has sha256" in wrong["files", PTE]
    assert wrong["logits", PTE] == "not run: the file is damaged"
    assert "integers" in {name for name, _ in wrong}


@pytest.mark.parametrize("name", ["quantized/quantized.safetensors", PTE])
def test_verify_exits_with_1_and_names_the_damaged_file(
    name: str, executorch_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(executorch_copy / name, (executorch_copy / name).stat().st_size // 2)
    outcome = run(capsys, "verify", executorch_copy)
    assert outcome.code == 1
    assert f"{name}: has sha256 " in outcome.out
    assert "checks failed" in outcome.out


def test_a_flipped_bit_in_the_quantized_checkpoint_shows_in_its_file_and_its_tensor(
    executorch_copy: Path,
) -> None:
    file = executorch_copy / "quantized" / "quantized.safetensors"
    quantized = open_quantized(executorch_copy / "quantized")
    weight = quantized.read(Q_PROJ)
    assert isinstance(weight, QuantizedTensor)
    packed = weight.codes & 0x0F
    wanted = (packed[:, 0::2] | packed[:, 1::2] << 4).numpy().tobytes()
    flip(file, file.read_bytes().index(wanted))
    wrong = list(failures(pipeline.verify(executorch_copy, no_progress)))
    assert [(check.check, check.subject) for check in wrong] == [
        ("files", "quantized/quantized.safetensors"),
        ("derived", "quantized/quantized.safetensors"),
        ("integers", f"{Q_PROJ} (filter)"),
    ]


def test_a_quantized_checkpoint_alone_is_verified_by_its_own_hashes(
    finished_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized = Path(shutil.copytree(finished_bundle.path / "quantized", tmp_path / "quantized"))
    flip(quantized / "quantized.safetensors", 500_000)
    outcome = run(capsys, "verify", quantized, "--json")
    assert outcome.code == 1
    wrong = [c["subject"] for c in outcome.json["checks"] if not c["passed"]]
    assert wrong == ["quantized.safetensors"]


def test_a_code_out_of_range_and_a_scale_off_the_grid_are_named(int8: Lowered) -> None:
    """In the quantized checkpoint itself, where no hash would tell: -128 is no code of int8."""
    folder = int8.folder.parent / "damaged"
    shutil.copytree(int8.quantized.path, folder)
    tensors = load_file(folder / "quantized.safetensors")
    tensors[f"{Q_PROJ}.codes"][1, 2] = -128
    tensors[f"{DOWN_PROJ}.scales"][4, 0] = 0.001  # 11 significant bits
    tensors[NORM][7] = torch.nan
    save_file(tensors, folder / "quantized.safetensors")
    wrong = {c.subject: c.note for c in failures(pipeline.verify(folder, no_progress))}
    assert wrong[Q_PROJ] == "has a code outside -127..127"
    assert wrong[DOWN_PROJ].endswith("which is not on the portable grid")
    assert wrong[NORM] == "holds NaN or infinity"
    assert len(wrong) == 4  # and the file


def test_a_flipped_bit_anywhere_in_the_bundle_is_found_and_named(bundle_copy: Path) -> None:
    """200 random places, spread over every file."""
    rng = random.Random(20)
    files = sorted(path for path in bundle_copy.rglob("*") if path.is_file())
    assert len(files) >= 13
    missed = []
    for trial in range(200):
        file = files[trial % len(files)]
        offset, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, offset, bit)
        checks = check_bundle_files(bundle_copy)
        wrong = {check.subject for check in checks if not check.passed}
        name = file.relative_to(bundle_copy).as_posix()
        # A flip in SHA256SUMS shows at the file whose line it hit, or as a malformed line.
        if not wrong or (name not in wrong and name != CHECKSUMS):
            missed.append((name, offset, bit, wrong))
        flip(file, offset, bit)
    assert missed == []
    assert all(check.passed for check in check_bundle_files(bundle_copy))


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "executorch/artifact.json",
        "executorch/tokenizer.json",
        "quantized/config.json",
        "quantized/generation_config.json",
        "quantized/quantization.json",
        "quantized/quantized.safetensors",
        "quantized/tokenizer.json",
        "quantized/tokenizer_config.json",
    ],
)
def test_a_truncated_file_of_any_kind_gives_exit_code_1_and_its_name(
    name: str, executorch_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file is a failed check, not bad usage, even where it cannot be parsed."""
    content = (executorch_copy / name).read_bytes()
    (executorch_copy / name).write_bytes(content[: len(content) // 2])
    outcome = run(capsys, "verify", executorch_copy, "--json")
    assert outcome.code == 1
    wrong = [c for c in outcome.json["checks"] if not c["passed"] and c["check"] == "files"]
    assert [check["subject"] for check in wrong] == [name]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("quantized/quantization.json", b'"scheme"', b'"schema"'),
        ("quantized/quantization.json", b'"tensors"', b'"tensor\x7f"'),
        ("quantized/quantization.json", b'"files"', b'"fines"'),
        ("executorch/artifact.json", b'"target"', b'"tarfet"'),
        ("executorch/artifact.json", b'"files"', b'"fines"'),
        ("manifest.json", b'"targets"', b'"tardets"'),
        ("quantized/config.json", b'"model_type"', b'"modem_type"'),
    ],
)
def test_a_damaged_key_of_a_manifest_gives_exit_code_1_and_its_file(
    name: str, old: bytes, new: bytes, executorch_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (executorch_copy / name).read_bytes()
    assert old in content
    (executorch_copy / name).write_bytes(content.replace(old, new, 1))
    outcome = run(capsys, "verify", executorch_copy, "--json")
    assert outcome.code == 1
    wrong = [c for c in outcome.json["checks"] if not c["passed"] and c["check"] == "files"]
    assert [check["subject"] for check in wrong] == [name]


@pytest.mark.parametrize("name", ["executorch/model.pte", "quantized/config.json", "manifest.json"])
def test_a_removed_file_is_named(name: str, bundle_copy: Path) -> None:
    (bundle_copy / name).unlink()
    assert file_problems(bundle_copy) == {name: "is missing"}


def test_every_removed_file_is_found(bundle_copy: Path) -> None:
    for name in contents(bundle_copy):
        if (bundle_copy / name).is_file() and name != CHECKSUMS:
            moved = (bundle_copy / name).rename(bundle_copy.parent / "aside")
            problems = file_problems(bundle_copy)
            assert problems.pop(name) == "is missing"
            assert set(problems.values()) <= {"is an empty folder"}  # where it lay
            moved.rename(bundle_copy / name)
    assert file_problems(bundle_copy) == {}


@pytest.mark.parametrize("name", ["notes.txt", "executorch/.hidden", "executorch/deep/er.bin"])
def test_an_added_file_is_named(name: str, bundle_copy: Path) -> None:
    (bundle_copy / name).parent.mkdir(exist_ok=True)
    (bundle_copy / name).write_text("x")
    assert file_problems(bundle_copy) == {name: f"is not listed in {CHECKSUMS}"}


def test_a_symbolic_link_does_not_stand_for_a_file(bundle_copy: Path) -> None:
    target = (bundle_copy / PTE).rename(bundle_copy.parent / "elsewhere.pte")
    (bundle_copy / PTE).symlink_to(target)
    assert file_problems(bundle_copy) == {PTE: "is a link"}


def change_line(change: Callable[[str], str]) -> Callable[[str], str]:
    """Edit the program's line of SHA256SUMS."""
    return lambda text: "".join(
        change(line) if line.endswith("model.pte\n") else line for line in text.splitlines(True)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text.replace("  ", " ", 1),
        change_line(lambda line: line[:64] + "  ../elsewhere.pte\n"),
        change_line(lambda line: line[:64] + "  /etc/passwd\n"),
        change_line(str.upper),
    ],
    ids=["empty", "no last newline", "one space", "path outside", "absolute", "upper case"],
)
def test_malformed_checksums_are_refused(
    change: Callable[[str], str], executorch_copy: Path
) -> None:
    checksums = executorch_copy / CHECKSUMS
    checksums.write_text(change(checksums.read_text()))
    wrong = [check.subject for check in failures(pipeline.verify(executorch_copy, no_progress))]
    assert CHECKSUMS in wrong


def test_a_file_without_its_line_of_checksums_is_reported(bundle_copy: Path) -> None:
    checksums = bundle_copy / CHECKSUMS
    checksums.write_text(change_line(lambda line: "")(checksums.read_text()))
    assert file_problems(bundle_copy) == {PTE: f"is not listed in {CHECKSUMS}"}


def test_an_untouched_bundle_passes_every_check(finished_bundle: Bundle) -> None:
    checks = pipeline.verify(finished_bundle.path, no_progress)
    assert list(failures(checks)) == []
    files = {name for name, digest in contents(finished_bundle.path).items() if digest != "folder"}
    assert {check.subject for check in checks if check.check == "files"} == files - {CHECKSUMS}
    own = [check.check for check in checks if check.target in (None, "executorch")]
    assert own.count("quantized") == len(finished_bundle.quantized.schemes) == 56
    assert own.count("integers") == 57
    files = finished_bundle.artifacts["executorch"].manifest["files"]
    assert own.count("derived") == len(files) + 1  # and the manifest
    assert set(own) - {"files", "manifest", "quantized", "derived", "integers"} == {
        "logits.kl", "logits.top1", "logits.max_difference",
    }  # fmt: skip
