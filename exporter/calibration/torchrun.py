"""The processes of ``torchrun``. Does not import torch in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def joined_processes() -> Iterator[bool]:
    """Join the process group if ``torchrun`` started this process. Yields True in the first
    process, the one that writes and reports."""
    if "RANK" not in os.environ:
        yield True
        return
    from exporter.calibration.parallel import process_group, rank

    with process_group():
        yield not rank()
