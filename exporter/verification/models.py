"""The checks of each artifact: its integers, then its logits."""

from collections.abc import Collection, Mapping

from exporter.bundle.artifact import FinishedArtifact
from exporter.progress import Progress, TensorCounter
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.verification.checks import Check
from exporter.verification.integers import check_integers
from exporter.verification.logits import compare_with_reference, reference_logits
from exporter.verification.runs import Runs, Text, damaged_files


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
    is named.
    """
    checks = list[Check]()
    run = {target: finished for target, finished in artifacts.items() if target in runs}
    references = reference_logits(quantized, run, texts)
    for target, finished in artifacts.items():
        counter = TensorCounter(progress, f"verify {target}: integers", len(quantized.schemes))
        checks += check_integers(quantized, finished, counter)
        stage = f"verify {target}: logits"
        progress(stage, 0, 1)
        if target in runs:
            checks += compare_with_reference(
                finished, texts[target], references[target], runs[target]
            )
            progress(stage, 1, 1)
        else:
            subject = (
                *damaged_files(finished, damaged),
                *sorted(damaged),
                str(finished.artifact.path),
            )
            note = "not run: the file is damaged"
            checks.append(Check("logits", target, subject[0], False, 1, 0, note))
    return checks
