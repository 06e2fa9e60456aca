"""Profiling of a bundle on devices: each artifact becomes a job for a session of `devices`.

mobilellm profile BUNDLE --device DEVICE

A device ``count:CPU`` has no session: what is counted on it stands beside them (`counting`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from devices import report
from devices.answers import contained
from devices.comparison import Comparison, compare
from devices.cores import parse_cores, show_cores
from devices.engines import FORMATS, Model
from devices.errors import DeviceError
from devices.files import check_replaceable, write_json
from devices.session_state import Job, Settings
from devices.transports import connected_devices, parse_device, transport_of
from exporter import counting
from exporter.backends import front
from exporter.bundle.archive import opened
from exporter.bundle.artifact import FinishedArtifact, is_of_model
from exporter.bundle.bundle import Bundle, open_bundle
from exporter.errors import InputError
from exporter.files import differing_files, package_versions, read_json
from exporter.forecast import workload
from exporter.progress import Progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import Profile, parse_profile
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.runs import verification_text

_MOST_THREADS = 1024
#: Seconds: ten days.
_LONGEST = 864_000


@dataclass(frozen=True)
class Request:
    """The options of the command line; with `threads` 0 the device chooses their number, `cores`
    are such as ``4-7``, and `timeout` is in seconds."""

    devices: Sequence[str]
    targets: Sequence[str] = ()
    overrides: Sequence[str] = ()
    runner: Path | None = None
    threads: int = 0
    timeout: float = 1800.0
    output: Path | None = None
    baseline: Path | None = None
    cores: str = ""
    mmap: bool = True
    packed_cache: bool = False


@dataclass(frozen=True)
class Profiled:
    """The report (`devices/schema.json`), and its comparison with the baseline."""

    report: Mapping[str, Any]
    comparisons: Sequence[Comparison]

    @property
    def passed(self) -> bool:
        """Whether no session and no count failed and every product ran in its delegate."""
        sessions, left_out = self.report["sessions"], self.report.get("not_counted", [])
        return all(s["status"] != "failed" and not s["undelegated"] for s in sessions) and all(
            one["status"] != "failed" for one in left_out
        )


def profile(path: Path, request: Request, progress: Progress) -> Profiled:
    """Profile the artifacts of a bundle, a folder or an archive, on the requested devices. Raises
    InputError."""
    with opened(path, partial(progress, "unpack")) as folder:
        return _profile(path, open_bundle(folder), request, progress)


def _profile(path: Path, bundle: Bundle, request: Request, progress: Progress) -> Profiled:
    try:
        settings = _settings(bundle, request)
        cpus, others = counting.split_devices(request.devices)
        devices = [parse_device(text) for text in others]
        _check_countable(request, cpus, alone=not devices)
        jobs = [job(bundle, finished, request) for finished in chosen(bundle, request.targets)]
        models = [one.model for one in jobs]
        counting.check(cpus, models, alone=not devices)
        baseline = None
        if request.baseline is not None:
            baseline = read_json(request.baseline)
            report.validate(baseline)
        resume_log = None
        if request.output is not None:
            check_replaceable(request.output)
            resume_log = request.output.with_name(f"{request.output.name}.rounds")
        versions = package_versions("mobilellm-exporter")
        made = report.profile(devices, jobs, settings, progress, resume_log, versions)
        if cpus:  # afterwards: it would keep this machine busy
            counts = counting.count(cpus, models, settings, progress)
            made |= {"counts": counts.counted, "not_counted": counts.left_out}
        report.validate(made)
        refused = [*made["sessions"], *made.get("not_counted", [])]
        if not made.get("counts") and all(one["status"] == "skipped" for one in refused):
            raise InputError(path, f"runs on none of the devices: {refused[0]['problem']}")
        if request.output is not None:
            write_json(request.output, made)
            report.finish(made, resume_log)
        return Profiled(made, [] if baseline is None else compare(made, baseline))
    except DeviceError as error:
        raise InputError(error.subject, error.problem, error.remedy) from error


def _check_countable(request: Request, cpus: Sequence[str], *, alone: bool) -> None:
    """Raise InputError for options that do not go together with the devices ``count:CPU``."""
    if cpus and request.runner is not None:
        problem = f"is not for --device count:{cpus[0]}, which counts the native runner"
        raise InputError(f"--runner {request.runner}", problem, "Leave one of them out")
    if cpus and alone and request.baseline is not None:
        problem = "compares times, and a count has none"
        raise InputError(
            f"--baseline {request.baseline}", problem, "mobilellm gate compares counts"
        )


@dataclass(frozen=True)
class Cleaned:
    """A device, and its folder of ours that was removed; `problem` says why it could not be."""

    device: str
    folder: str
    problem: str | None = None


def clean(names: Sequence[str], progress: Progress) -> list[Cleaned]:
    """Remove all that `profile` copied to these devices, or to all that are connected.

    Raises InputError for a name that is none of a device. A device that fails does not affect the
    others.
    """
    found = list[Cleaned]()
    try:
        devices = [parse_device(text) for text in dict.fromkeys(names or connected_devices())]
    except DeviceError as error:
        raise InputError(error.subject, error.problem, error.remedy) from error
    for number, device in enumerate(devices):
        progress("clean", number, len(devices), str(device))
        transport = transport_of(device)
        folder = transport.workspace(device)
        try:
            with contained(device, "the removal"):
                transport.remove(device, folder)
            found.append(Cleaned(str(device), folder))
        except DeviceError as error:
            found.append(Cleaned(str(device), folder, str(error)))
    return found


def _settings(bundle: Bundle, request: Request) -> Settings:
    """The profile section of the bundle's recipe, with overrides. Raises InputError."""
    section = bundle.manifest.recipe.get("profile") or Profile().model_dump(mode="json")
    chosen = parse_profile(section, f"{bundle.path}: profile", request.overrides)
    if not 0 <= request.threads <= _MOST_THREADS:
        raise InputError(f"--threads {request.threads}", f"is not from 0 to {_MOST_THREADS}")
    if not 0 < request.timeout <= _LONGEST:  # refuses nan too
        raise InputError(
            f"--timeout {request.timeout:g}", f"is not above 0 and at most {_LONGEST} seconds"
        )
    cores = show_cores(parse_cores(request.cores)) if request.cores else ""
    return Settings(
        **chosen.model_dump(), threads=request.threads, cores=cores, mmap=request.mmap,
        packed_cache=request.packed_cache, timeout=request.timeout,
    )  # fmt: skip


