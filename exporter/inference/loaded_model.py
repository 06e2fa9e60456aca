"""Load a model to run it: a checkpoint, a quantized checkpoint, an artifact or a bundle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.backends import Runner, front, inspector_of
from exporter.bundle.archive import is_archive, opened
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.bundle import QUANTIZED as BUNDLE_QUANTIZED
from exporter.bundle.bundle import Bundle, is_bundle, open_bundle
from exporter.errors import InputError
from exporter.files import differing_files
from exporter.inference.artifact_runner import ArtifactRunner
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.progress import OnStep, no_step
from exporter.quantization.activations import Roundings
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import (
    QuantizedCheckpoint,
    open_quantized,
    require_whole,
    source_hashes,
)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what it was loaded from. `kind` names its form and
    runtime."""

    runner: Runner
    tokenizer_folder: Path
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kind: str
    source: Checkpoint | QuantizedCheckpoint | FinishedArtifact


#: The largest KV cache, in tokens, of a model that runs in torch.
REFERENCE_CONTEXT = 4096


@contextmanager
def opened_source(source: str, on_step: OnStep = no_step) -> Iterator[str]:
    """`source` itself, or the folder of a bundle in an archive, which is unpacked for as long as
    the context is open. Raises InputError."""
    path = Path(source)
    if not is_archive(path):
        yield source
        return
    with opened(path, on_step) as folder:
        yield str(folder)


def open_model(source: str, target: str | None) -> LoadedModel:
    """Load `source`: a bundle, an artifact, a quantized checkpoint or a checkpoint.

    `target` selects an artifact of a bundle; the default is its first one. A checkpoint is a folder
    or a hub id. Raises InputError.
    """
    path = Path(source)
    if _is_bundle(path):
        return _load_artifact(_chosen(open_bundle(path), target))
    if target is not None:
        raise InputError("--target", f"{path} is not a bundle", "Leave the option out")
    within = inspector_of(path) is not None  # a .mlpackage is a folder inside its artifact
    if path.is_file() or within or (path / ARTIFACT_MANIFEST).is_file():
        return _load_artifact(open_artifact(path))
    quantized = (path / QUANTIZED_MANIFEST).is_file()
    kind = "quantized checkpoint in torch" if quantized else "checkpoint in torch"
    return _load_in_torch(
        open_quantized(path) if quantized else open_checkpoint(source), kind, Roundings()
    )


def open_simulated(source: str, target: str | None, prompt: int) -> LoadedModel:
    """Load the quantized checkpoint of a bundle in torch, with a runtime's rounding.

    It is the rounding of activations and of the cache of the artifact for `target`, if its prefill
    reads `prompt` tokens at once.
    Raises InputError.
    """
    path = Path(source)
    if not _is_bundle(path):
        raise InputError(
            "--simulate", f"{path} is not a bundle", "Give the bundle that holds the artifact"
        )
    bundle = open_bundle(path)
    chosen = _chosen(bundle, target).artifact.target
    module = front(chosen.target)
    roundings = Roundings(
        module.rounding(bundle.quantized.schemes, chosen, prompt), module.cache_rounding(chosen)
    )
    return _load_in_torch(bundle.quantized, f"{chosen.target} simulated in torch", roundings)


def open_quantized_of(source: str) -> QuantizedCheckpoint | None:
    """The quantized checkpoint of a bundle, or at `source` itself, with its files checked; None for
    anything else. Raises InputError."""
    path = Path(source)
    if _is_bundle(path):
        quantized = open_bundle(path).quantized
    elif (path / QUANTIZED_MANIFEST).is_file():
        quantized = open_quantized(path)
    else:
        return None
    require_whole(quantized)
    return quantized


def file_hashes(model: LoadedModel) -> dict[str, str]:
    """The SHA-256 of the files that the model was loaded from: name → hash.

    Those of an artifact or a quantized checkpoint are the ones of its manifest, with which the
    files were compared at loading. Those of a checkpoint are computed, which reads all of it.
    """
    source = model.source
    if isinstance(source, Checkpoint):
        return source_hashes(source)
    return dict(source.manifest["files"])


def _is_bundle(path: Path) -> bool:
    return is_bundle(path) or (path / BUNDLE_QUANTIZED).is_dir()


def _chosen(bundle: Bundle, target: str | None) -> FinishedArtifact:
    name = target or next(iter(bundle.artifacts))
    if name not in bundle.artifacts:
        raise InputError(
            f"--target {name}",
            f"is not in {bundle.path}",
            f"It holds: {', '.join(bundle.artifacts)}",
        )
    return bundle.artifacts[name]


def _load_in_torch(
    model: Checkpoint | QuantizedCheckpoint, kind: str, roundings: Roundings
) -> LoadedModel:
    if isinstance(model, QuantizedCheckpoint):
        require_whole(model)
    context = min(model.config.max_position_embeddings, REFERENCE_CONTEXT)
    runner = ReferenceRunner(model, context, roundings.inputs, roundings.cache)
    return LoadedModel(runner, model.path, model.bos_token_id, model.eos_token_ids, kind, model)


def _load_artifact(finished: FinishedArtifact) -> LoadedModel:
    artifact = finished.artifact
    problems = differing_files(artifact.path, finished.manifest["files"])
    if problems:
        name, problem = next(iter(problems.items()))
        raise InputError(artifact.path / name, problem, "The file is damaged: lower it again")
    name = artifact.target.target
    runner = ArtifactRunner(artifact)
    runner.wait()
    return LoadedModel(
        runner,
        artifact.path,
        finished.manifest.get("bos_token_id"),
        finished.eos_token_ids,
        name if not front(name).interpreted(artifact.target) else f"{name}, interpreted",
        finished,
    )
