"""Rules of the design that no type checker checks: imports between modules, and unused code."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from conftest import NANO, ROOT

from exporter.backends import backend, front, names

PACKAGE = ROOT / "exporter"
DEVICES = ROOT / "devices"

#: The parts of `exporter`, from the bottom up. A part may import from its own layer and from those
#: below it, and nowhere in a circle.
LAYERS = (
    {"errors"},
    {
        "child_process", "files", "foreign", "progress", "settings", "stages", "tensors",
        "yaml_reader",
    },
    {"model", "text"},
    {"quantization"},
    {"backends"},
    {"bundle", "calibration", "evaluation", "inference", "verification"},
    {"recipe"},
    {
        "counting", "derivation", "forecast", "gate", "packaging", "profiling", "publishing",
        "report",
    },
    {"pipeline"},
    {"cli"},
    {"__main__"},
)  # fmt: skip
#: The backend that may import a toolkit.
TOOLKITS = {
    "executorch": "executorch",
    "torchao": "executorch",
    "coremltools": "coreml",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "mlx": "mlx",
    "mlx_lm": "mlx",
    "gguf": "gguf",
    "llama_cpp": "gguf",
}
#: The modules that may import a large library.
LIBRARIES = {
    "lm_eval": {"evaluation/lm_eval.py", "evaluation/lm_eval_plugin.py"},
    "pyarrow": {"text/documents.py"},
}

Layers = Sequence[set[str]]


# Each rule goes through all modules of a package and lists what is against it, with the file.


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too, as a dotted name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def libraries(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def parts_used(path: Path) -> set[str]:
    """The parts of `exporter` that a file imports: exporter.backends.onnx → backends."""
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "exporter" and len(name) > 1}


def parts(package: Path) -> dict[str, list[Path]]:
    """The modules of each part: of a folder, or the one of that name."""
    found: dict[str, list[Path]] = {}
    for path in modules(package):
        if path != package / "__init__.py":
            part = path.relative_to(package).parts[0].removesuffix(".py")
            found.setdefault(part, []).append(path)
    return found


def backend_of(package: Path, path: Path) -> str | None:
    """The backend that a module belongs to, where it belongs to one."""
    folder, *names = path.relative_to(package).parts
    return names[0].removesuffix(".py") if folder == "backends" else None


def shown(package: Path, path: Path, problem: object) -> str:
    return f"{path.relative_to(package).as_posix()}: {problem}"


def missing_parts(package: Path, layers: Layers = LAYERS) -> list[str]:
    present = parts(package)
    return [f"{part}: no such part" for part in sorted(set().union(*layers) - present.keys())]


def modules_without_a_layer(package: Path, layers: Layers = LAYERS) -> list[str]:
    known = set().union(*layers)
    return [
        shown(package, path, "in no layer")
        for part, files in parts(package).items()
        if part not in known
        for path in files
    ]


def imports_from_above(package: Path, layers: Layers = LAYERS) -> list[str]:
    height = {part: number for number, names in enumerate(layers) for part in names}
    return [
        shown(package, path, f"imports {used}")
        for part, files in parts(package).items()
        for path in files
        for used in sorted(parts_used(path) & height.keys())
        if height[used] > height.get(part, 0)
    ]


def circles(package: Path) -> list[str]:
    """The parts that import themselves by way of others."""
    present = parts(package)
    reached = {
        part: set().union(*map(parts_used, files)) & present.keys() - {part}
        for part, files in present.items()
    }
    for way in present:
        for part in present:
            if way in reached[part]:
                reached[part] |= reached[way]
    return [f"{part}: imports itself by way of others" for part in present if part in reached[part]]


def toolkits_outside_their_backend(package: Path) -> list[str]:
    return [
        shown(package, path, f"imports {toolkit}")
        for path in modules(package)
        for toolkit in sorted(libraries(path) & TOOLKITS.keys())
        if backend_of(package, path) != TOOLKITS[toolkit]
    ]


def libraries_outside_their_modules(package: Path) -> list[str]:
    return [
        shown(package, path, f"imports {library}")
        for path in modules(package)
        for library in sorted(libraries(path) & LIBRARIES.keys())
        if path.relative_to(package).as_posix() not in LIBRARIES[library]
    ]


def calibration_and_backends_importing_each_other(package: Path) -> list[str]:
    return [
        shown(package, path, f"imports {other}")
        for one, other in (("calibration", "backends"), ("backends", "calibration"))
        for path in parts(package).get(one, [])
        if other in parts_used(path)
    ]


def imports_of_the_exporter(package: Path) -> list[str]:
    return [
        shown(package, path, "imports exporter")
        for path in modules(package)
        if "exporter" in libraries(path)
    ]


def ways_to_run_code_of_a_file(package: Path) -> list[str]:
    forbidden = r"(torch\.load|yaml\.load|eval|exec|os\.system)\(|.*\bshell=True"
    found = []
    for path in modules(package):
        pickles = sorted(libraries(path) & {"pickle", "cPickle", "dill"})
        found += [shown(package, path, f"imports {name}") for name in pickles]
        calls = [ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        found += [shown(package, path, call) for call in calls if re.match(forbidden, call)]
    return found


def swallowed_exceptions(package: Path) -> list[str]:
    """`except: pass` and `except Exception: pass` hide what a user must know."""
    return [
        shown(package, path, ast.unparse(node).replace("\n    ", " "))
        for path in modules(package)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        if node.type is None or ast.unparse(node.type) == "Exception"
        if isinstance(node.body[0], ast.Pass)
    ]


def modules_without_a_docstring(package: Path) -> list[str]:
    return [
        shown(package, path, "no docstring")
        for path in modules(package)
        if not ast.get_docstring(tree(path))
    ]


def words_of_code(path: Path) -> Iterator[str]:
    """Every name and every text in a file that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.value
        elif isinstance(node, ast.Name | ast.Attribute):
            yield node.id if isinstance(node, ast.Name) else node.attr
    yield from imports(path)


