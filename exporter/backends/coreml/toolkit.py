"""Import coremltools without its warnings, and without the packages that it can also convert from.

Its import warns about versions of torch and the operating system, which do not matter for an
export. It looks for packages that have nothing to do with an export either, and importing these
takes most of its time. Other modules take its names from here.
"""

import logging
import sys
import warnings
from typing import Any

from exporter.backends import TOOLKIT_IMPORTS

_level = logging.root.manager.disable
with TOOLKIT_IMPORTS:
    #: What its import looks for. Those that are already imported stay visible.
    _hidden = {"executorch", "sklearn", "torchao"} - sys.modules.keys()
    logging.disable(logging.WARNING)
    sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]  # None: not to be imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
            from coremltools.converters.mil.backend.mil.load import load
            from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  # its usual name
            from coremltools.converters.mil.mil import (
                Function,
                Program,
                get_new_symbol,
                types,
            )
            from coremltools.proto import MIL_pb2, Model_pb2
    finally:
        logging.disable(_level)
        for _name in _hidden:
            del sys.modules[_name]

Var = Any  # a value of a program; coremltools has no annotations

__all__ = [
    "Function",
    "MIL_pb2",
    "Model_pb2",
    "Program",
    "Var",
    "coremltools",
    "get_new_symbol",
    "load",
    "mb",
    "types",
]
