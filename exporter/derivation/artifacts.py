"""Lower the quantized checkpoint again, and compare every file of an artifact."""

import tempfile
from pathlib import Path

from exporter.backends import Artifact, backend
from exporter.bundle.artifact import (
    MANIFEST,
    FinishedArtifact,
    artifact_identity,
    write_artifact,
)
from exporter.errors import InputError
from exporter.files import differing_files, sha256
from exporter.progress import Progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.verification.checks import Check

#: Differences of one artifact that are listed; the rest is not read.
_MOST_LISTED = 20


def check_derived(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, progress: Progress
) -> list[Check]:
    """Lower the quantized checkpoint again for the artifact's target, and compare every file."""
    target = finished.artifact.target
    stage = f"verify {target.target}: derive again"
    progress(stage, 0, 1)
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        identity = artifact_identity(quantized, target)
        derived = write_artifact(quantized, target, identity, Path(scratch) / target.target)
        checks = compare_artifacts(finished, derived)
    progress(stage, 1, 1)
    return checks


def compare_artifacts(found: FinishedArtifact, derived: FinishedArtifact) -> list[Check]:
    """Compare an artifact with one that was derived just now: one check per file, its manifest
    included, and one for each difference of the models that is named.

    If other versions of the toolkit wrote the artifact, its bytes may differ, and the models must
    have no difference.
    """
    folder, target = found.artifact.path, derived.artifact.target.target
    module, manifest = backend(target), derived.artifact.path / MANIFEST
    hashes = {**derived.manifest["files"], MANIFEST: sha256(manifest)}
    problems = differing_files(folder, hashes)
    extra = [name for name in found.manifest["files"] if name not in hashes]
    problems |= dict.fromkeys(extra, "is not a file of this artifact")
    named = list[tuple[str, str]]()
    if not problems.keys().isdisjoint(module.FILES):
        named = _named_differences(found.artifact, derived.artifact)
    checks = list[Check]()
    written, here = found.manifest["versions"], derived.manifest["versions"]
    if written != here:
        versions = [f"{name} {written.get(name)}, here {here.get(name)}" for name in here]
        note = "the structure of the models is compared instead of their bytes"
        checks.append(Check("derived", target, ", ".join(versions), True, 0, None, note))
    may_vary = () if written == here else (*module.FILES, MANIFEST)
    for name in (*hashes, *extra):
        problem = problems.get(name, "")
        varies = name in may_vary and name in hashes and (folder / name).is_file()
        same = not problem or (varies and not named)
        note = "" if same else f"is not the file that is derived again: {problem}"
        checks.append(Check("derived", target, f"{target}/{name}", same, not same, 0, note))
    return checks + [Check("derived", target, place, False, 1, 0, what) for place, what in named]


def _named_differences(found: Artifact, derived: Artifact) -> list[tuple[str, str]]:
    """The first differences of the models. A file that cannot be parsed is one of them."""
    named = list[tuple[str, str]]()
    try:
        for place, what in backend(derived.target.target).differences(found, derived):
            if len(named) == _MOST_LISTED:
                return [*named, ("model", f"has more than these {_MOST_LISTED} differences")]
            named.append((place, what))
    except InputError as error:
        named.append((error.subject, error.problem))
    except Exception as error:  # a toolkit's parser may raise anything for a damaged file
        named.append(("model", f"cannot be read ({type(error).__name__}: {error})"))
    return named
