"""ONNX Runtime for ``python_runner.py``, which loads this file from its own folder."""

import importlib
from pathlib import Path
from typing import Any, ClassVar


class Runtime:
    """A decoder whose cache is a set of inputs and outputs: either buffers of the whole context
    that it overwrites, or one that grows with each step."""

    MODULES: ClassVar[tuple[str, ...]] = ("numpy", "onnxruntime")
    chunk = 128

    def __init__(self, path: str, options: Any) -> None:
        self.numpy, self.runtime = map(importlib.import_module, self.MODULES)
        session = self.runtime.SessionOptions()
        session.log_severity_level = 3
        session.intra_op_num_threads = options.threads
        # As the exporter runs it: ONNX Runtime would round activations of the standard operators.
        session.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session.enable_profiling = bool(options.trace)
        if options.trace:
            session.profile_file_prefix = options.trace
        self.session = self.runtime.InferenceSession(
            path, session, providers=["CPUExecutionProvider"]
        )
        self.context = int(self.session.get_modelmeta().custom_metadata_map["max_context"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.vocab_size: int | None = int(self.session.get_outputs()[0].shape[-1])
        self.whole_cache = "attention_mask" in self.inputs
        self.past = dict[str, Any]()

    def empty_cache(self) -> dict[str, Any]:
        """Zeros for each input of the cache, of the whole context or of length 0."""
        numpy, past = self.numpy, dict[str, Any]()
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, width = value.shape
                kind = numpy.float16 if "float16" in value.type else numpy.float32
                length = self.context if self.whole_cache else 0
                zeros = numpy.zeros((1, heads, length, width), kind)
                past[name] = self.runtime.OrtValue.ortvalue_from_numpy(zeros)
        return past

    def step(self, tokens: list[int], start: int) -> Any:
        numpy = self.numpy
        if not self.past or (start == 0 and not self.whole_cache):
            self.past = self.empty_cache()
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", numpy.array([tokens], numpy.int64))
        if self.whole_cache:
            mask = numpy.ones((1, start + len(tokens)), numpy.int64)
            binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits")
        for name, value in self.past.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, value)
            if self.whole_cache:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self.whole_cache:
            self.past = dict(zip(self.past, outputs[1:], strict=True))
        return outputs[0].numpy()[0, -1].astype(numpy.float32)

    def finish(self, trace: str) -> None:
        Path(self.session.end_profiling()).replace(trace)
