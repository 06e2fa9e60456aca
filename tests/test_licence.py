"""The licence of a checkpoint: read from its model card, copied, recorded, compared again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calibrating import small_checkpoint
from commands import run
from conftest import NANO, MakeCheckpoint, write_checkpoint
from huggingface_hub import metadata_load
from tampering import edited, reseal

from exporter.bundle.licence import Licence, effective
from exporter.bundle.manifest import read_manifest
from exporter.errors import InputError
from exporter.model.checkpoint import companions, open_checkpoint
from exporter.model.licence import LICENCE_FILES, LicenceTerms, read_licence
from exporter.quantization.quantized_checkpoint import open_quantized
from exporter.recipe import all_recipes, parse_recipe
from exporter.yaml_reader import YAML_BYTES

Capture = pytest.CaptureFixture[str]

APACHE = LicenceTerms(id="apache-2.0")
FAIR = LicenceTerms(
    id="other",
    name="fair-noncommercial-research",
    link="https://huggingface.co/facebook/MobileLLM-R1-140M",
)


def card(folder: Path, text: str | bytes) -> Path:
    content = text.encode() if isinstance(text, str) else text
    (folder / "README.md").write_bytes(content)
    return folder


# Reading a model card.


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", APACHE),
        ("---\r\nlicense: apache-2.0\r\n---\r\n# Model\r\n", APACHE),
        ("\ufeff---\nlicense: apache-2.0\n---", APACHE),
        (
            "---\nlicense: other\nlicense_name: fair-noncommercial-research\n"
            f"license_link: {FAIR.link}\nextra_gated_prompt: >\n  You agree.\n\n  Do you?\n---\n",
            FAIR,
        ),
        (
            "---\nlicense: other\nlicense_link: LICENSE\n---\n",
            LicenceTerms(id="other", link="LICENSE"),
        ),
    ],
)
def test_the_front_matter_of_a_model_card_names_the_licence(
    text: str, terms: LicenceTerms, tmp_path: Path
) -> None:
    assert read_licence(card(tmp_path, text)) == terms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Model\n",
        "# Model\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\nlanguage: en\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: [mit, apache-2.0]\n---\n",
        "---\nlicense: 3\n---\n",
        "---\nlicense: ''\n---\n",
        "---\nlicense: Apache License 2.0\n---\n",
        '---\nlicense: "mit\\n# heading"\n---\n',
        '---\nlicense: "\\ud800"\n---\n',
        f"---\nlicense: {'m' * 65}\n---\n",
        "---\nlicense: mit\nlicense: apache-2.0\n---\n",
        "---\nlicense: &a mit\nx: *a\n---\n",
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\nlicense: mit\nx: " + "[" * 100 + "\n---\n",
        "---\nlicense: mit\nx: " + "9" * 1000 + "\n---\n",
        "---\nlicense: mit\nx: " + "y" * YAML_BYTES + "\n---\n",
        b"---\nlicense: mit\nx: \xff\n---\n",
    ],
)
def test_a_damaged_or_hostile_card_names_no_licence(text: str | bytes, tmp_path: Path) -> None:
    assert read_licence(card(tmp_path, text)) is None


@pytest.mark.parametrize(
    "rest",
    [
        "license_name: 7\nlicense_link: [x]",
        'license_name: "a\\nb"\nlicense_link: ../LICENSE',
        f"license_name: {'n' * 201}\nlicense_link: javascript:alert(1)",
        'license_name: "\\u202eabc"\nlicense_link: "https://a.b/\\">x"',
        'license_name: "\\e[31m"\nlicense_link: https://a.b/ c',
    ],
)
def test_a_name_or_link_of_another_form_is_left_out(rest: str, tmp_path: Path) -> None:
    folder = card(tmp_path, f"---\nlicense: other\n{rest}\n---\n")
    assert read_licence(folder) == LicenceTerms(id="other")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_out(path: Path) -> None:
    secret = path.parent.parent / "secret.md"
    secret.write_text("---\nlicense: mit\n---\n")
    path.symlink_to(secret)


def folder_there(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, link_out, folder_there])
def test_a_card_that_is_no_file_of_the_folder_is_not_read(
    make: Callable[[Path], None], make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    make(folder / "README.md")
    assert open_checkpoint(folder).licence is None


# The demo checkpoint and the recipes.


def test_the_demo_checkpoint_names_its_licence_and_has_its_text() -> None:
    checkpoint = open_checkpoint(NANO)
    assert checkpoint.licence == LicenceTerms(id="bsd-3-clause", link="LICENSE")
    assert "LICENSE" in companions(NANO)


def test_every_recipe_that_comes_with_the_tool_names_a_licence() -> None:
    terms = {recipe.name: recipe.license for recipe in all_recipes()}
    assert None not in terms.values()
    assert terms["mobilellm-r1-int4"] == FAIR
    assert terms["qwen3-int4"] == APACHE


@pytest.mark.parametrize(
    ("licence", "key", "parts"),
    [
        ({"id": "Apache License"}, "license.id", ["'Apache License'", "apache-2.0"]),
        ({"id": "other", "name": "a\nb"}, "license.name", ["one line"]),
        ({"id": "other", "link": "LICENSE.doc"}, "license.link", ["'LICENSE.doc'", "https://"]),
        ({"name": "mit"}, "license.id", ["is missing"]),
        ({"id": "mit", "text": "x"}, "license", ["unknown key 'text'", "id, name, link"]),
        ("mit", "license", ["'mit' is not a mapping"]),
    ],
)
def test_a_bad_licence_in_a_recipe_is_refused_with_its_key(
    licence: object, key: str, parts: list[str]
) -> None:
    with pytest.raises(InputError) as raised:
        parse_recipe({"name": "mine", "license": licence}, "mine.yaml")
    assert raised.value.subject == f"mine.yaml: {key}"
    assert [part for part in parts if part not in str(raised.value)] == []


# The licence of a bundle.


@pytest.mark.parametrize(
    ("checkpoint", "recipe", "files", "expected"),
    [
        (FAIR, APACHE, [], Licence(**FAIR.model_dump())),
        (None, APACHE, [], Licence(id="apache-2.0")),
        (None, None, [], None),
        (None, None, ["NOTICE", "USE_POLICY.md"], None),
        (
            None,
            None,
            ["NOTICE", "LICENSE.txt"],
            Licence(id="other", link="LICENSE.txt", files=["LICENSE.txt", "NOTICE"]),
        ),
        (
            LicenceTerms(id="other", link="LICENSE"),
            None,
            ["config.json", "LICENSE.md"],
            Licence(id="other", link="LICENSE.md", files=["LICENSE.md"]),
        ),
        (LicenceTerms(id="other", link="LICENSE"), None, [], Licence(id="other")),
    ],
)
def test_the_licence_of_a_bundle_is_the_checkpoints_or_else_the_recipes(
    checkpoint: LicenceTerms | None,
    recipe: LicenceTerms | None,
    files: list[str],
    expected: Licence | None,
) -> None:
    assert effective(checkpoint, recipe, files) == expected


# Recorded, copied, compared.


def test_a_quantized_checkpoint_has_the_licence_and_verify_compares_it_with_the_source(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    folder = make_checkpoint()
    card(folder, f"---\nlicense: other\nlicense_name: {FAIR.name}\n---\n")
    for name in LICENCE_FILES:
        (folder / name).write_text(f"Text of {name}.\n")
    out = tmp_path / "quantized"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("quantization:\n  embedding: int8\n")
    assert run(capsys, "quantize", recipe, "--checkpoint", folder, "-o", out).code == 0
    manifest = json.loads((out / "quantization.json").read_text())
    assert manifest["license"] == {"id": "other", "name": FAIR.name, "link": ""}
    assert open_quantized(out).licence == LicenceTerms(id="other", name=FAIR.name)
    assert not (out / "README.md").exists()
    for name in LICENCE_FILES:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
        assert name in manifest["files"]
        assert name in manifest["source"]
    verify = ("verify", out, "--source", folder, "--quick")
    assert run(capsys, *verify).code == 0
    card(folder, "---\nlicense: mit\n---\n")
    changed = run(capsys, *verify)
    assert changed.code == 1
    assert "README.md" in changed.out
    assert "names the licence {'id': 'mit'" in changed.out.replace("\n", " ")


def test_the_licence_travels_in_the_bundle_and_no_other_can_take_its_place(
    tmp_path: Path, capsys: Capture
) -> None:
    def write(config: dict[str, Any], name: str, weights: dict[str, Any]) -> Path:
        return write_checkpoint(tmp_path / name, config, weights)

    source = small_checkpoint(write, name="source").path
    card(source, f"---\nlicense: other\nlicense_name: {FAIR.name}\nlicense_link: LICENSE\n---\n")
    (source / "LICENSE").write_text("FAIR Noncommercial Research License v1\n")
    (source / "USE_POLICY.md").write_text("Prohibited uses\n")
    recipe, out = tmp_path / "mine.yaml", tmp_path / "bundle"
    recipe.write_text("license: {id: mit}\nmax_context: 128\ntargets:\n  - target: onnx\n")
    assert run(capsys, "export", recipe, "--checkpoint", source, "-o", out).code == 0
    licence = read_manifest(out).licence
    assert licence is not None
    assert licence.model_dump() == {
        "id": "other", "name": FAIR.name, "link": "LICENSE", "files": ["LICENSE", "USE_POLICY.md"],
    }  # fmt: skip
    for name in licence.files:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    front = metadata_load(out / "README.md")
    assert front is not None
    assert (front["license"], front["license_name"]) == ("other", FAIR.name)
    assert "[LICENSE](LICENSE), [USE_POLICY.md](USE_POLICY.md)" in (out / "README.md").read_text()
    for name in ("LICENSE", "README.md"):
        changed = Path(shutil.copytree(out, tmp_path / f"changed-{name}"))
        text = (changed / name).read_text().replace("oncommercial", "o commercial")
        (changed / name).write_text(text)
        reseal(changed, changed / name)
        outcome = run(capsys, "verify", changed, "--quick")
        assert outcome.code == 1
        assert name in outcome.out


def test_a_hostile_licence_in_a_quantized_checkpoint_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    folder, out = make_checkpoint(), tmp_path / "quantized"
    card(folder, "---\nlicense: mit\n---\n")
    arguments = ("mobilellm-r1-nano-int8", "--checkpoint", folder, "-o", out)
    assert run(capsys, "quantize", *arguments).code == 0
    for value in ({"id": "mit", "link": "javascript:x"}, {"id": "a b"}, "mit", [1]):
        with edited(out / "quantization.json") as manifest:
            manifest["license"] = value
        refused = run(capsys, "verify", out)
        assert refused.code == 2
        assert "license" in refused.err


def test_another_licence_is_another_result(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    folder, out = make_checkpoint(), tmp_path / "quantized"
    arguments = ("mobilellm-r1-nano-int8", "--checkpoint", folder, "-o", out)
    assert run(capsys, "quantize", *arguments).code == 0
    assert "license" not in json.loads((out / "quantization.json").read_text())
    copy = shutil.copytree(folder, tmp_path / "copy")
    card(copy, "---\nlicense: mit\n---\n")
    refused = run(capsys, "quantize", *arguments[:2], copy, *arguments[3:])
    assert refused.code == 2
    assert "other inputs" in refused.err
