"""The processes that quantize together. Imports nothing of torch where there is only one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def joined_processes() -> Iterator[bool]:
    """Join the other processes where ``torchrun`` started this one; gives whether this is the
    first process, which decides, writes and reports."""
    if "RANK" not in os.environ:
        yield True
        return
    from exporter.calibration.parallel import processes, rank

    with processes():
        yield not rank()
