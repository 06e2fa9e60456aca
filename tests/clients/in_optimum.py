"""Run ONNX folders in optimum-onnx, in an environment that has it: transformers there is older.

Reads one JSON object on stdin: "folders", each with its "prompts" of token ids, "conversations" for
its chat template, the number of "steps", and "options" of the session. Writes JSON to stdout.
"""

import json
import sys
from importlib.metadata import version

import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def read(folder, asked):
    options = SessionOptions()
    for name, value in asked["options"].items():
        options.add_session_config_entry(name, value)
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
    written = []
    for prompt in asked["prompts"]:
        ids = torch.tensor([prompt])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=asked["steps"]
        )
        written.append(found[0, len(prompt) :].tolist())
    rendered = []
    if asked["conversations"]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for prompt in asked["conversations"]:
            messages = [{"role": "user", "content": prompt}]
            rendered.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return {"written": written, "rendered": rendered}


asked = json.load(sys.stdin)
found = {folder: read(folder, one) for folder, one in asked.items()}
versions = {name: version(name) for name in ("optimum-onnx", "transformers", "onnxruntime")}
json.dump({"versions": versions, "found": found}, sys.stdout)
