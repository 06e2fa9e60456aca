"""Tampering with a bundle whose checksums are all made anew: each change is refused and named.

MOBILELLM_ATTACKS=1200 pytest tests/attack/test_attack_tampering.py
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import run
from conftest import NANO, write_checkpoint
from lowering import MODELS, wide_weights
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from tampering import edited, reseal

from exporter import pipeline
from exporter.bundle.artifact import FinishedArtifact, artifact_identity, write_artifact
from exporter.bundle.bundle import CHECKSUMS, file_problems, open_bundle
from exporter.derivation.artifacts import check_derived, compare_artifacts
from exporter.derivation.manifests import bundle_recipe, check_manifests
from exporter.derivation.source import check_source
from exporter.errors import InputError
from exporter.files import sha256
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import parse_config
from exporter.model.rope import paired_rope_tables, rope_frequencies, rope_tables
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import open_quantized
from exporter.recipe import parse_recipe
from exporter.verification.checks import Check, check_bundle_files, failures

GRAPH, DATA, ORT = "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4.ort"
#: The number of random changes of each bundle.
ATTACKS = int(os.environ.get("MOBILELLM_ATTACKS", "40"))
#: Every target and form, each in one of four bundles.
FORMS: dict[str, list[dict[str, Any]]] = {
    "default": [
        {"target": "executorch"},
        {"target": "onnx", "ort": True},
        {"target": "coreml", "prefill": 16},
    ],
    "portable": [
        {"target": "executorch", "attention": "portable"},
        {"target": "onnx", "form": "portable", "products": "float"},
        {"target": "coreml", "prefill": 16, "output": "token"},
    ],
    "half": [
        {"target": "executorch", "delegate": "coreml", "activations": "float16"},
        {"target": "onnx", "activations": "float16", "products": "float"},
        {"target": "coreml", "prefill": 16, "activations": "float32"},
    ],
    "rows": [
        {"target": "executorch"},
        {"target": "onnx"},
        {"target": "coreml", "prefill": 16, "compute": "neural_engine"},
    ],
}
#: The schemes of the bundle with one scale a row, which the form for the Neural Engine needs.
ROWS = {"linear": "int4", "embedding": "int8"}
#: Fields that decide no file: nothing in the bundle contradicts another value.
FREE = ("recipe.name", "recipe.model", "recipe.profile", "recipe.calibration")


@dataclass(frozen=True)
class Original:
    """A finished bundle, its source, and its artifacts as they are derived again."""

    path: Path
    source: Path
    derived: Mapping[str, FinishedArtifact]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Original]:
    root = tmp_path_factory.mktemp("originals")
    config = {**MODELS["llama4_text"], "vocab_size": 512}  # that of the demo's tokenizer
    source = write_checkpoint(root / "model", config, wide_weights(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(NANO / name, source / name)
    made = {}
    for name, targets in FORMS.items():
        schemes = ROWS if name == "rows" else {}
        raw = {"name": name, "quantization": {"method": "absmax", **schemes}, "targets": targets}
        recipe = parse_recipe({**raw, "max_context": 256}, name)
        out = root / name
        result = pipeline.export(recipe, open_checkpoint(source), out, no_progress)
        assert result.bundle is not None, list(failures(result.checks))
        derived = {
            target: write_artifact(
                result.quantized,
                finished.artifact.target,
                artifact_identity(result.quantized, finished.artifact.target),
                root / f"{name}-derived" / target,
            )
            for target, finished in result.artifacts.items()
        }
        made[name] = Original(out, source, derived)
    return made


def refusals(bundle: Path, original: Original) -> list[str]:
    """What `verify --source` finds, short of running the artifacts: subject and note of each failed
    check. Artifacts are lowered again only if nothing else shows a change of the quantized
    checkpoint."""
    checks = check_bundle_files(bundle)
    try:
        opened = open_bundle(bundle)
        checks += check_manifests(opened)
        changed = quantized_files(bundle) != quantized_files(original.path)
        if changed:
            recipe, source = bundle_recipe(opened), open_checkpoint(original.source)
            checks += check_source(opened.quantized, source, recipe, no_progress)
        for target, finished in opened.artifacts.items():
            if not changed:
                checks += compare_artifacts(finished, original.derived[target])
            elif not any(failures(checks)):
                checks += check_derived(opened.quantized, finished, no_progress)
    except InputError as error:
        return [*map(shown, failures(checks)), str(error)]
    return [shown(check) for check in failures(checks)]


def quantized_files(bundle: Path) -> dict[str, str]:
    """The hashes of the files that artifacts are derived from."""
    paths = (bundle / "quantized").iterdir()
    return {path.name: sha256(path) for path in paths if path.name != "quantization.json"}


def shown(check: Check) -> str:
    return f"{check.subject}: {check.note}"


def leaves(value: object, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every value in JSON that is no object and no list."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*place, key))
    else:
        yield place


def other_value(value: object) -> object:
    """A value of the same type, so that it is refused for what it says and not for its form."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str) and value:
        return ("1" if value[0] == "0" else "0") + value[1:]
    return "x"


