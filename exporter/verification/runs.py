"""Run artifacts in their own runtimes on a text, also while something else is computed."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.backends import Artifact, Runner, backend, check_runtime, front
from exporter.bundle.artifact import FinishedArtifact
from exporter.errors import InputError, MissingExtraError
from exporter.foreign import read_bytes
from exporter.inference.artifact_runner import ArtifactRunner
from exporter.model.checkpoint import Checkpoint
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.text.documents import DATA_BYTES
from exporter.text.tokenizer import load_tokenizer

SAMPLE_TEXT = Path(__file__).parents[1] / "evaluation" / "sample.txt"
#: Lengths of the prefills in tokens; the decode steps continue the last one.
PREFILL_LENGTHS = (1, 17, 64)
DECODE_STEPS = 128


@dataclass(frozen=True)
class Text:
    """Tokens to compare logits on; `real` is False for random tokens."""

    tokens: tuple[int, ...]
    source: str
    real: bool

    @property
    def prefill_lengths(self) -> tuple[int, ...]:
        """The lengths of the prefills in tokens: at most half of the text."""
        half = max(1, len(self.tokens) // 2)
        return tuple(sorted({min(length, half) for length in PREFILL_LENGTHS}))

    @property
    def positions(self) -> list[int]:
        """The position of the last token that was read for each row of logits."""
        lengths = self.prefill_lengths
        return [*(length - 1 for length in lengths), *range(lengths[-1], len(self.tokens))]


def verification_text(
    model: Checkpoint | QuantizedCheckpoint, context: int, file: Path | None
) -> Text:
    """The first tokens of `file`, or of the sample text; random tokens of a fixed seed if the model
    has no tokenizer. Raises InputError for a file that cannot be used."""
    wanted, vocab_size = min(PREFILL_LENGTHS[-1] + DECODE_STEPS, context), model.config.vocab_size
    if not (model.path / "tokenizer.json").is_file():
        if file is not None:
            raise InputError(file, "cannot be read without the model's tokenizer.json")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (wanted,), generator=generator)
        return Text(tuple(ids.tolist()), "seeded random tokens (there is no tokenizer)", False)
    path = file or SAMPLE_TEXT
    try:
        content = read_bytes(path, DATA_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read as text ({error})", "Give a UTF-8 file") from error
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    tokens = (bos + load_tokenizer(model.path).encode(content))[:wanted]
    if len(tokens) < min(3, wanted):
        raise InputError(path, f"gives {len(tokens)} tokens, too few to compare", "Give more text")
    if max(tokens) >= vocab_size:
        raise InputError(
            model.path / "tokenizer.json",
            f"gives token {max(tokens)}, outside the model's vocabulary of {vocab_size}",
            "The tokenizer does not belong to this model",
        )
    return Text(tuple(tokens), str(file or "the built-in sample text"), True)


def missing_runtime(target: str) -> MissingExtraError | None:
    """What says that the runtime of a format is not installed, or None if it is.

    Raises MissingExtraError if not even the toolkit is installed.
    """
    backend(target)
    try:
        check_runtime(target)
    except MissingExtraError as error:
        return error
    return None


def runs_everywhere(target: str) -> bool:
    """Whether a format's runtime is installed wherever the format is lowered."""
    module = front(target)
    return set(module.RUNTIME) <= set(module.TOOLKIT)


#: Loads an artifact in its runtime, or in the way that the variant names.
Load = Callable[[Artifact, str], Runner]


def load_in_this_process(artifact: Artifact, variant: str) -> Runner:
    """A `Load` for artifacts of our own: a damaged one may end this process."""
    runner: Runner = backend(artifact.target.target).load(artifact, variant)
    return runner


def run_artifact(
    artifact: Artifact, text: Text, load: Load = load_in_this_process
) -> dict[str, Tensor]:
    """The logits [steps, vocab_size] of an artifact in its runtime, by the name '', and in each
    other way to run it, by its name."""
    return _run(artifact, text, load, _variants(artifact))


def _variants(artifact: Artifact) -> tuple[str, ...]:
    return "", *backend(artifact.target.target).cross_checks(artifact)


def _run(artifact: Artifact, text: Text, load: Load, variants: Sequence[str]) -> dict[str, Tensor]:
    return {
        variant: run_teacher_forced(load(artifact, variant), text.tokens, text.prefill_lengths)
        for variant in variants
    }


#: By target: gives the logits of `run_artifact`, or raises what it raises.
Runs = Mapping[str, Callable[[], dict[str, Tensor]]]


@contextmanager
def running(
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    damaged: Collection[str] = (),
) -> Iterator[Runs]:
    """Run the artifacts one after the other in child processes, while the block does other work.

    An artifact without a text, with a file in `damaged`, or without an installed runtime, is not
    run.
    """
    current: ArtifactRunner | None = None

    def load(artifact: Artifact, variant: str) -> Runner:
        nonlocal current
        current = ArtifactRunner(artifact, variant)
        return current

    pool = ThreadPoolExecutor(1)
    try:
        yield {
            # Not in the thread: `cross_checks` may import a toolkit, which two threads may not do.
            target: pool.submit(
                _run, finished.artifact, texts[target], load, _variants(finished.artifact)
            ).result
            for target, finished in artifacts.items()
            if target in texts
            and not damaged_files(finished, damaged)
            and not missing_runtime(target)
        }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if current is not None:
            current.stop()  # if the block was left early


def run_teacher_forced(
    runner: Runner, tokens: Sequence[int], prefill_lengths: Sequence[int]
) -> Tensor:
    """Logits [steps, vocab_size]: after each prefill, then after each decode step over the tokens
    that follow the last prefill."""
    rows = [runner.prefill(list(tokens[:length])) for length in prefill_lengths]
    rows += [runner.decode(token) for token in tokens[prefill_lengths[-1] :]]
    return torch.stack(rows)


def damaged_files(finished: FinishedArtifact, damaged: Collection[str]) -> list[str]:
    """The files of the artifact that are in `damaged`."""
    names = (f"{finished.artifact.target.target}/{name}" for name in finished.manifest["files"])
    return [name for name in names if name in damaged]
