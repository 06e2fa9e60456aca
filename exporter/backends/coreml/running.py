"""Run the package of a Core ML artifact: in Core ML on a Mac, in the reference interpreter
elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.backends import Artifact, Runner
from exporter.backends.coreml import FILE_NAME, Target
from exporter.backends.coreml import interpreted as interpreted_here
from exporter.backends.coreml.graph import LOGITS
from exporter.backends.coreml.interpreter import Interpreter, State
from exporter.backends.coreml.language_model import CAUSAL_MASK, INPUT_IDS
from exporter.backends.coreml.package import Package, Value, open_package
from exporter.backends.coreml.program import DECODE, MAIN, PREFILL
from exporter.backends.coreml.toolkit import coremltools
from exporter.errors import InputError

#: The processors that may run a package. The Neural Engine computes int4 in blocks wrongly
#: (apple/coreai-models 279), so only a package in its own form may run there.
_COMPUTE_UNITS = {
    "cpu_and_gpu": coremltools.ComputeUnit.CPU_AND_GPU,
    "neural_engine": coremltools.ComputeUnit.CPU_AND_NE,
}


def check_room(tokens: int, context: int) -> None:
    """Raise InputError if the cache cannot hold so many tokens."""
    if not 0 < tokens <= context:
        raise InputError(
            "context",
            f"{tokens} tokens are not between 1 and {context}",
            "Lower the model with a larger max_context",
        )


#: Run a function on inputs, int32 or float16, and update the state. Returns logits, float32
#: [1, tokens, vocab_size].
Execute = Callable[[str, Mapping[str, Tensor], Any], Tensor]


class _Runner:
    """What the runners of both interfaces share: the cache, and how many positions are filled."""

    def __init__(self, execute: Execute, new_state: Callable[[], Any], artifact: Artifact) -> None:
        self._execute, self._new_state = execute, new_state
        assert isinstance(artifact.target, Target)
        self.context, self._steps = artifact.target.max_context, artifact.target.prefill
        self._state, self._position = new_state(), 0
        described = open_package(artifact.path / FILE_NAME).spec.description.metadata
        self.vocab_size = int(described.userDefined["vocab_size"])

    def _empty(self, tokens: int) -> None:
        """Empty the cache for a text that begins with so many tokens. Raises InputError."""
        check_room(tokens, self.context)
        self._state, self._position = self._new_state(), 0


class FunctionsRunner(_Runner):
    """A `Runner` of a package with two functions over one cache."""

    def prefill(self, tokens: list[int]) -> Tensor:
        """Read the tokens in chunks.

        A chunk that would end beyond the cache begins earlier. It reads some tokens again and
        writes the same keys and values for them.
        """
        self._empty(len(tokens))
        steps = self._steps
        while self._position < len(tokens):
            start = min(self._position, self.context - steps)
            chunk = tokens[start : start + steps]
            padded = chunk + [0] * (steps - len(chunk))
            logits = self._run(PREFILL, input_ids=[padded], position=[start], length=[len(chunk)])
            self._position = start + len(chunk)
        return logits

    def decode(self, token: int) -> Tensor:
        check_room(self._position + 1, self.context)
        logits = self._run(DECODE, input_ids=[[token]], position=[self._position])
        self._position += 1
        return logits

    def _run(self, function: str, **inputs: Any) -> Tensor:
        tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in inputs.items()}
        return self._execute(function, tensors, self._state)[0, -1]


class LanguageModelRunner(_Runner):
    """A `Runner` of a package with the interface of swift-transformers. It reads a prompt in chunks
    of at most `prefill` tokens, so that the logits of every token need not be in memory at once."""

    def prefill(self, tokens: list[int]) -> Tensor:
        self._empty(len(tokens))
        for start in range(0, len(tokens), self._steps):
            logits = self._read(tokens[start : start + self._steps])
        return logits

    def decode(self, token: int) -> Tensor:
        check_room(self._position + 1, self.context)
        return self._read([token])

    def _read(self, tokens: list[int]) -> Tensor:
        self._position += len(tokens)
        shape = (1, 1, len(tokens), self._position)
        first = self._position - len(tokens) + 1
        mask = torch.full(shape, -torch.inf, dtype=torch.float16).triu(first)
        ids = torch.tensor([tokens], dtype=torch.int32)
        inputs = {INPUT_IDS: ids, CAUSAL_MASK: mask}
        return self._execute(MAIN, inputs, self._state)[0, -1]


#: The ways to run a package in the reference interpreter: as it is, and with every float32 value
#: rounded to float16.
AS_IT_IS, WITHOUT_FLOAT32 = "interpreter", "float32_casts_ignored"


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in Core ML on a Mac, and in the reference interpreter elsewhere or as `variant`.

    With `output: token` it runs in the interpreter everywhere, since Core ML gives no logits then.
    """
    if _runs_here(artifact) and not variant:
        return _on_mac(artifact)
    return interpreted(artifact, half=variant == WITHOUT_FLOAT32)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """The reference interpreter, if `load` runs Core ML itself; and, if activations are float16
    but something else is float32, the interpreter without float32."""
    assert isinstance(artifact.target, Target)
    interpreter = (AS_IT_IS,) if _runs_here(artifact) else ()
    return interpreter + without_float32(artifact.target, open_package(artifact.path / FILE_NAME))