def chosen(bundle: Bundle, targets: Sequence[str]) -> list[FinishedArtifact]:
    """The artifacts of these targets, or with none, all of them. Raises InputError."""
    for name in targets:
        if name not in bundle.artifacts:
            held = ", ".join(bundle.artifacts)
            raise InputError(f"--target {name}", f"is not in {bundle.path}", f"It holds: {held}")
    return [f for name, f in bundle.artifacts.items() if not targets or name in targets]


def job(bundle: Bundle, finished: FinishedArtifact, request: Request) -> Job:
    """The job that measures one artifact. Raises InputError for a damaged file, and for a target
    that no engine in `devices` runs."""
    artifact, quantized = finished.artifact, bundle.quantized
    problems = differing_files(artifact.path, finished.manifest["files"])
    if problems:
        name, problem = next(iter(problems.items()))
        raise InputError(artifact.path / name, problem, "The file is damaged: export again")
    target, context = artifact.target, artifact.target.max_context
    if target.target not in FORMATS:
        known = f"Known: {', '.join(FORMATS)}"
        raise InputError(f"{artifact.path}: {target.target}", "has no engine on devices", known)
    tokens = verification_text(quantized, context, None).tokens
    tokenizer = artifact.path / "tokenizer.json"
    lengths = _settings(bundle, request).prompt_lengths if request.runner else ()
    module = front(target.target)
    model = Model(
        format=target.target,
        folder=artifact.path,
        main=module.main_file(artifact.files),
        files=tuple(
            name for name in artifact.files if is_of_model(name, artifact.files, target.target)
        ),
        context=context,
        native=module.native(target),
        integers=module.integers(quantized.config, quantized.schemes, target),
        tokens=tokens,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        texts=_texts(quantized, tokens, lengths),
        longest_call=getattr(target, "prefill", None),
    )
    return Job(model, workload(quantized.config, quantized.schemes, target), request.runner)


def _texts(
    quantized: QuantizedCheckpoint, tokens: Sequence[int], lengths: Sequence[int]
) -> dict[int, str]:
    """Prompts as text for runners that read text: length → a text of about that many tokens."""
    if not lengths or not (quantized.path / "tokenizer.json").is_file():
        return {}
    tokenizer, content = (
        load_tokenizer(quantized.path),
        [t for t in tokens if t != quantized.bos_token_id],
    )
    return {
        length: tokenizer.decode([content[i % len(content)] for i in range(length)])
        for length in lengths
    }
