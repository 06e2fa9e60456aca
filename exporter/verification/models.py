"""The checks of each artifact: its integers, then its logits."""

from collections.abc import Collection, Mapping

from exporter.bundle.artifact import FinishedArtifact
from exporter.errors import MissingExtraError
from exporter.progress import Progress, TensorCounter
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.verification.checks import Check
from exporter.verification.integers import check_integers
from exporter.verification.logits import compare_with_reference, reference_logits
from exporter.verification.runs import Runs, Text, damaged_files, missing_runtime

#: How the note of a check begins that says that an artifact was not run.
NOT_RUN = "not run: "


def check_artifacts(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    runs: Runs,
    progress: Progress,
    damaged: Collection[str] = (),
) -> list[Check]:
    """Check the integers and logits of each artifact.

    `runs` are those of `running`. An artifact that it does not run fails, and the file in `damaged`
    is named. One whose runtime is not installed has a check that passes and tells so.
    """
    checks = list[Check]()
    absent = {target: error for target in artifacts if (error := missing_runtime(target))}
    run = {
        target: finished
        for target, finished in artifacts.items()
        if target in runs and target not in absent
    }
    references = reference_logits(quantized, run, texts)
    for target, finished in artifacts.items():
        counter = TensorCounter(progress, f"verify {target}: integers", len(quantized.schemes))
        checks += check_integers(quantized, finished, counter)
        stage = f"verify {target}: logits"
        progress(stage, 0, 1)
        if target in run:
            checks += compare_with_reference(
                finished, texts[target], references[target], runs[target]
            )
            progress(stage, 1, 1)
        elif target in absent and not damaged_files(finished, damaged):
            checks.append(_not_run(finished, absent[target]))
        else:
            subject = (
                *damaged_files(finished, damaged),
                *sorted(damaged),
                str(finished.artifact.path),
            )
            note = f"{NOT_RUN}the file is damaged"
            checks.append(Check("logits", target, subject[0], False, 1, 0, note))
    return checks


def _not_run(finished: FinishedArtifact, missing: MissingExtraError) -> Check:
    """The check of an artifact whose runtime is not installed: it has no value and no limit."""
    note = f"{NOT_RUN}{missing.subject} is not installed ({missing.remedy})"
    artifact = finished.artifact
    return Check("logits", artifact.target.target, str(artifact.path), True, None, None, note)