def without_float32(target: Target, package: Package) -> tuple[str, ...]:
    """The run without float32, for a package that has any but whose activations are float16."""
    float16 = target.activations == "float16"
    return (WITHOUT_FLOAT32,) if float16 and package.has_float32 else ()


def _runs_here(artifact: Artifact) -> bool:
    """Whether `load` runs Core ML itself."""
    assert isinstance(artifact.target, Target)
    return not interpreted_here(artifact.target)


def interpreted(artifact: Artifact, half: bool = False) -> Runner:
    """The artifact in the reference interpreter, on any machine; `half` as in `Interpreter`."""
    package = open_package(artifact.path / FILE_NAME)
    # Where nothing is float32, this run is the one without float32, which finds overflows.
    interpreter = Interpreter(package, half or not package.has_float32)

    def execute(function: str, inputs: Mapping[str, Tensor], state: State) -> Tensor:
        values = {name: _value(tensor) for name, tensor in inputs.items()}
        return interpreter.run(function, values, state, also=[LOGITS])[LOGITS].data

    return _runner_of(artifact)(execute, interpreter.new_state, artifact)


def _value(tensor: Tensor) -> Value:
    return (
        Value(tensor.float(), "fp16") if tensor.dtype == torch.float16 else Value(tensor, "int32")
    )


def _runner_of(artifact: Artifact) -> type[FunctionsRunner | LanguageModelRunner]:
    assert isinstance(artifact.target, Target)
    functions = artifact.target.interface == "functions"
    return FunctionsRunner if functions else LanguageModelRunner


def _on_mac(artifact: Artifact) -> Runner:
    """The artifact in Core ML itself. Untested: no Mac was available."""
    assert isinstance(artifact.target, Target)
    path = str(artifact.path / FILE_NAME)
    units = _COMPUTE_UNITS[artifact.target.compute]
    # A package with a single function is opened without its name.
    names = (PREFILL, DECODE) if artifact.target.interface == "functions" else (None,)
    functions = {
        name or MAIN: coremltools.models.MLModel(path, compute_units=units, function_name=name)
        for name in names
    }

    def execute(function: str, inputs: Mapping[str, Tensor], state: Any) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        logits = functions[function].predict(arrays, state=state)[LOGITS]
        return torch.from_numpy(np.asarray(logits, np.float32))

    new_state = next(iter(functions.values())).make_state
    return _runner_of(artifact)(execute, new_state, artifact)
