"""Recipes: those that come with the tool, overrides, and everything that is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from exporter.backends import executorch, onnx, parse_target
from exporter.errors import InputError
from exporter.quantization.schemes import Scheme
from exporter.quantization.settings import Quantization
from exporter.recipe import Recipe, load_recipe, parse_recipe, recipe_folder, recipes_for

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.stem)
NANO_INT4 = "mobilellm-r1-nano-int4"
BOTH = """
quantization: {linear: int8}
targets:
  - {target: executorch, max_context: 512}
  - {target: onnx, form: portable, products: float}
"""


def written(folder: Path, text: str | bytes, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def assert_refused(error: InputError, *parts: str) -> None:
    missing = [part for part in parts if part not in str(error)]
    assert not missing, f"{missing} not in: {error}"


# The recipes of the tool.


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_tool_loads_under_its_own_name(path: Path) -> None:
    assert load_recipe(path.stem).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_example_command_of_a_recipe_names_the_recipe_and_a_model_that_it_is_for(
    path: Path,
) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line.split() for line in comments if "mobilellm export" in line]
    assert len(commands) == 1
    words = commands[0]
    assert Path(words[words.index("export") + 1]).stem == path.stem
    assert load_recipe(path).is_for(Path(words[words.index("--checkpoint") + 1]).name)
    assert Path(words[words.index("-o") + 1]).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_name_of_a_recipe_says_its_bits(path: Path) -> None:
    bits = re.search(r"int([48])", path.stem)
    assert bits
    linear, embedding, _ = load_recipe(path).quantization.schemes()
    assert linear.bits == int(bits[1])
    assert embedding.bits == (8 if "embed8" in path.stem else int(bits[1]))


def test_no_two_recipes_for_one_model_are_the_same() -> None:
    bodies = [load_recipe(path).model_dump(exclude={"name"}) for path in RECIPES]
    assert all(one not in bodies[:index] for index, one in enumerate(bodies))


@pytest.mark.parametrize(
    ("model", "beginning"),
    [
        ("MobileLLM-R1-140M", "mobilellm-r1-int"),
        ("mobilellm-r1-950m-base", "mobilellm-r1-int"),
        ("mobilellm-r1-nano", "mobilellm-r1-nano-"),
        ("smollm2-135m", "smollm2-135m-"),
    ],
)
def test_a_model_has_the_recipes_that_are_for_it(model: str, beginning: str) -> None:
    found = [recipe.name for recipe in recipes_for(model)]
    assert found == [path.stem for path in RECIPES if path.stem.startswith(beginning)]


def test_a_model_without_recipes_has_one_of_each_kind() -> None:
    found = [recipe.name for recipe in recipes_for("gpt2")]
    assert found == [
        "mobilellm-r1-int4", "mobilellm-r1-int4-distill", "mobilellm-r1-int4-embed8",
        "mobilellm-r1-int8", "mobilellm-r1-nano-int4", "mobilellm-r1-nano-int4-distill",
        "mobilellm-r1-nano-int8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mobilellm-r1-140m-int4", "Write mobilellm-r1-int4;"),
        ("mobilellm-r1-360m-int4-8k", "Write mobilellm-r1-int4 max_context=8192;"),
        ("mobilellm-r1-950m-int4-embed8-8k", "Write mobilellm-r1-int4-embed8 max_context=8192;"),
        ("mobilellm-r1-950m-int4-distill", "Write mobilellm-r1-int4-distill;"),
        ("smollm2-135m-int4-8k", "Did you mean smollm2-135m-int4?"),
        ("mobilellm-r1-nano-in4", "Did you mean mobilellm-r1-nano-int4?"),
    ],
)
def test_an_old_or_misspelt_name_is_refused_with_what_to_write(old: str, new: str) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(old)
    assert_refused(raised.value, old, "no such recipe", new, "mobilellm recipes")


def test_recipes_are_found_in_the_checkout() -> None:
    assert RECIPES
    assert recipe_folder() == ROOT / "recipes"


# Names and paths.


def test_a_recipe_is_the_same_by_name_and_by_path() -> None:
    assert load_recipe(NANO_INT4) == load_recipe(ROOT / "recipes" / f"{NANO_INT4}.yaml")


def test_the_name_of_a_recipe_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_recipe(NANO_INT4)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(NANO_INT4) == expected


def test_a_recipe_is_named_after_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "model: a/b\n")).name == "mine"
    assert load_recipe(written(tmp_path, "name: other\n")).name == "other"


@pytest.mark.parametrize(
    "source",
    [
        "no-such-recipe",
        "",
        ".",
        "..",
        "../x",
        "../recipes/mobilellm-r1-nano-int4",
        "sub/../mobilellm-r1-nano-int4",
        "./mobilellm-r1-nano-int4",
        str(ROOT / "recipes" / NANO_INT4),
        "mobilellm-r1-nano-int4.yaml",
        "recipes",
    ],
)
def test_a_name_is_a_bare_name_and_nothing_else(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        load_recipe(source)
    assert_refused(raised.value, source, "no such recipe", "mobilellm recipes")


# Defaults and values.


def test_what_a_recipe_leaves_out_has_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "model: a/b\n"))
    assert recipe == Recipe(name="mine", model="a/b", targets=(executorch.Target(),))
    assert (recipe.quantization.linear, recipe.quantization.method) == ("int4-g32", "mse")


def test_targets_keep_their_order_and_their_own_keys(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, BOTH)).targets == (
        executorch.Target(max_context=512),
        onnx.Target(form="portable", products="float"),
    )


def test_the_context_of_a_recipe_is_that_of_every_target_without_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, BOTH)
    recipe = load_recipe(path, ["max_context=64"])
    assert [target.max_context for target in recipe.targets] == [512, 64]
    assert [target["max_context"] for target in recipe.to_dict()["targets"]] == [512, 64]
    assert "max_context" not in recipe.to_dict()
    plain = load_recipe(written(tmp_path, "max_context: 64\n"))
    assert plain.targets == (executorch.Target(max_context=64),)


def test_every_target_of_the_tools_recipes_takes_their_context() -> None:
    for path in RECIPES:
        recipe = load_recipe(path, ["max_context=77"])
        assert {target.max_context for target in recipe.targets} == {77}


def test_what_is_stored_of_a_recipe_has_every_key_in_the_order_of_its_bundles() -> None:
    data = load_recipe(NANO_INT4).to_dict()
    assert list(data) == [
        "name", "model", "license", "quantization", "calibration", "targets", "profile",
    ]  # fmt: skip
    targets = {target["target"]: target for target in data["targets"]}
    assert targets.keys() == {"executorch", "onnx", "coreml"}
    assert list(targets["executorch"]) == [
        "target", "max_context", "delegate", "attention", "activations", "kv_cache", "prefill",
        "logits",
    ]  # fmt: skip


def test_a_recipe_as_plain_data_is_the_same_recipe_again(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, BOTH), ["quantization.overrides.*.v_proj.*=float"])
    data = recipe.to_dict()
    data["targets"] = list(data["targets"])
    assert parse_recipe(data, "again") == recipe


def test_schemes_are_read_with_their_overrides() -> None:
    quantization = Quantization(
        linear="int8", embedding="int4-g64", overrides={"*.norm.*": "float"}
    )
    assert quantization.schemes() == (Scheme(8), Scheme(4, 64), {"*.norm.*": Scheme(None)})


# Overrides.


def value_at(recipe: Recipe, key: str) -> Any:
    place: Any = recipe.to_dict()
    for part in key.split("/"):
        place = place[int(part) if part.isdigit() else part]
    return place


OVERRIDES: dict[str, tuple[str, Any]] = {
    "targets.0.max_context=4096": ("targets/0/max_context", 4096),
    "targets.1.ort=true": ("targets/1/ort", True),
    "targets.1.activations=float16": ("targets/1/activations", "float16"),
    "quantization.linear=int4-g64": ("quantization/linear", "int4-g64"),
    "quantization.method=absmax": ("quantization/method", "absmax"),
    "quantization.overrides.model.layers.0.*=int8": (
        "quantization/overrides/model.layers.0.*",
        "int8",
    ),
    "quantization.overrides.*.mlp.*=float": ("quantization/overrides/*.mlp.*", "float"),
    "model=facebook/MobileLLM-R1-140M": ("model", "facebook/MobileLLM-R1-140M"),
    "model=a=b": ("model", "a=b"),
    "name=other": ("name", "other"),
    "targets=[{target: onnx, max_context: 7}]": ("targets/0/max_context", 7),
    "quantization={linear: float}": ("quantization/linear", "float"),
}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [(override, *expected) for override, expected in OVERRIDES.items()],
    ids=OVERRIDES,
)
def test_an_override_sets_its_value(override: str, key: str, value: Any, tmp_path: Path) -> None:
    path = written(tmp_path, BOTH)
    try:
        before = value_at(load_recipe(path), key)
    except KeyError:
        before = None
    assert before != value, "an override that changes nothing would prove nothing"
    assert value_at(load_recipe(path, [override]), key) == value


def test_an_override_changes_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path, BOTH)
    expected = load_recipe(path).to_dict()
    expected["targets"][0]["max_context"] = 4096
    assert load_recipe(path, ["targets.0.max_context=4096"]).to_dict() == expected


def test_the_last_of_two_overrides_of_one_key_wins(tmp_path: Path) -> None:
    path = written(tmp_path, BOTH)
    recipe = load_recipe(path, ["targets.0.max_context=64", "targets.0.max_context=128"])
    assert recipe.targets[0].max_context == 128


def test_overrides_of_patterns_keep_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    path = written(tmp_path, "quantization: {overrides: {b: int8}}\n")
    recipe = load_recipe(path, [f"quantization.overrides.{name}=int8" for name in "ca"])
    assert list(recipe.quantization.overrides) == ["b", "c", "a"]


BAD_OVERRIDES: dict[str, list[str]] = {
    "max_context": ["max_context", "is not an override", "key=value"],
    "=4096": ["=4096", "is not an override", "key=value"],
    "targets.0.bits=3": ["targets.0", "unknown key 'bits'", "Keys: target, max_context"],
    "targets.2.max_context=64": ["'2' is not one of 0..1", "Count from 0"],
    "targets.-1.max_context=64": ["'-1' is not one of 0..1", "Count from 0"],
    "targets.².max_context=64": ["'²' is not one of 0..1", "Count from 0"],
    "targets.first.max_context=64": ["'first' is not one of 0..1", "Count from 0"],
    "targets.2={target: onnx}": ["'2' is not one of 0..1", "Count from 0"],
    "targets.0.max_context=1": ["targets.0.max_context", "1 is too short", "2 or more"],
    "targets.0.max_context=-5": ["targets.0.max_context", "-5 is too short", "2 or more"],
    "targets.0.max_context=1k": ["targets.0.max_context", "'1k' is not of type int"],
    "targets.0.max_context=64.0": ["targets.0.max_context", "64.0 is not of type int"],
    "targets.0.max_context=true": ["targets.0.max_context", "True is not of type int"],
    "targets.0.max_context=": ["targets.0.max_context", "None is not of type int"],
    "max_context=1": ["mine.yaml: max_context", "1 is too short", "2 or more"],
    "max_context=long": ["mine.yaml: max_context", "'long' is not of type int"],
    "targets.0.max_context.more=1": ["targets.0.max_context.more=1", "holds no keys"],
    "targets.0.target=onnx": ["targets", "names a target twice", "onnx"],
    "targets.1.ort=1": ["targets.1.ort", "1 is not of type bool"],
    "model.size=3": ["model.size=3", "'model' holds no keys"],
    "modell=a/b": [
        "unknown key 'modell'",
        "Keys: name, model, license, quantization, calibration, targets",
        "profile, max_context",
    ],
    "quantization.bits=4": ["quantization", "unknown key 'bits'", "Keys: linear"],
    "quantization.linear=int3": ["quantization.linear", "'int3' is not a scheme", "Write int4"],
    "quantization.overrides.*.v_proj.*=int9": [
        "quantization.overrides.*.v_proj.*",
        "'int9' is not a scheme",
    ],
    "quantization.overrides.*=8": ["quantization.overrides.*", "8 is not of type str"],
    "profile.depths=[0, half]": ["profile.depths.1", "'half' is not of type int"],
    "profile={depths: [], prompt_lengths: []}": ["profile.depths", "is empty"],
    "calibration.data.0.epochs=3": ["calibration.data.0", "unknown key 'epochs'", "Keys: path"],
    "quantization=null": ["quantization", "None is not a mapping"],
    "targets.0.max_context=[64": ["targets.0.max_context=[64", "YAML"],
    "model=2026-13-45": ["model=2026-13-45"],
    "model=!!python/object/apply:os.system [false]": ["model=", "YAML"],
}


@pytest.mark.parametrize(("override", "parts"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES)
def test_a_bad_override_is_refused_with_its_key_and_value(
    override: str, parts: list[str], tmp_path: Path
) -> None:
    text = BOTH.replace("targets:", "model: a/b\ntargets:", 1)
    with pytest.raises(InputError) as raised:
        load_recipe(written(tmp_path, text), [override])
    assert_refused(raised.value, *parts)


# Bad recipes.

BAD_RECIPES: dict[str, tuple[str | bytes, list[str]]] = {
    "not YAML": ("a: [1\n", ["is not valid YAML", "Correct the file"]),
    "a tab": ("a:\n\t- 1\n", ["is not valid YAML", "Correct the file"]),
    "not UTF-8": (b"name: \xff\n", ["is not valid YAML"]),
    "an object of Python": ("name: !!python/object:os.x {}\n", ["is not valid YAML"]),
    "an impossible date": ("model: 2026-13-45\n", ["mine.yaml", "month"]),
    "a list": ("- model\n", ["does not hold a mapping", "See recipes/"]),
    "empty": ("", ["does not hold a mapping", "See recipes/"]),
    "an unknown key": ("quantisation: {}\n", ["unknown key 'quantisation'", "quantization"]),
    "a number as a key": ("7: x\n", ["unknown key 7", "Keys:"]),
    "a name that is a number": ("name: 7\n", ["name", "7 is not of type str"]),
    "a model that is null": ("model:\n", ["model", "None is not of type str"]),
    "quantization as text": ("quantization: int4\n", ["quantization", "'int4' is not a mapping"]),
    "bits": ("quantization: {bits: 4}\n", ["quantization", "unknown key 'bits'", "linear"]),
    "a method": ("quantization: {method: awq}\n", ["quantization.method", "'awq'", "'mse'"]),
    "a scheme": ("quantization: {linear: q4_0}\n", ["quantization.linear", "'q4_0'", "int4-gN"]),
    "a scheme that is a number": (
        "quantization: {embedding: 4}\n",
        ["quantization.embedding", "4 is not of type str"],
    ),
    "a group size": (
        "quantization: {linear: int4-g48}\n",
        ["quantization.linear", "'int4-g48'", "32, 64, 128, 256"],
    ),
    "overrides as a list": (
        "quantization: {overrides: [int8]}\n",
        ["quantization.overrides", "['int8'] is not a mapping of keys"],
    ),
    "an override's scheme": (
        "quantization: {overrides: {'*.v_proj.*': int5}}\n",
        ["quantization.overrides.*.v_proj.*", "'int5' is not a scheme"],
    ),
    "targets as a mapping": ("targets: {target: onnx}\n", ["targets", "not a list of targets"]),
    "no targets": (
        "targets: []\n",
        ["targets", "is empty", "Name one of coreml, executorch, gguf, mlx, onnx"],
    ),
    "a target twice": (
        "targets: [{target: onnx}, {target: onnx}]\n",
        ["targets", "names a target twice", "onnx"],
    ),
    "an unknown target": (
        "targets: [{target: tflite}]\n",
        ["targets.0.target", "'tflite' is not a target", "Known: coreml, executorch"],
    ),
    "a target without a name": (
        "targets: [{max_context: 8}]\n",
        ["targets.0.target", "None is not a target"],
    ),
    "a target as text": ("targets: [onnx]\n", ["targets.0.target", "is not a target"]),
    "bits in a target": (
        "targets: [{target: onnx, bits: 4}]\n",
        ["targets.0", "unknown key 'bits'", "max_context"],
    ),
    "another target's key": (
        "targets: [{target: onnx}, {target: executorch, form: contrib}]\n",
        ["targets.1", "unknown key 'form'", "attention"],
    ),
    "an attention form": (
        "targets: [{target: executorch, attention: flash}]\n",
        ["targets.0.attention", "'flash'", "'custom_sdpa', 'portable'"],
    ),
    "an attention form that is a list": (
        "targets: [{target: executorch, attention: [portable]}]\n",
        ["targets.0.attention", "['portable']"],
    ),
    "a context of one": (
        "targets: [{target: onnx, max_context: 1}]\n",
        ["targets.0.max_context", "1 is too short", "2 or more"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_refused_with_its_key_and_value(
    text: str | bytes, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(written(tmp_path, text))
    assert_refused(raised.value, *parts)


@pytest.mark.parametrize("text", ["a: [1\n", "- a\n", "bits: 4\n", "targets: []\n", "name: 7\n"])
def test_the_refusal_of_a_recipe_names_its_file(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as raised:
        load_recipe(path)
    assert raised.value.subject.startswith(str(path))


# Targets alone, as `lower` takes them.


def test_a_target_is_read_with_its_overrides() -> None:
    target = parse_target({"target": "onnx"}, "--target", ["max_context=64", "ort=true"])
    assert target == onnx.Target(max_context=64, ort=True)


def test_overrides_leave_the_data_of_a_target_as_it_was() -> None:
    raw = {"target": "onnx"}
    parse_target(raw, "--target", ["max_context=64"])
    assert raw == {"target": "onnx"}


@pytest.mark.parametrize(
    ("kind", "overrides", "parts"),
    [
        (
            "tflite",
            [],
            ["--target: target", "'tflite' is not a target", "Known: coreml, executorch"],
        ),
        ("onnx", ["bits=4"], ["--target", "unknown key 'bits'", "Keys: target"]),
        ("onnx", ["max_context=0"], ["--target: max_context", "0 is too short"]),
        ("executorch", ["attention=flash"], ["--target: attention", "'flash'", "'portable'"]),
    ],
)
def test_a_bad_target_is_refused_with_its_option(
    kind: str, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(InputError) as raised:
        parse_target({"target": kind}, "--target", overrides)
    assert_refused(raised.value, *parts)