def json_files(bundle: Path) -> list[Path]:
    manifests = [bundle / "manifest.json", bundle / "quantized" / "quantization.json"]
    return [
        *manifests,
        *sorted(bundle.glob("*/artifact.json")),
        *bundle.glob("*/genai_config.json"),
        *bundle.glob("onnx/config.json"),
    ]


def random_change(bundle: Path, rng: random.Random) -> Path:
    """Change one file: a bit, a run of zeros, two exchanged blocks, its length, or what it is."""
    files = sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    place, kind = rng.randrange(len(content)), rng.randrange(6)
    if kind <= 1:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == 3:
        other, size = rng.randrange(len(content)), 32
        one, two = content[place : place + size], content[other : other + size]
        content[place : place + len(two)], content[other : other + len(one)] = two, one
    elif kind == 4:
        del content[place:]
    else:
        content += content[place : place + 64]
    if bytes(content) == path.read_bytes():  # zeros were there already
        content[place] ^= 1
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_an_untouched_bundle_is_accepted(form: str, originals: Mapping[str, Original]) -> None:
    assert refusals(originals[form].path, originals[form]) == []


@pytest.mark.parametrize("form", FORMS)
def test_random_changes_of_every_file_are_refused_and_named(
    form: str, originals: Mapping[str, Original], tmp_path: Path
) -> None:
    original, rng, missed, tried = originals[form], random.Random(15), list[object](), 0
    for number in range(ATTACKS):
        bundle = Path(shutil.copytree(original.path, tmp_path / str(number)))
        changed = random_change(bundle, rng)
        reseal(bundle)
        name = changed.relative_to(bundle).as_posix()
        if changed.read_bytes() == (original.path / name).read_bytes():
            continue  # it was a hash, which is made anew
        found, tried = refusals(bundle, original), tried + 1
        # Of the quantized weights the source shows which one it is.
        names = {changed.name, "model." if changed.suffix == ".safetensors" else changed.name}
        # A wrong field of a manifest may show in another one, which it contradicts.
        names |= {"json: "} if changed.suffix == ".json" else set()
        if not any(part in text for text in found for part in names):
            missed.append((number, name, found))
        shutil.rmtree(bundle)
    assert missed == [], missed
    assert tried > 0.7 * ATTACKS


@pytest.mark.parametrize("form", FORMS)
def test_every_field_of_every_manifest_is_derived(
    form: str, originals: Mapping[str, Original], tmp_path: Path
) -> None:
    original, missed, tried = originals[form], [], 0
    bundle = Path(shutil.copytree(original.path, tmp_path / "bundle"))
    manifests = json_files(bundle)
    before = {path: path.read_bytes() for path in (*manifests, bundle / CHECKSUMS)}
    for path in manifests:
        name = path.relative_to(bundle).as_posix()
        for *parents, last in leaves(json.loads(before[path])):
            dotted = ".".join(map(str, (*parents, last)))
            if name == "manifest.json" and dotted.startswith(FREE):
                continue
            with edited(path) as content:
                held: Any = content
                for key in parents:
                    held = held[key]
                held[last] = other_value(held[last])
            reseal(bundle, path)
            tried += 1
            found = refusals(bundle, original)
            # A wrong field may show in another manifest, which it contradicts.
            if not any("json: " in text or path.name in text for text in found):
                missed.append((name, dotted))
            for changed, content_before in before.items():
                changed.write_bytes(content_before)
    assert missed == []
    assert tried > 100


