"""Core ML for ``python_runner.py``, which loads this file from its own folder."""

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar


class Runtime:
    """A stateful package with two functions, `prefill` and `decode`. Not tried on a Mac."""

    MODULES: ClassVar[tuple[str, ...]] = ("numpy", "coremltools")
    whole_cache, chunk = True, 128

    def __init__(self, path: str, options: Any) -> None:
        self.numpy, self.tools = map(importlib.import_module, self.MODULES)
        self.path = path
        facts = self.tools.models.MLModel(path, skip_model_load=True).user_defined_metadata
        # The Neural Engine computes int4 in blocks wrongly (apple/coreai-models 279).
        own_form = facts.get("compute") == "neural_engine"
        kinds = self.tools.ComputeUnit
        self.units = kinds.CPU_AND_NE if own_form else kinds.CPU_AND_GPU
        self.functions = {
            name: self.tools.models.MLModel(path, compute_units=self.units, function_name=name)
            for name in ("prefill", "decode")
        }
        self.context, self.width = int(facts["max_context"]), int(facts["prefill"])
        self.state = self.functions["decode"].make_state()
        self.output = facts["output"]
        self.vocab_size: int | None = None  # no version of coremltools shows it reliably

    def step(self, tokens: list[int], start: int) -> Any:
        if len(tokens) == 1:
            return self.predict("decode", input_ids=[tokens], position=[start])
        done = 0
        while done < len(tokens):
            begin = min(start + done, self.context - self.width)
            chunk = tokens[begin - start : begin - start + self.width]
            padded = chunk + [0] * (self.width - len(chunk))
            result = self.predict(
                "prefill", input_ids=[padded], position=[begin], length=[len(chunk)]
            )
            done = begin - start + len(chunk)
        return result

    def predict(self, function: str, **inputs: Any) -> Any:
        """Logits, or an equivalent of them where the package gives the token itself."""
        arrays = {name: self.numpy.array(value, "int32") for name, value in inputs.items()}
        outputs = self.functions[function].predict(arrays, state=self.state)
        if self.output == "token":  # the package chooses the most likely token itself
            logits = self.numpy.zeros(int(outputs["token"].reshape(-1)[0]) + 1, "float32")
            logits[-1] = 1
            return logits
        return outputs["logits"].reshape(-1).astype("float32")

    def finish(self, trace: str) -> None:
        """Write the compute plan of `decode`: the device and estimated cost of each operation."""
        plans = importlib.import_module("coremltools.models.compute_plan")
        compiled = self.tools.models.utils.compile_model(self.path)
        plan = plans.MLComputePlan.load_from_path(compiled, compute_units=self.units)
        rows = []
        for operation in plan.model_structure.program.functions["decode"].block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            if usage is not None:
                device = type(usage.preferred_compute_device).__name__
                weight = cost.weight if cost else 0.0
                rows.append({"operator": operation.operator_name, "device": device, "cost": weight})
        Path(trace).write_text(json.dumps(rows))