def formats_named_outside_their_backend(package: Path, formats: Iterable[str]) -> list[str]:
    pattern = re.compile(rf"(?i)\b({'|'.join(formats)})\b")
    return [
        shown(package, path, word)
        for path in modules(package)
        if backend_of(package, path) in (None, "__init__")
        for word in words_of_code(path)
        if pattern.search(word)
    ]


# What the exporter and devices keep.


def test_every_package_and_every_file_beside_its_modules_is_installed() -> None:
    """setup.cfg lists packages by name; a package that it lacks is missing after `pip install`."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for top in (PACKAGE, DEVICES) for path in top.rglob("__init__.py")}
    packages = {folder.relative_to(ROOT).as_posix().replace("/", "."): folder for folder in folders}
    assert set(setup["options"]["packages"].split()) == {*packages, "exporter.recipes"}
    data = {name: text.split(", ") for name, text in setup["options.package_data"].items()}
    for name, folder in packages.items():
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"]
        left_out = [f for f in files if not any(f.match(p) for p in data.get(name, []))]
        assert left_out == []


def test_every_part_of_a_layer_exists() -> None:
    assert missing_parts(PACKAGE) == []


def test_every_module_has_its_place_in_a_layer() -> None:
    assert modules_without_a_layer(PACKAGE) == []
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


def test_no_module_imports_from_a_layer_above_its_own() -> None:
    assert imports_from_above(PACKAGE) == []


def test_no_part_imports_itself_by_way_of_others() -> None:
    assert circles(PACKAGE) == []


def test_a_mobile_toolkit_is_imported_by_its_backend_alone() -> None:
    assert toolkits_outside_their_backend(PACKAGE) == []
    owners = {backend_of(PACKAGE, path) for path in modules(PACKAGE)}
    assert set(TOOLKITS.values()) - owners == set()


def test_a_large_library_is_imported_where_it_is_needed_alone() -> None:
    assert libraries_outside_their_modules(PACKAGE) == []
    for library, owners in LIBRARIES.items():
        assert [name for name in owners if library not in libraries(PACKAGE / name)] == []


def test_a_format_is_named_in_its_backend_alone() -> None:
    suffixes = {
        Path(front(name).main_file(front(name).FILES)).suffix.removeprefix(".") for name in names()
    } - {"safetensors"}  # checkpoints have it too
    assert formats_named_outside_their_backend(PACKAGE, {*names(), *suffixes}) == []


def test_calibration_and_backends_do_not_see_each_other() -> None:
    assert calibration_and_backends_importing_each_other(PACKAGE) == []


def test_devices_know_nothing_of_the_exporter() -> None:
    assert imports_of_the_exporter(DEVICES) == []


def test_nothing_can_run_code_that_lies_in_a_file() -> None:
    assert ways_to_run_code_of_a_file(PACKAGE) == []


def test_no_exception_is_swallowed_whole() -> None:
    assert swallowed_exceptions(PACKAGE) == []


def test_every_module_says_what_it_is_for() -> None:
    assert modules_without_a_docstring(PACKAGE) == []


# Each rule on a package that is against it.

TWO_LAYERS: Layers = ({"errors"}, {"files"})
Rule = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("rule", "files", "found"),
    [
        (
            lambda package: missing_parts(package, TWO_LAYERS),
            {"errors.py": ""},
            ["files: no such part"],
        ),
        (
            lambda package: modules_without_a_layer(package, TWO_LAYERS),
            {"__init__.py": "", "errors.py": "", "more/one.py": ""},
            ["more/one.py: in no layer"],
        ),
        (
            lambda package: imports_from_above(package, TWO_LAYERS),
            {"errors.py": "def read():\n    from exporter.files import x", "files.py": ""},
            ["errors.py: imports files"],
        ),
        (
            circles,
            {
                "a.py": "import exporter.b",
                "b/x.py": "from exporter import c",
                "c.py": "from exporter.a import x",
                "d.py": "import exporter.a",
            },
            [f"{part}: imports itself by way of others" for part in "abc"],
        ),
        (
            toolkits_outside_their_backend,
            {
                "backends/onnx/a.py": "import onnx, coremltools.models",
                "backends/onnx.py": "import onnx",
                "backends/onnx_form.py": "import onnx",
                "onnx/a.py": "from onnx import helper",
            },
            [
                "backends/onnx/a.py: imports coremltools",
                "backends/onnx_form.py: imports onnx",
                "onnx/a.py: imports onnx",
            ],
        ),
        (
            libraries_outside_their_modules,
            {"text/documents.py": "import pyarrow", "files.py": "import pyarrow.parquet"},
            ["files.py: imports pyarrow"],
        ),
        (
            calibration_and_backends_importing_each_other,
            {
                "calibration/a.py": "from exporter.backends import backend",
                "backends/b.py": "import exporter.calibration.data",
            },
            ["calibration/a.py: imports backends", "backends/b.py: imports calibration"],
        ),
        (
            lambda package: formats_named_outside_their_backend(package, ["onnx", "pte"]),
            {
                "backends/__init__.py": "from exporter.backends import onnx",
                "backends/onnx/a.py": "x = 'onnx'",
                "sizes.py": '"""Of ONNX."""\nx = f"model.pte of {y}"',
            },
            ["backends/__init__.py: exporter.backends.onnx", "sizes.py: model.pte of "],
        ),
        (
            imports_of_the_exporter,
            {"adb.py": "def run():\n    import exporter.files"},
            ["adb.py: imports exporter"],
        ),
        (
            ways_to_run_code_of_a_file,
            {
                "a.py": "import pickle",
                "b.py": "x = torch.load(path)",
                "c.py": "subprocess.run(x, shell=True)",
                "d.py": "ast.literal_eval(x)",
            },
            [
                "a.py: imports pickle",
                "b.py: torch.load(path)",
                "c.py: subprocess.run(x, shell=True)",
            ],
        ),
        (
            swallowed_exceptions,
            {
                "a.py": "try:\n    x()\nexcept Exception:\n    pass",
                "b.py": "try:\n    x()\nexcept KeyError:\n    pass",
            },
            ["a.py: except Exception: pass"],
        ),
        (
            modules_without_a_docstring,
            {"a.py": '"""What for."""', "b.py": "# What for."},
            ["b.py: no docstring"],
        ),
    ],
    ids=[
        "missing part", "module without a layer", "import from above", "circle", "toolkit",
        "large library", "calibration and backends", "format", "devices", "code of a file",
        "swallowed exception", "docstring",
    ],
)  # fmt: skip
def test_a_package_against_a_rule_is_reported_with_its_file(
    rule: Rule, files: dict[str, str], found: list[str], tmp_path: Path
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert sorted(rule(tmp_path)) == sorted(found)


# What every backend has.


@pytest.fixture(params=names())
def module(request: pytest.FixtureRequest) -> ModuleType:
    return backend(request.param)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("check", ["config", "schemes", "target"]),
        ("check_folder", ["folder", "target"]),
        ("lower", ["quantized", "target", "out"]),
        ("load", ["artifact", "variant"]),
        ("weights", ["artifact", "quantized"]),
        ("differences", ["found", "expected"]),
        ("rounding", ["schemes", "target", "prompt"]),
        ("cache_rounding", ["target"]),
        ("largest_activation", ["target", "which"]),
        ("cross_checks", ["artifact"]),
        ("predict", ["config", "schemes", "target"]),
        ("integers", ["config", "schemes", "target"]),
        ("native", ["target"]),
        ("interpreted", ["target"]),
        ("packages", ["target"]),
        ("main_file", ["files"]),
        ("usage", ["target"]),
    ],
)
def test_every_backend_has_the_same_functions(
    function: str, parameters: list[str], module: ModuleType
) -> None:
    assert list(inspect.signature(getattr(module, function)).parameters) == parameters


@pytest.mark.parametrize("target", names())
def test_every_backend_names_its_files_and_its_packages(target: str) -> None:
    module = backend(target)
    packages = module.packages(module.Target())
    assert all(isinstance(name, str) for name in (*module.FILES, *packages))
    main = module.main_file(module.FILES)
    assert any(name == main or name.startswith(f"{main}/") for name in module.FILES)
    assert len(packages) > 0


@pytest.mark.parametrize("name", names())
def test_importing_a_backend_loads_neither_its_toolkit_nor_torch(name: str) -> None:
    assert toolkits_loaded_by(f"exporter.backends.{name}", LIGHT) == []


def test_every_backend_has_a_target_of_its_own_name() -> None:
    assert {name: front(name).Target().target for name in names()} == {
        name: name for name in names()
    }


#: What the command line and the front of a backend are loaded without.
LIGHT = [
    "torch", "numpy", "executorch", "torchao", "onnx", "onnxruntime", "coremltools", "gguf",
    "llama_cpp", "mlx", "mlx_lm",
]  # fmt: skip
HEAVY = [*LIGHT, *"pydantic transformers tokenizers safetensors huggingface_hub".split()]


def toolkits_loaded_by(module: str, heavy: list[str], folder: Path = ROOT) -> list[str]:
    """Which of the heavy packages importing a module of this folder loads."""
    program = f"import sys, {module}; print(*(n for n in {heavy} if n in sys.modules))"
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=folder
    ).stdout.split()


def test_importing_the_command_line_loads_no_toolkit() -> None:
    """`mobilellm --help` must not wait for torch."""
    assert toolkits_loaded_by("exporter.cli", HEAVY) == []


def test_a_toolkit_that_an_import_loads_is_reported(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import json, numpy.linalg")
    assert toolkits_loaded_by("heavy", HEAVY, tmp_path) == ["numpy"]


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
