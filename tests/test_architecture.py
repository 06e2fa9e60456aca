"""The rules of the design that no type checker sees: who imports whom, and what is never used."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import NANO, ROOT

from exporter.backends import BACKENDS, backend
from exporter.recipe import TARGETS

PACKAGE = ROOT / "exporter"
DEVICES = ROOT / "devices"

#: From the bottom up; a module may import from its own layer and those below it.
LAYERS = (
    {"errors"},
    {"files", "progress"},
    {"model", "text"},
    {"quantization", "recipe"},
    {
        "backends", "bundle", "calibration", "evaluation", "inference", "profiling", "sizes",
        "verification",
    },
    {"pipeline"},
    {"cli"},
    {"__main__"},
)  # fmt: skip
PART_OF_LAYER = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def modules(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    """The part of the package that a module belongs to: exporter.backends.onnx → backends."""
    names = module.split(".")
    return names[1] if names[0] == "exporter" and len(names) > 1 else None


def part_of_file(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


FILES = pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))


@FILES
def test_every_module_has_its_place_in_a_layer(path: Path) -> None:
    assert part_of_file(path) in PART_OF_LAYER or path == PACKAGE / "__init__.py"


@FILES
def test_no_module_imports_from_a_layer_above_its_own(path: Path) -> None:
    height = PART_OF_LAYER.get(part_of_file(path), 0)
    used = {name for name in map(part, imports(path)) if name in PART_OF_LAYER}
    assert {name for name in used if PART_OF_LAYER[name] > height} == set()


@FILES
def test_a_mobile_toolkit_is_imported_by_its_backend_alone(path: Path) -> None:
    toolkits = {"executorch", "torchao", "coremltools", "onnx", "onnxruntime"}
    used = {name.split(".")[0] for name in imports(path)} & toolkits
    owners = {
        "executorch": "executorch", "torchao": "executorch", "coremltools": "coreml",
        "onnx": "onnx", "onnxruntime": "onnx",
    }  # fmt: skip
    own = {kit for kit, owner in owners.items() if path.parent.name == owner}
    assert used <= (own if path.parent.parent.name == "backends" else set())


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("lm_eval", {"evaluation/lm_eval.py", "evaluation/lm_eval_plugin.py"}),
        ("pyarrow", {"text/documents.py"}),
    ],
)
def test_a_large_library_is_imported_where_it_is_needed_alone(
    package: str, owners: set[str]
) -> None:
    using = [p for p in modules() if package in {name.split(".")[0] for name in imports(p)}]
    assert {path.relative_to(PACKAGE).as_posix() for path in using} == owners


@pytest.mark.parametrize(
    ("one", "other"), [("calibration", "backends"), ("backends", "calibration")]
)
def test_calibration_and_backends_do_not_see_each_other(one: str, other: str) -> None:
    files = [path for path in modules() if part_of_file(path) == one]
    assert [path for path in files if other in set(map(part, imports(path)))] == []


def test_devices_know_nothing_of_the_exporter() -> None:
    seen = {path: {name.split(".")[0] for name in imports(path)} for path in modules(DEVICES)}
    assert [path for path, names in seen.items() if "exporter" in names] == []


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node)


@FILES
def test_nothing_can_run_code_that_lies_in_a_file(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path)} & {"pickle", "cPickle", "dill"} == set()
    forbidden = r"(torch\.load|yaml\.load|eval|exec|os\.system)\(|.*\bshell=True"
    assert [call for call in calls(path) if re.match(forbidden, call)] == []


@FILES
def test_no_exception_is_swallowed_whole(path: Path) -> None:
    """`except: pass` and `except Exception: pass` hide what a user must know."""
    handlers = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler)
    ]
    wide = [h for h in handlers if h.type is None or ast.unparse(h.type) == "Exception"]
    assert [ast.unparse(h) for h in wide if isinstance(h.body[0], ast.Pass)] == []


@FILES
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.fixture(params=sorted(BACKENDS))
def module(request: pytest.FixtureRequest) -> ModuleType:
    return backend(request.param)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("check", ["config", "schemes", "target"]),
        ("lower", ["quantized", "target", "out"]),
        ("load", ["artifact"]),
        ("weights", ["artifact", "quantized"]),
        ("rounding", ["schemes", "target", "prompt"]),
        ("largest_activation", ["target", "which"]),
        ("cross_check", ["artifact"]),
        ("packages", ["target"]),
    ],
)
def test_every_backend_has_the_same_functions(
    function: str, parameters: list[str], module: ModuleType
) -> None:
    assert list(inspect.signature(getattr(module, function)).parameters) == parameters


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_backend_names_its_files_and_its_packages(target: str) -> None:
    module = backend(target)
    packages = module.packages(TARGETS[target]())
    assert all(isinstance(name, str) for name in (*module.FILES, *packages))
    assert module.FILE_NAME in {Path(name).parts[0] for name in module.FILES}
    assert len(packages) > 0


def test_every_backend_is_a_target_of_recipes() -> None:
    assert BACKENDS.keys() == TARGETS.keys()


def python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_command_line_loads_no_toolkit() -> None:
    """`mobilellm --help` must not wait for torch."""
    heavy = "torch executorch torchao numpy transformers tokenizers safetensors huggingface_hub"
    found = python(
        f"import sys, exporter.cli; print([n for n in {heavy.split()} if n in sys.modules])"
    )
    assert found == "[]\n"


def without_executorch(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; sys.modules['executorch'] = None; from exporter.cli import main; "
        f"main({list(arguments)!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_inspect_works_without_executorch() -> None:
    outcome = without_executorch("inspect", str(NANO))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "mobilellm-r1-nano-int4" in outcome.stdout


def test_quantize_works_without_executorch_and_lower_names_the_extra(tmp_path: Path) -> None:
    quantized, out = str(tmp_path / "quantized"), tmp_path / "out"
    recipe = "mobilellm-r1-nano-int4"
    made = without_executorch("quantize", recipe, "--checkpoint", str(NANO), "-o", quantized)
    assert made.returncode == 0, made.stderr
    refused = without_executorch("lower", quantized, "--target", "executorch", "-o", str(out))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "pip install 'mobilellm-exporter[executorch]'" in refused.stderr
    assert not out.exists()


def test_export_without_executorch_says_so_before_any_work(tmp_path: Path) -> None:
    arguments = ["export", "mobilellm-r1-nano-int4", "--checkpoint", str(NANO), "-o"]
    outcome = without_executorch(*arguments, str(tmp_path / "out"))
    assert outcome.returncode == 2
    assert "pip install 'mobilellm-exporter[executorch]'" in outcome.stderr
    assert not (tmp_path / "out").exists()
