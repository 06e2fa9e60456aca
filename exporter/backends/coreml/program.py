"""The decoder as an ML Program: ``prefill`` and ``decode`` over one set of weights, or ``main``.

`graph` builds a function for CPU and GPU, `neural_engine` one for the Neural Engine, and
`language_model` the one that swift-transformers calls.
"""

from collections import Counter
from collections.abc import Mapping

from exporter.backends.coreml import Target
from exporter.backends.coreml.constants import Constants
from exporter.backends.coreml.graph import Decoder
from exporter.backends.coreml.language_model import LanguageModelDecoder
from exporter.backends.coreml.neural_engine import NeuralEngineDecoder
from exporter.backends.coreml.toolkit import Program, mb
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint

PREFILL, DECODE = "prefill", "decode"
#: The name of the function in a program with a single function.
MAIN = "main"


def build_program(quantized: QuantizedCheckpoint, target: Target) -> Program:
    """The program with both functions, which share their constants, or with the one that
    `interface: language_model` has."""
    if target.interface == "language_model":
        return _language_model(quantized, target)
    program = _program(quantized, target, {PREFILL: target.prefill, DECODE: 1})
    program.default_function_name = DECODE
    program.export_as_multifunction = True
    return program


def build_step(quantized: QuantizedCheckpoint, target: Target) -> Program:
    """The program with a single function, which reads one token: `decode` alone."""
    return _program(quantized, target, {MAIN: 1})


def _program(
    quantized: QuantizedCheckpoint, target: Target, functions: Mapping[str, int]
) -> Program:
    """`functions` maps the name of each function to the number of tokens that it reads at once."""
    program, constants = Program(), Constants(quantized, target)
    decoder = NeuralEngineDecoder if target.compute == "neural_engine" else Decoder
    for name, steps in functions.items():
        mb.name_count = Counter()  # generated names must not depend on earlier programs
        program.add_function(name, decoder(quantized.config, target, constants, steps).function())
    return program


def _language_model(quantized: QuantizedCheckpoint, target: Target) -> Program:
    program, constants = Program(), Constants(quantized, target)
    mb.name_count = Counter()
    decoder = LanguageModelDecoder(quantized.config, target, constants)
    program.add_function(MAIN, decoder.function())
    return program
