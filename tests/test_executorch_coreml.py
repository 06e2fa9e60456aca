"""The Core ML delegate inside a .pte: its package is extracted and decoded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import flip, run
from conftest import LLAMA, LLAMA4, NANO
from executorch.backends.apple.coreml import executorchcoreml
from executorch.exir._serialize import _program as pte
from executorch.exir.schema import DelegateCall
from executorch.extension.pybindings import portable_lib
from lowering import Lowered, lowered_in, tokens

from exporter.backends import executorch as backend
from exporter.backends.coreml.constants import mil_name
from exporter.backends.coreml.package import place_of
from exporter.backends.executorch.coreml_delegate import embedded_package, flatten, unflatten
from exporter.backends.executorch.file import delegate_payload
from exporter.backends.executorch.runtime import ExecuTorchRunner
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.inference.reference import score
from exporter.model.config import EMBEDDING
from exporter.quantization.activations import LARGEST_HALF
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.verification.integers import check_integers
from exporter.verification.runs import run_teacher_forced

CONTEXT = 32
MODELS: dict[str, dict[str, Any]] = {"llama4_text": LLAMA4, "llama": LLAMA}
DELEGATE = "CoreMLBackend"


def delegated_in(
    folder: Path,
    model: str = "llama4_text",
    linear: str = "int4-g32",
    embedding: str = "int4-g32",
    **target: Any,
) -> Lowered:
    facts = {"target": "executorch", "max_context": CONTEXT, "delegate": "coreml", **target}
    return lowered_in(folder, MODELS[model], facts, {"linear": linear, "embedding": embedding})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """One for all tests that only read it."""
    return delegated_in(tmp_path_factory.mktemp("small"), activations="float16")


@pytest.fixture
def copy(small: Lowered, tmp_path: Path) -> Lowered:
    """One to damage."""
    quantized, lowered = small
    folder = shutil.copytree(lowered.artifact.path, tmp_path / "copy")
    return quantized, open_artifact(Path(folder))


def program_of(lowered: FinishedArtifact) -> Path:
    return lowered.artifact.path / backend.FILE_NAME


@pytest.mark.parametrize(
    ("model", "linear", "embedding", "activations"),
    [
        ("llama4_text", "int4-g32", "int4-g32", "float16"),
        ("llama", "int8", "int8-g32", "float32"),
    ],
)
def test_the_package_inside_gives_the_references_logits_from_the_quantized_checkpoints_integers(
    model: str, linear: str, embedding: str, activations: str, tmp_path: Path
) -> None:
    """XNNPACK multiplies no int8 in groups; Core ML does."""
    quantized, lowered = delegated_in(tmp_path, model, linear, embedding, activations=activations)
    found = run_teacher_forced(backend.load(lowered.artifact), tokens(CONTEXT), (1, 5))
    expected = score(quantized, tokens(CONTEXT), [0, 4, *range(5, CONTEXT)])
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 5e-3
    checks = check_integers(quantized, lowered, lambda name: None)
    assert len(checks) == len(quantized.schemes)
    assert [check for check in checks if not check.passed] == []


def test_the_program_is_one_call_of_the_delegate(small: Lowered) -> None:
    _, lowered = small
    data = program_of(lowered).read_bytes()
    header = pte._get_extended_header(data[:64])
    assert header is not None
    program = pte._flatbuffer_to_program(data[: header.program_size])
    (plan,) = (plan for plan in program.execution_plan if plan.name == "forward")
    assert [one.id for one in plan.delegates] == [DELEGATE]
    (instruction,) = plan.chains[0].instructions
    assert isinstance(instruction.instr_args, DelegateCall)
    assert instruction.instr_args.args == [*plan.inputs, *plan.outputs]
    sizes = [plan.values[index].val.sizes for index in (*plan.inputs, *plan.outputs)]
    assert sizes == [[1, 1], [1], [1, 1, 96]]


def test_the_official_runners_are_told_to_read_token_by_token(small: Lowered) -> None:
    _, lowered = small
    module = portable_lib._load_for_executorch(str(program_of(lowered)))
    said = {
        name: module.run_method(name, ())
        for name in ("enable_dynamic_shape", "use_kv_cache", "get_max_context_len",
                     "get_vocab_size", "get_bos_id", "get_eos_ids")
    }  # fmt: skip
    assert said == {
        "enable_dynamic_shape": [False],
        "use_kv_cache": [True],
        "get_max_context_len": [CONTEXT],
        "get_vocab_size": [96],
        "get_bos_id": [0],
        "get_eos_ids": [1, 2],
    }


def test_the_runtime_is_told_names_in_the_order_of_its_arguments(
    small: Lowered, tmp_path: Path
) -> None:
    other = delegated_in(tmp_path, "llama")
    described = [
        json.loads(bytes(unflatten(delegate_payload(program_of(one), DELEGATE))["metadata.json"]))
        for _, one in (small, other)
    ]
    for one in described:
        assert one["inputNames"] == ["input_ids", "position"]
        assert one["outputNames"] == ["logits"]
    # A phone keeps the compiled model under this name: another model needs another one.
    assert described[0]["identifier"] != described[1]["identifier"]


def test_two_exports_are_equal_to_the_last_byte(small: Lowered, tmp_path: Path) -> None:
    _, again = delegated_in(tmp_path, activations="float16")
    assert program_of(small[1]).read_bytes() == program_of(again).read_bytes()


def test_a_new_text_starts_without_the_old_one_and_the_cache_can_be_filled(small: Lowered) -> None:
    _, lowered = small
    runner = backend.load(lowered.artifact)
    assert (runner.context, runner.vocab_size) == (CONTEXT, 96)
    first = runner.prefill(tokens(9))
    runner.prefill(tokens(CONTEXT)[9:])
    assert torch.equal(runner.prefill(tokens(9)), first)
    runner.prefill(tokens(CONTEXT))
    with pytest.raises(InputError, match="context: 33 tokens are not between 1 and 32"):
        runner.decode(0)
    with pytest.raises(InputError, match="context: 0 tokens"):
        runner.prefill([])


def test_export_verify_and_generate_know_the_delegate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    made = run(
        capsys, "export", "mobilellm-r1-nano-int4", "--checkpoint", NANO, "-o", bundle,
        "--target", "executorch", "targets.0.delegate=coreml", "targets.0.activations=float16",
        "targets.0.max_context=256", "--json",
    )  # fmt: skip
    assert made.code == 0
    verified = run(capsys, "verify", bundle, "--json")
    assert verified.code == 0
    checks = {check["check"]: check["value"] for check in verified.json["checks"]}
    assert 0 < checks["logits.kl"] < 1e-4
    assert 0 < checks["range"] < LARGEST_HALF
    said = run(
        capsys, "generate", bundle, "--prompt", "Ada has 12 eggs.", "--max-new-tokens", 4, "--json"
    )
    assert len(said.json["tokens"]) == 4


# The payload.


#: None of them empty, which the wheel's own writer does not survive.
FILES = {
    "metadata.json": b"{}",
    "model.mlpackage/Manifest.json": b"{1}",
    "model.mlpackage/Data/a/model.mlmodel": b"M" * 10,
    "model.mlpackage/Data/a/weights/weight.bin": bytes(range(256)),
}


def test_the_wheels_own_reader_takes_out_what_was_put_in(tmp_path: Path) -> None:
    assert executorchcoreml.unflatten_directory_contents(flatten(FILES), str(tmp_path))
    root = tmp_path / "lowered_module"
    assert {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    } == FILES


def test_a_payload_of_the_wheels_own_writer_is_read(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    payload = executorchcoreml.flatten_directory_contents(str(tmp_path))
    assert payload is not None
    found = unflatten(memoryview(payload))
    assert {name: bytes(content) for name, content in found.items()} == FILES


def renamed(name: str) -> bytes:
    return flatten(FILES).replace(b'"nosj.atadatem"', f'"{name}"'[::-1].encode())


@pytest.mark.parametrize(
    ("payload", "said"),
    {
        "nothing": (b"", "has no list of files"),
        "no list": (b"\1" * 500, "has no list of files"),
        "a list of something else": (b'{"a": 1}'[::-1], "has no list of files"),
        "a file beyond the end": (
            flatten(FILES).replace(b'"size": 10'[::-1], b'"size": 9999'[::-1]),
            "model.mlmodel ends beyond the",
        ),
        "a name that leaves its folder": (renamed("../evil"), "'../evil' is not the name of"),
        "the folder above": (renamed(".."), "'..' is not the name"),
        "a folder inside itself": (
            flatten({}).replace(b"}{ :", b'}5 :"x"{ :'), "is not the name of a file in its",
        ),
    }.values(),
    ids=["nothing", "no list", "a list of something else", "a file beyond the end",
         "a name that leaves its folder", "the folder above", "a folder inside itself"],
)  # fmt: skip
def test_a_payload_that_is_none_is_refused(payload: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        unflatten(memoryview(payload))


# Negative controls.


def failed(quantized: QuantizedCheckpoint, lowered: FinishedArtifact) -> list[tuple[str, str]]:
    checks = check_integers(quantized, lowered, lambda name: None)
    return [(check.subject, check.note) for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("tensor", "read_by"),
    {"model.layers.1.self_attn.q_proj.weight": "linear", EMBEDDING: "gather, linear"}.items(),
    ids=["a layer", "the embedding"],
)
@pytest.mark.parametrize(("part", "called"), [("data", "code"), ("scale", "scale")])
def test_one_flipped_bit_is_reported_with_its_tensor(
    part: str, called: str, tensor: str, read_by: str, copy: Lowered
) -> None:
    quantized, lowered = copy
    path = program_of(lowered)
    with embedded_package(path) as package:
        (operation,) = (
            one
            for one in package.block("main").operations
            if one.outputs and one.outputs[0].name == mil_name(tensor)
        )
        place = place_of(operation.inputs[part].arguments[0].value)
        assert place is not None
        weights = (package.weights / "weights" / "weight.bin").read_bytes()
    start = int.from_bytes(weights[place[1] + 16 : place[1] + 24], "little")
    flip(path, path.read_bytes().index(weights) + start + 4, bit=1)
    ((subject, note),) = failed(quantized, lowered)
    assert subject == f"{tensor} (main: {read_by})"
    assert note.startswith(f"1 {called}s differ; at [")


def test_a_short_file_fails_the_check(copy: Lowered) -> None:
    quantized, lowered = copy
    path = program_of(lowered)
    path.write_bytes(path.read_bytes()[:-5000])
    assert any("the end of segment" in note for _, note in failed(quantized, lowered))


def test_a_program_without_the_delegate_is_refused(finished_bundle: Bundle) -> None:
    program = finished_bundle.path / "executorch" / "model.pte"
    with pytest.raises(InputError, match=r"calls no CoreMLBackend, but \['XnnpackBackend'"):
        delegate_payload(program, DELEGATE)


# What is refused before any work.


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"attention": "portable"}, "attention: portable is an option of XNNPACK"),
        ({"delegate": "xnnpack", "activations": "float16"}, "activations: XNNPACK's are float32"),
        ({"delegate": "mps"}, "'mps' is not one of 'xnnpack', 'coreml'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    target: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        delegated_in(tmp_path, **target)


def test_without_coremltools_the_extra_is_named(finished_bundle: Bundle, tmp_path: Path) -> None:
    arguments = [
        "lower", str(finished_bundle.quantized.path), "--target", "executorch", "delegate=coreml",
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    program = (
        "import sys; sys.modules['coremltools'] = None; from exporter.cli import main; "
        f"main({arguments!r})"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 2
    assert "pip install 'mobilellm-exporter[coreml]'" in outcome.stderr
    assert not (tmp_path / "out").exists()


# A Mac.


def test_on_a_mac_the_runtime_reads_token_by_token(
    small: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the runtime does with a call cannot be tried here; which calls it gets can."""
    _, lowered = small
    elsewhere = backend.load(lowered.artifact)
    assert backend.cross_checks(lowered.artifact) == ()
    monkeypatch.setattr(sys, "platform", "darwin")
    calls = []

    def step(self: object, tokens: list[int], position: int) -> torch.Tensor:
        calls.append((tokens, position))
        return torch.zeros(96)

    monkeypatch.setattr(ExecuTorchRunner, "run", step)
    runner = backend.load(lowered.artifact)
    assert (runner.context, runner.vocab_size) == (CONTEXT, 96)
    runner.prefill([4, 5])
    runner.decode(6)
    assert calls == [([4], 0), ([5], 1), ([6], 2)]
    assert backend.cross_checks(lowered.artifact) == ("interpreter",)
    interpreter = backend.load(lowered.artifact, "interpreter")
    assert torch.equal(interpreter.prefill([4, 5]), elsewhere.prefill([4, 5]))
