"""Where results are kept that the next run can use again: texts, answers, sensitivities."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``MOBILELLM_CACHE``, or a folder of its own where the system keeps caches."""
    named = os.environ.get("MOBILELLM_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mobilellm-exporter"
