"""Register `mobilellm` as a model of lm-eval, without loading any module that is not needed.

lm-eval 0.4 has no plugins (its issues 1457 and 3282 ask for them). torch has plugins, and lm-eval
imports torch before it looks up the model: setup.cfg names `register` in torch's entry points, so
torch calls it. In other processes it does nothing.
"""

import sys

NAME, TARGET = "mobilellm", "exporter.evaluation.lm_eval:MobileLLM"


def register() -> None:
    """Add `MobileLLM` to the models of lm-eval, where lm-eval is loaded.

    It raises nothing, since an error here would be an error of `import torch`.
    """
    if "lm_eval" not in sys.modules:
        return
    try:
        # This registers lm-eval's own models, which it does later only if there are none.
        import lm_eval.models  # noqa: F401  # for its side effect
        from lm_eval.api.registry import model_registry
    except ImportError:  # a version of lm-eval that setup.cfg does not allow
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