def edited_model(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change the graph of an ONNX artifact."""
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    change(model)
    (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))


def nodes_of(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def zero_table(bundle: Path, file: str, dtype: str) -> None:
    """Zero the cosines from position 192 on, which no logits of `verify` read."""
    config = parse_config(json.loads((bundle / "quantized" / "config.json").read_text()), bundle)
    tables = {cos for make in (rope_tables, paired_rope_tables) for cos in [make(config, 256)[0]]}
    content = (bundle / file).read_bytes()
    found = 0
    for table in tables:
        rows = table[192:].numpy().astype(dtype).tobytes()
        found += content.count(rows)
        content = content.replace(rows, bytes(len(rows)))
    assert found == 1
    (bundle / file).write_bytes(content)


def zero_frequencies(bundle: Path) -> None:
    """Zero RoPE's last frequency in the .pte: far positions differ."""
    config = parse_config(json.loads((bundle / "quantized" / "config.json").read_text()), bundle)
    whole = rope_frequencies(config).numpy().tobytes()
    content = (bundle / "executorch/model.pte").read_bytes()
    assert content.count(whole) == 1
    (bundle / "executorch/model.pte").write_bytes(content.replace(whole, whole[:-4] + bytes(4)))


def wire_in_a_copy(model: onnx.ModelProto) -> None:
    """Leave a constant in place, and let its node read a changed copy."""
    node = nodes_of(model, "SimplifiedLayerNormalization")[0]
    original = next(one for one in model.graph.initializer if one.name == node.input[1])
    values = numpy_helper.to_array(original).copy()
    values[3] += 1
    model.graph.initializer.append(numpy_helper.from_array(values, "copy"))
    node.input[1] = "copy"


def add_to_a_logit(model: onnx.ModelProto) -> None:
    """Add 10,000 to the logit of token 5 whenever token 77 is read."""
    graph = model.graph
    last = next(node for node in graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "honest"
    bonus = np.zeros((1, 1, 512), np.float32)
    bonus[0, 0, 5] = 10_000
    constants = {"trigger": np.array(77), "bonus": bonus, "nothing": np.zeros_like(bonus)}
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    graph.node.extend(
        [
            helper.make_node("Equal", ["input_ids", "trigger"], ["seen"]),
            helper.make_node("Cast", ["seen"], ["seen_number"], to=TensorProto.INT64),
            helper.make_node("ReduceMax", ["seen_number"], ["any_number"], keepdims=0),
            helper.make_node("Cast", ["any_number"], ["any"], to=TensorProto.BOOL),
            helper.make_node("Where", ["any", "bonus", "nothing"], ["added"]),
            helper.make_node("Add", ["honest", "added"], ["logits"]),
        ]
    )


def set_attribute(kind: str, name: str, value: float) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        for node in nodes_of(model, kind):
            for attribute in node.attribute:
                if attribute.name == name:
                    attribute.CopyFrom(helper.make_attribute(name, value))

    return lambda bundle: edited_model(bundle / "onnx", change)


def in_json(file: str, *keys: str, value: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        with edited(bundle / file) as content:
            held: Any = content
            for key in keys[:-1]:
                held = held[key]
            held[keys[-1]] = value

    return change


def exchange_digits(bundle: Path) -> None:
    path = bundle / "onnx" / "tokenizer.json"
    with edited(path) as content:
        vocabulary = content["model"]["vocab"]
        vocabulary["3"], vocabulary["7"] = vocabulary["7"], vocabulary["3"]


def other_template(bundle: Path) -> None:
    path = bundle / "executorch" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("assistant", "user"))


def add_a_folder(bundle: Path) -> None:
    """A finished artifact of a target that the recipe does not have."""
    shutil.copytree(bundle / "onnx", bundle / "gguf")


#: Each change that `verify` once accepted, and what its refusal names.
ACCEPTED_ONCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "rope .pte": (zero_frequencies, "model.pte"),
    "rope .onnx": (lambda b: zero_table(b, f"onnx/{DATA}", "<f4"), "rope.cos"),
    "rope .mlpackage": (
        lambda b: zero_table(
            b, "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "<f2"
        ),
        "rope_cos",
    ),
    "unused": (lambda b: edited_model(b / "onnx", wire_in_a_copy), "copy"),
    "added": (lambda b: edited_model(b / "onnx", add_to_a_logit), "logits"),
    "epsilon": (set_attribute("SimplifiedLayerNormalization", "epsilon", 2e-5), "epsilon"),
    "accuracy": (set_attribute("MatMulNBits", "accuracy_level", 1), "accuracy_level"),
    "folder": (add_a_folder, "gguf/onnx/model_q4.onnx"),
    "digits": (exchange_digits, "onnx/tokenizer.json"),
    "template": (other_template, "executorch/tokenizer_config.json"),
    "ends": (in_json("onnx/artifact.json", "eos_token_ids", value=[5]), "eos_token_ids"),
    "ends of the client": (
        in_json("onnx/genai_config.json", "model", "eos_token_id", value=5),
        "onnx/genai_config.json",
    ),
    "library": (
        in_json(
            "onnx/genai_config.json",
            *("model", "decoder", "session_options", "custom_ops_library"),
            value="/tmp/evil.so",
        ),
        "onnx/genai_config.json",
    ),
    "file outside": (
        in_json("onnx/genai_config.json", "model", "decoder", "filename", value="../other.onnx"),
        "onnx/genai_config.json",
    ),
    "quantized": (in_json("onnx/artifact.json", "quantized", value="0" * 64), "quantized"),
    "source": (in_json("manifest.json", "source", "model.safetensors", value="0" * 64), "source"),
    "recipe": (in_json("manifest.json", "recipe", "quantization", "method", value="mse"), "method"),
}


@pytest.mark.parametrize("name", ACCEPTED_ONCE)
def test_what_was_accepted_once_is_refused_and_named(
    name: str, originals: Mapping[str, Original], tmp_path: Path
) -> None:
    original, (change, named) = originals["default"], ACCEPTED_ONCE[name]
    bundle = Path(shutil.copytree(original.path, tmp_path / "bundle"))
    change(bundle)
    kept = bundle / "onnx" / "artifact.json" if name == "quantized" else None
    reseal(bundle, kept)
    found = refusals(bundle, original)
    assert any(named in text for text in found), found


def test_a_model_of_other_weights_for_the_mobile_runtime_is_refused(
    originals: Mapping[str, Original], tmp_path: Path
) -> None:
    """model_q4.ort lies beside model_q4.onnx, and no check runs it."""
    original = originals["default"]
    bundle = Path(shutil.copytree(original.path, tmp_path / "bundle"))
    path = bundle / "onnx" / ORT
    generator = np.random.default_rng(0)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = generator.bytes(4096)
    path.write_bytes(content)
    reseal(bundle)
    assert any("model_q4.ort" in text for text in refusals(bundle, original))


def test_a_change_exits_with_1_and_names_what_was_changed(
    originals: Mapping[str, Original], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(originals["default"].path, tmp_path / "bundle"))
    ACCEPTED_ONCE["rope .onnx"][0](bundle)
    reseal(bundle)
    assert run(capsys, "verify", bundle, "--quick").code == 0
    outcome = run(capsys, "verify", bundle)
    assert outcome.code == 1
    assert "rope.cos" in outcome.out


@pytest.mark.parametrize(
    "name", ["executorch/model.pte", f"onnx/{GRAPH}", "coreml/model.mlpackage/Manifest.json",
             "coreml/model.mlpackage/Data/com.apple.CoreML/model.mlmodel"]
)  # fmt: skip
def test_a_model_that_cannot_be_parsed_is_a_difference(
    name: str, originals: Mapping[str, Original], tmp_path: Path
) -> None:
    """Not an error of its own, so that `verify` goes on and exits with 1."""
    original = originals["default"]
    bundle = Path(shutil.copytree(original.path, tmp_path / "bundle"))
    (bundle / name).write_bytes(b"\xff" * 1000)
    reseal(bundle)
    target = name.split("/", maxsplit=1)[0]
    checks = compare_artifacts(open_bundle(bundle).artifacts[target], original.derived[target])
    assert len(list(failures(checks))) >= 3  # the file, the manifest, and what is wrong with it


def requantized(original: Original, tmp_path: Path) -> Path:
    """A bundle that is made from other weights and claims to be made from the source."""
    other = Path(shutil.copytree(original.source, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    recipe = pipeline.with_targets(bundle_recipe(open_bundle(original.path)), ["onnx"])
    bundle = tmp_path / "bundle"
    pipeline.export(recipe, open_checkpoint(other), bundle, no_progress)
    digest = sha256(original.source / "model.safetensors")
    for manifest in ("manifest.json", "quantized/quantization.json"):
        in_json(manifest, "source", "model.safetensors", value=digest)(bundle)
    quantized = open_quantized(bundle / "quantized")
    identity = artifact_identity(quantized, recipe.targets[0])
    write_artifact(quantized, recipe.targets[0], identity, bundle / "onnx")
    reseal(bundle)
    return bundle


def test_only_the_source_shows_that_a_whole_bundle_is_of_other_weights(
    originals: Mapping[str, Original], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = originals["default"]
    bundle = requantized(original, tmp_path)
    assert list(failures(pipeline.verify(bundle, no_progress))) == []
    outcome = run(capsys, "verify", bundle, "--source", original.source, "--json")
    assert outcome.code == 1
    wrong = [c["subject"] for c in outcome.json["checks"] if not c["passed"]]
    assert wrong == ["model.norm.weight"]


def duplicate_line(text: str) -> str:
    first = text.splitlines(True)[0]
    return first + text


@pytest.mark.parametrize(
    "change",
    [
        duplicate_line,
        lambda text: text.replace(text[:64], "0" * 64, 1) + text.splitlines(True)[0],
        lambda text: "".join(reversed(text.splitlines(True))),
    ],
    ids=["duplicate", "contradictory", "reordered"],
)
def test_checksums_have_one_form_only(
    change: Callable[[str], str], bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle_copy / CHECKSUMS
    path.write_text(change(path.read_text()))
    outcome = run(capsys, "verify", bundle_copy, "--quick")
    assert outcome.code == 1
    assert "twice or out of order" in outcome.out


@pytest.mark.parametrize("name", [f"onnx/{GRAPH}", "onnx", "quantized", "manifest.json"])
def test_links_in_a_bundle_are_refused(
    name: str, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = (bundle_copy / name).rename(bundle_copy.parent / "elsewhere")
    (bundle_copy / name).symlink_to(target)
    outcome = run(capsys, "verify", bundle_copy, "--json")
    assert outcome.code == 1
    wrong = {c["subject"]: c["note"] for c in outcome.json["checks"] if not c["passed"]}
    assert wrong[name] == "is a link"
    assert "is a link" in run(capsys, "generate", bundle_copy, "--prompt", "x").err


def test_a_link_instead_of_the_checksums_is_no_bundle(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = (bundle_copy / CHECKSUMS).rename(bundle_copy.parent / "elsewhere")
    (bundle_copy / CHECKSUMS).symlink_to(target)
    assert run(capsys, "verify", bundle_copy).code == 2


@pytest.mark.parametrize("name", ["empty", "onnx/empty", "onnx/empty/deeper"])
def test_empty_folders_are_refused(name: str, bundle_copy: Path) -> None:
    (bundle_copy / name).mkdir(parents=True)
    assert file_problems(bundle_copy) == {name: "is an empty folder"}


def test_a_pipe_in_a_bundle_is_refused_and_never_read(bundle_copy: Path) -> None:
    os.mkfifo(bundle_copy / "onnx" / "pipe")
    assert file_problems(bundle_copy) == {"onnx/pipe": "is not a regular file"}
