"""A model that can be asked, whatever it is: checkpoint, waist, artifact or bundle."""

from dataclasses import dataclass
from pathlib import Path

from exporter.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.artifact import FinishedArtifact, open_artifact
from exporter.backends import Runner, backend
from exporter.backends.reference import ReferenceRunner
from exporter.bundle import WAIST as BUNDLE_WAIST
from exporter.bundle import Bundle, is_bundle, open_bundle
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import InputError
from exporter.files import differing_files
from exporter.quantization.activations import Rounding
from exporter.quantization.waist import MANIFEST as WAIST_MANIFEST
from exporter.quantization.waist import QuantizedCheckpoint, open_waist, require_whole


@dataclass(frozen=True)
class Speaker:
    """A model that can be asked: its runner, and the folder with its tokenizer."""

    runner: Runner
    tokenizer_folder: Path
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kind: str


#: The cache of a checkpoint or a waist that runs in torch.
REFERENCE_CONTEXT = 4096


def open_speaker(source: str, target: str | None) -> Speaker:
    """Whatever `source` is: a bundle (`target` picks its artifact), an artifact, a waist or a
    checkpoint (folder or hub id). Raises InputError."""
    path = Path(source)
    if _is_bundle(path):
        return _artifact_speaker(_chosen(open_bundle(path), target))
    if target is not None:
        raise InputError("--target", f"{path} is not a bundle", "Leave the option out")
    package = path.suffix == ".mlpackage"  # a folder within the artifact's
    if path.is_file() or package or (path / ARTIFACT_MANIFEST).is_file():
        return _artifact_speaker(open_artifact(path))
    waist = (path / WAIST_MANIFEST).is_file()
    kind = "waist in torch" if waist else "checkpoint in torch"
    return _torch_speaker(open_waist(path) if waist else open_checkpoint(source), kind, None)


def open_simulated(source: str, target: str | None, prompt: int) -> Speaker:
    """The waist of a bundle in torch, with activations rounded as the runtime of one of its
    artifacts does it where the first `prompt` tokens are read at once. Raises InputError."""
    path = Path(source)
    if not _is_bundle(path):
        raise InputError(
            "--simulate", f"{path} is not a bundle", "Give the bundle that holds the artifact"
        )
    bundle = open_bundle(path)
    chosen = _chosen(bundle, target).artifact.target
    rounding = backend(chosen.target).rounding(bundle.waist.schemes, chosen, prompt)
    return _torch_speaker(bundle.waist, f"{chosen.target} simulated in torch", rounding)


def _is_bundle(path: Path) -> bool:
    return is_bundle(path) or (path / BUNDLE_WAIST).is_dir()


def _chosen(bundle: Bundle, target: str | None) -> FinishedArtifact:
    name = target or next(iter(bundle.artifacts))
    if name not in bundle.artifacts:
        raise InputError(
            f"--target {name}",
            f"is not in {bundle.path}",
            f"It holds: {', '.join(bundle.artifacts)}",
        )
    return bundle.artifacts[name]


def _torch_speaker(
    model: Checkpoint | QuantizedCheckpoint, kind: str, rounding: Rounding | None
) -> Speaker:
    if isinstance(model, QuantizedCheckpoint):
        require_whole(model)
    context = min(model.config.max_position_embeddings, REFERENCE_CONTEXT)
    runner = ReferenceRunner(model, context, rounding)
    return Speaker(runner, model.path, model.bos_token_id, model.eos_token_ids, kind)


def _artifact_speaker(finished: FinishedArtifact) -> Speaker:
    artifact = finished.artifact
    problems = differing_files(artifact.path, finished.manifest["files"])
    if problems:
        name, problem = next(iter(problems.items()))
        raise InputError(artifact.path / name, problem, "The file is damaged: lower it again")
    return Speaker(
        backend(artifact.target.target).load(artifact),
        artifact.path,
        finished.manifest.get("bos_token_id"),
        finished.eos_token_ids,
        artifact.target.target,
    )
