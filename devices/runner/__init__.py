"""Build the native runner (C++) and the memory probe (C) for the architecture of a device.

    python -m devices.runner build --arch aarch64

Needs Debian's g++ (or g++-aarch64-linux-gnu) and the executorch wheel, which has the libraries and
headers. For another architecture than this machine's, pip downloads the wheel of that architecture.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from devices.errors import BadDeviceError
from devices.files import cache_folder

RUNNER, PROBE = "mobilellm_runner", "mobilellm_probe"
#: In linking order. All are linked, also those that only register kernels or backends.
LIBRARIES = (
    "executorch",
    "executorch_threadpool",
    "executorch_backend_xnnpack",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_etdump",
)
#: Architecture → the prefix of Debian's compilers for it.
COMPILERS = {"x86_64": "x86_64-linux-gnu-", "aarch64": "aarch64-linux-gnu-"}
#: The C and C++ runtime is copied too, so that it runs on older systems and on Android.
_LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
_RUNTIME = (
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "libstdc++.so.6",
)
#: The manylinux tags that a wheel may have.
_GLIBC = ("_2_17", "_2_28", "_2_34", "2014")
SOURCES = Path(__file__).parent
#: Linked into every program. The rest is compiled otherwise or included.
_PARTS = ("attention.cpp", "packed_cache.cpp", "speculative.cpp")
#: Architecture → name of the attention's vector code → the compiler's options for it. At run time
#: attention.cpp chooses among those of an architecture.
KERNELS = {
    "x86_64": {
        "kernels_baseline": [],
        "kernels_avx2": ["-mavx2", "-mfma"],
        "kernels_avx512": [*(f"-mavx512{part}" for part in ("f", "vl", "dq", "bw")), "-mfma"],
    },
    # GCC's first scheduling lengthens the life of registers until the products' sums are moved.
    "aarch64": {"kernels_baseline": ["-fno-schedule-insns"]},
}


@dataclass(frozen=True)
class Build:
    """A folder with the runner, the probe and, below ``lib/``, all libraries of the runner.

    `executorch` is the version of the wheel. On a device the runner is started by `loader`:
    ``lib/ld-linux-… --library-path lib mobilellm_runner``.
    """

    folder: Path
    executorch: str
    loader: str

    @property
    def runner(self) -> Path:
        return self.folder / RUNNER

    @property
    def probe(self) -> Path:
        return self.folder / PROBE

    @property
    def libraries(self) -> list[Path]:
        return sorted((self.folder / "lib").iterdir())


def build(architecture: str) -> Build:
    """Build for ``x86_64`` or ``aarch64`` Linux, unless the cache has a build of the same sources.

    Raises BadDeviceError where a compiler or the wheel is missing.
    """
    if architecture not in COMPILERS:
        raise BadDeviceError(
            f"architecture {architecture}", "has no runner", f"Supported: {', '.join(COMPILERS)}"
        )
    version = _executorch_version()
    digest = hashlib.sha256(version.encode())
    for path in sorted([Path(__file__), *SOURCES.glob("*.[ch]"), *SOURCES.glob("*.cpp")]):
        digest.update(path.read_bytes())
    folder = cache_folder() / "runner" / f"{architecture}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        _build(architecture, version, folder)
    return Build(folder, version, _LOADERS[architecture])


def build_probe(architecture: str) -> Path:
    """Build the memory probe alone, which needs no wheel. Raises BadDeviceError."""
    digest = hashlib.sha256((SOURCES / "probe.c").read_bytes()).hexdigest()[:16]
    path = cache_folder() / "runner" / f"{PROBE}-{architecture}-{digest}"
    if not path.is_file():
        if architecture not in COMPILERS:
            raise BadDeviceError(f"architecture {architecture}", "has no memory probe")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            _compile_probe(architecture, Path(scratch) / PROBE)
            (Path(scratch) / PROBE).replace(path)
    return path


def _build(architecture: str, version: str, folder: Path) -> None:
    """Build in a temporary folder and rename it, so that `folder` never is incomplete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        (made / "lib").mkdir(parents=True)
        libraries = _libraries(architecture, version, Path(scratch))
        for name in LIBRARIES:
            shutil.copy(libraries / f"lib{name}.so", made / "lib")
        for name in (_LOADERS[architecture], *_RUNTIME):
            shutil.copy(_runtime_library(architecture, name), made / "lib" / name)
        compile_program(architecture, SOURCES / "runner.cpp", made, made / RUNNER)
        _compile_probe(architecture, made / PROBE)
        if not folder.is_dir():  # another process may have built it meanwhile
            made.rename(folder)


