"""The Swift sample: Swift checks its types, against stubs of Core ML where there is none."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SAMPLE = ROOT / "examples" / "ios" / "Decoder.swift"
STUBS = ROOT / "tests" / "ios" / "CoreML.swift"
#: What `make swift` makes.
DEBIANS = ROOT / "build" / "swift" / "swiftc"


def swift(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = DEBIANS if DEBIANS.is_file() else "swiftc"
    return subprocess.run(
        [str(command), *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The arguments for a compilation with Core ML's stubs; none on a Mac, which has Core ML."""
    if not DEBIANS.is_file() and shutil.which("swiftc") is None:
        pytest.skip("there is no Swift compiler: run `make swift` on Debian")
    folder = tmp_path_factory.mktemp("stubs")
    common = ("-parse-as-library", "-module-cache-path", folder)
    if sys.platform == "darwin":
        return common
    module = ("-emit-module", "-module-name", "CoreML", "-o", folder / "CoreML.swiftmodule")
    made = swift(*module, *common, STUBS)
    assert made.returncode == 0, made.stderr
    return (*common, "-I", folder)


def errors_in(source: str, folder: Path, stubs: tuple[object, ...], language: int) -> str:
    file = folder / "Decoder.swift"
    file.write_text(source)
    checked = swift("-typecheck", "-swift-version", language, *stubs, file)
    return "" if checked.returncode == 0 else checked.stderr


@pytest.mark.parametrize("language", [5, 6])
def test_the_sample_has_no_wrong_type_on_arm_nor_on_intel(
    language: int, stubs: tuple[object, ...], tmp_path: Path
) -> None:
    source = SAMPLE.read_text()
    other = source.replace("#if arch(arm64)", "#if !arch(arm64)")
    assert other != source
    assert errors_in(source, tmp_path, stubs, language) == ""
    assert errors_in(other, tmp_path, stubs, language) == ""


@pytest.mark.parametrize(
    ("written", "wrong", "said"),
    [
        ("configuration.functionName = function", "configuration.functionName = 1", "Int"),
        ("using: state)", "using: context)", "MLState"),
        ("try await self.step(token)", "self.step(token)", "async"),
    ],
)
def test_a_wrong_type_in_the_sample_is_found(
    written: str, wrong: str, said: str, stubs: tuple[object, ...], tmp_path: Path
) -> None:
    source = SAMPLE.read_text()
    assert source.count(written) == 1
    found = errors_in(source.replace(written, wrong), tmp_path, stubs, 6)
    assert "error:" in found
    assert said in found
