"""Import coremltools without its warnings.

Its import warns about scikit-learn, versions of torch and the operating system, which do not matter
for an export. Other modules take its names from here.
"""

import logging
import warnings
from typing import Any

_level = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
        from coremltools.converters.mil.backend.mil.load import load
        from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  # its name everywhere
        from coremltools.converters.mil.mil import Function, Program, types
        from coremltools.proto import MIL_pb2, Model_pb2
finally:
    logging.disable(_level)

Var = Any  # a value of a program; coremltools has no annotations

__all__ = [
    "Function",
    "MIL_pb2",
    "Model_pb2",
    "Program",
    "Var",
    "coremltools",
    "load",
    "mb",
    "types",
]
