"""A bundle on devices: its artifacts become jobs of a session, `devices` does the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices import report
from devices.comparison import Comparison, compare
from devices.engines import FORMATS, Model
from devices.errors import DeviceError
from devices.files import write_json
from devices.session_state import Job, Progress, Settings
from devices.transports import parse_device
from exporter.backends import front
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import MANIFEST, Bundle, open_bundle
from exporter.errors import InputError
from exporter.files import differing_files, package_versions, read_json
from exporter.forecast import workload
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import Profile, parse_profile
from exporter.text.tokenizer import load_tokenizer
from exporter.verification import verification_text


@dataclass(frozen=True)
class Request:
    """What is asked for on the command line. `threads` 0 leaves the number to the device."""

    devices: Sequence[str]
    targets: Sequence[str] = ()
    overrides: Sequence[str] = ()
    runner: Path | None = None
    threads: int = 0
    timeout: float = 1800.0
    output: Path | None = None
    baseline: Path | None = None


@dataclass(frozen=True)
class Profiled:
    """The report, as `devices/schema.json` says, and how it compares with the baseline."""

    report: Mapping[str, Any]
    comparisons: Sequence[Comparison]

    @property
    def passed(self) -> bool:
        """Every session came to its end, and every matrix product reached its delegate."""
        sessions = self.report["sessions"]
        return all(s["status"] != "failed" and not s["undelegated"] for s in sessions)


def profile(path: Path, request: Request, progress: Progress) -> Profiled:
    """Profile the artifacts of a bundle. Raises InputError before anything is measured."""
    bundle = open_bundle(path)
    settings = _settings(bundle, request)
    try:
        devices = [parse_device(text) for text in dict.fromkeys(request.devices)]
        jobs = [job(bundle, finished, request) for finished in _chosen(bundle, request.targets)]
        baseline = None
        if request.baseline is not None:
            baseline = read_json(request.baseline)
            report.validate(baseline)
        resume_log = None
        if request.output is not None:
            resume_log = request.output.with_name(f"{request.output.name}.rounds")
        versions = package_versions("mobilellm-exporter")
        made = report.profile(devices, jobs, settings, progress, resume_log, versions)
        report.validate(made)
        if all(session["status"] == "skipped" for session in made["sessions"]):
            raise InputError(path, f"runs on none of these: {made['sessions'][0]['problem']}")
        if request.output is not None:
            write_json(request.output, made)
            report.finish(resume_log)
        return Profiled(made, [] if baseline is None else compare(made, baseline))
    except DeviceError as error:
        raise InputError(error.subject, error.problem, error.remedy) from error


def _settings(bundle: Bundle, request: Request) -> Settings:
    """The recipe's profile section, the context's own limits aside, with overrides."""
    recipe = read_json(bundle.path / MANIFEST).get("recipe", {})
    section = recipe.get("profile") or Profile().model_dump(mode="json")
    chosen = parse_profile(section, f"{bundle.path}: profile", request.overrides)
    if request.threads < 0 or request.timeout <= 0:
        raise InputError("--threads and --timeout", "must not be negative")
    return Settings(**chosen.model_dump(), threads=request.threads, timeout=request.timeout)


def _chosen(bundle: Bundle, targets: Sequence[str]) -> list[FinishedArtifact]:
    for name in targets:
        if name not in bundle.artifacts:
            held = ", ".join(bundle.artifacts)
            raise InputError(f"--target {name}", f"is not in {bundle.path}", f"It holds: {held}")
    return [f for name, f in bundle.artifacts.items() if not targets or name in targets]


def job(bundle: Bundle, finished: FinishedArtifact, request: Request) -> Job:
    """One artifact of a bundle for a session. Raises InputError where a file is damaged."""
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
    format_ = front(target.target)
    model = Model(
        format=target.target,
        folder=artifact.path,
        main=format_.FILE_NAME,
        files=tuple(name for name in artifact.files if _belongs(name, format_.FILE_NAME)),
        context=context,
        portable=format_.portable(target),
        integers=format_.integers(quantized.config, quantized.schemes, target),
        tokens=tokens,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        texts=_texts(quantized, tokens, lengths),
    )
    return Job(model, workload(quantized.config, quantized.schemes, target), request.runner)


def _belongs(name: str, main: str) -> bool:
    """A package's own files, and a model's external data; not what a tokenizer reads."""
    return name == main or name.startswith((f"{main}/", f"{main}."))


def _texts(
    quantized: QuantizedCheckpoint, tokens: Sequence[int], lengths: Sequence[int]
) -> dict[int, str]:
    """Prompts as text, for runners that read text: about so many tokens."""
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
