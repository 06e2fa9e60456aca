"""Makes `lm_eval --model mobilellm` known, without loading anything that is not asked for.

lm-eval 0.4 has no plugins (its issues 1457 and 3282 ask for them), but torch has, and lm-eval
imports torch before it looks for its model: setup.cfg names `register` in torch's group, so torch
calls it. In a process that is not lm-eval it does nothing.
"""

import sys

NAME, TARGET = "mobilellm", "exporter.evaluation.lm_eval:MobileLLM"


def register() -> None:
    """Add this tool's models to lm-eval's, where lm-eval is loaded. Raises nothing: an error here
    would be one of `import torch`."""
    if "lm_eval" not in sys.modules:
        return
    try:
        # Adds lm-eval's own models, which it does later only if there are none.
        import lm_eval.models  # noqa: F401  # imported for what it does
        from lm_eval.api.registry import model_registry
    except ImportError:  # a version of lm-eval that setup.cfg does not allow
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
