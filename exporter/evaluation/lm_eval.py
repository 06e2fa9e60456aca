"""Run any model of this tool in lm-eval (EleutherAI's evaluation harness).

    lm_eval --model mobilellm --model_args path=build/nano,target=onnx --tasks FILE.yaml

`path` is a checkpoint, a quantized checkpoint, an artifact or a bundle, each in its own runtime;
`max_length` limits its context. Texts become tokens as in lm-eval's own `hf` model. Without an
installed package: python -m exporter.evaluation.lm_eval --model mobilellm …
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from exporter.errors import InputError
from exporter.evaluation.agreement import log_probabilities
from exporter.evaluation.lm_eval_plugin import register
from exporter.evaluation.perplexity import next_logits
from exporter.inference.generation import Generation, Sampling
from exporter.inference.loaded_model import open_model
from exporter.text.documents import Message
from exporter.text.tokenizer import load_tokenizer

#: The limit of new tokens for tasks that name none, as in lm-eval's `hf` model.
MAX_GEN_TOKS = 256


class MobileLLM(TemplateLM):
    """A model of this tool for lm-eval. Requests run one by one: the runtimes have no batches."""

    def __init__(
        self,
        path: str,
        target: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size not in (None, 1, "1"):
            logging.getLogger(__name__).warning("batch_size %s: runs one by one", batch_size)
        self._loaded = open_model(str(path), target)
        self._path, self.max_gen_toks = str(path), max_gen_toks
        self.tokenizer = load_tokenizer(self._loaded.tokenizer_folder)
        context = self._loaded.runner.context
        if max_length is not None and not 2 <= max_length <= context:
            raise InputError(
                f"max_length={max_length}", f"is not within 2..{context}", "Leave it out"
            )
        self.max_length = max_length or context
        self._seeds = count()
        #: The tokens of the last request's context, and the logits after them.
        self._last: tuple[list[int], Tensor] = [], torch.empty(0)
        if not self._loaded.eos_token_ids:
            raise InputError(path, "names no token that ends a text", "Give it an eos_token_id")

    @property
    def eot_token_id(self) -> int:
        return self._loaded.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        begin = self._loaded.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self._loaded.tokenizer_folder).replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """The facts that lm-eval stores with its results."""
        return {"model_path": self._path, "model_kind": self._loaded.kind}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids with the special tokens of the tokenizer, unless the text begins with them."""
        if add_special_tokens is None:
            begin = self.tokenizer.text_of(self.prefix_token_id)
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer.encode(string, special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Without `add_generation_prompt` its last turn is left open, and
        the model continues it."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        text = self.tokenizer.conversation_text(messages, to_be_answered=add_generation_prompt)
        if add_generation_prompt or not messages:
            return text
        last = messages[-1].content.strip()
        place = text.rfind(last)
        if place < 0:
            raise InputError(self._path, "has a chat template that leaves out the last turn")
        return text[: place + len(last)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[object, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would give it."""
        results = []
        for request, context, continuation in tqdm(requests, disable=disable_tqdm):
            results.append(self._score(context, continuation))
            if isinstance(request, tuple):
                self.cache_hook.add_partial("loglikelihood", request, results[-1])
        return results

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if len(continuation) > self.max_length:
            raise InputError(
                "a continuation",
                f"has {len(continuation)} tokens, the context holds {self.max_length}",
                "Lower the model with a larger max_context",
            )
        # The beginning of a context that is too long is dropped; at least one token is kept.
        whole = (context + continuation)[-self.max_length - 1 :]
        read, place = len(whole) - len(continuation), 0
        last_read, last_logits = self._last
        if len(continuation) == 1 and whole[:read] == last_read:
            parts = iter([last_logits])  # the next choice of the same question
        else:
            parts = next_logits(self._loaded.runner, whole[:-1], read)
        total, greedy = 0.0, True
        for logits in parts if continuation else ():
            if place == 0:
                self._last = whole[:read], logits[:1]
            wanted = torch.tensor(continuation[place : place + len(logits)])
            place += len(logits)
            total += _log_likelihood(logits, wanted)
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
        return total, greedy

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context's length."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found = self._loglikelihood_tokens(parts, disable_tqdm=True)
            totals.append(sum(total for total, _ in found))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, the end of the text, or the limit."""
        texts = []
        for context, options in tqdm([request.args for request in requests], disable=disable_tqdm):
            asked = normalize_gen_kwargs(options, self.max_gen_toks)
            end = self.tokenizer.text_of(self.eot_token_id)
            stops = handle_stop_sequences(asked["until"], eos=end)
            room = self.max_length - asked["max_gen_toks"]
            if room < 1:
                raise InputError(
                    f"max_gen_toks={asked['max_gen_toks']}",
                    f"leaves no room for a prompt in a context of {self.max_length}",
                    "Lower it with --gen_kwargs",
                )
            prompt = self.tok_encode(context)[-room:]
            text = "".join(self._pieces(prompt, stops, self._sampling(asked)))
            texts.append(postprocess_generated_text(text, stops, None))
            self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
        return texts

    def _pieces(self, prompt: list[int], stops: Sequence[str], sampling: Sampling) -> Iterator[str]:
        """The text piece by piece, up to the one that completes a stop string."""
        ids = map(self.tokenizer.token_of, stops)
        ends = {*self._loaded.eos_token_ids, *(token for token in ids if token is not None)}
        generation = Generation(self._loaded.runner, prompt, tuple(ends), sampling)
        longest = max(map(len, stops), default=0)
        tail = ""
        for _, piece in self.tokenizer.stream(generation):
            yield piece
            tail = tail[-longest:] + piece
            if any(stop in tail for stop in stops if stop):
                return

    def _sampling(self, asked: dict[str, Any]) -> Sampling:
        """Greedy, or sampling with a new seed each time, so that repeated requests differ."""
        if not asked["do_sample"]:
            return Sampling(asked["max_gen_toks"])
        unknown = asked.keys() & {"top_k", "min_p", "repetition_penalty", "num_beams"}
        if unknown:
            raise InputError(", ".join(sorted(unknown)), "is not supported", "Use top_p")
        top_p, seed = float(asked.get("top_p", 1.0)), next(self._seeds)
        return Sampling(asked["max_gen_toks"], asked["temperature"], top_p, seed)


def _log_likelihood(logits: Tensor, targets: Tensor) -> float:
    return log_probabilities(logits).gather(-1, targets[:, None]).sum().item()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()