def compile_program(architecture: str, main: Path, made: Path, out: Path) -> None:
    """Compile a C++ program with the attention's kernels and the libraries below ``made/lib``."""
    headers = _package() / "include"
    portable = headers / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    with tempfile.TemporaryDirectory(dir=made) as scratch:
        kernels = list[str]()
        for name, options in KERNELS[architecture].items():
            kernels.append(f"{scratch}/{name}.o")
            compile_for(
                architecture, "g++", "-std=c++17", "-O3", "-ffp-contract=fast", *options,
                f"-DKERNELS={name}", "-c", str(SOURCES / "attention_kernel.cpp"),
                "-o", kernels[-1],
            )  # fmt: skip
        compile_for(
            architecture, "g++", "-std=c++17", "-O2", "-DC10_USING_CUSTOM_GENERATED_MACROS",
            f"-I{headers}", f"-I{portable}", f"-I{SOURCES}", str(main),
            *(str(SOURCES / part) for part in _PARTS), *kernels, "-o", str(out),
            f"-L{made / 'lib'}", "-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES),
            "-Wl,-rpath,$ORIGIN/lib", "-Wl,--allow-shlib-undefined",
        )  # fmt: skip


def _compile_probe(architecture: str, out: Path) -> None:
    """Linked statically, so that it also runs where there is no glibc."""
    source = str(SOURCES / "probe.c")
    compile_for(architecture, "gcc", "-O2", "-pthread", "-static", source, "-o", str(out))


def _runtime_library(architecture: str, name: str) -> Path:
    """The path at which the compiler finds one of its own libraries."""
    command = [_compiler(architecture, "g++"), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return Path(found)


def compile_for(architecture: str, compiler: str, *arguments: str) -> None:
    """Run ``gcc`` or ``g++`` for an architecture. Raises BadDeviceError where it is missing or
    fails."""
    program = _compiler(architecture, compiler)
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), "")
        raise BadDeviceError(program, f"cannot compile ({first or result.stderr.strip()})")


def _compiler(architecture: str, compiler: str) -> str:
    own = architecture == platform.machine()
    program = compiler if own else COMPILERS[architecture] + compiler
    if shutil.which(program) is None:
        package = compiler if own else f"{compiler}-{architecture.replace('_', '-')}-linux-gnu"
        raise BadDeviceError(program, "is not installed", f"Run: apt install {package}")
    return program


def _libraries(architecture: str, version: str, scratch: Path) -> Path:
    """The folder with the wheel's libraries for an architecture. Raises BadDeviceError."""
    if architecture == platform.machine():
        return _package() / "lib"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    platforms = [f"manylinux{glibc}_{architecture}" for glibc in _GLIBC]
    result = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(scratch), f"executorch=={version}",
         *(word for name in platforms for word in ("--platform", name))],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    if result.returncode:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        problem = f"pip cannot get the wheel for {architecture} ({reason})"
        raise BadDeviceError(f"executorch {version}", problem)
    (wheel,) = scratch.glob("*.whl")
    wanted = {f"executorch/lib/lib{name}.so" for name in LIBRARIES}
    with zipfile.ZipFile(wheel) as archive:
        for name in wanted:
            archive.extract(name, scratch)
    return scratch / "executorch" / "lib"


def _package() -> Path:
    spec = util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise _no_executorch()
    return Path(next(iter(spec.submodule_search_locations)))


def _executorch_version() -> str:
    try:
        return metadata.version("executorch").split("+")[0]
    except metadata.PackageNotFoundError as error:
        raise _no_executorch() from error


def _no_executorch() -> BadDeviceError:
    remedy = "Run: pip install 'mobilellm-exporter[executorch]'"
    return BadDeviceError("executorch", "is not installed; the runner is built from it", remedy)
