"""The decoder against transformers' Llama4ForCausalLM and LlamaForCausalLM, in float32."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LLAMA, LLAMA4, OLMO2, QWEN3, ROOT, MakeCheckpoint
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen3Config,
)

from exporter.errors import InputError
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import parse_config
from exporter.model.decoder import Decoder, StaticCache, load_decoder, rms_normalize
from exporter.model.rope import rope_tables, rotate
from exporter.text.tokenizer import load_tokenizer

TOLERANCE = 1e-4


def lively_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights large enough that attention is far from uniform and logits spread."""
    generator = torch.Generator().manual_seed(7)
    shapes = parse_config(config, Path("config.json")).parameter_shapes()
    return {
        name: torch.randn(shape, generator=generator) * 1.5 * shape[1] ** -0.5
        if len(shape) == 2
        else 1 + 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def lively(make: MakeCheckpoint, base: dict[str, Any], **changes: Any) -> Path:
    return make(base, weights=lively_weights({**base, **changes}), **changes)


def tokens_of(length: int, vocab_size: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocab_size, (1, length), generator=generator)


def decoder_of(folder: Path, context: int) -> Decoder:
    return load_decoder(open_checkpoint(folder), context)


@torch.inference_mode()
def largest_difference(decoder: Decoder, theirs: PreTrainedModel, tokens: Tensor) -> float:
    expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.1, "logits this flat would prove nothing"
    return (decoder.score(tokens) - expected).abs().max().item()


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama4 3:1 tied": (LLAMA4, {}),
    "llama4 3:1 untied": (LLAMA4, {"tie_word_embeddings": False}),
    "llama4 4:4": (LLAMA4, {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}),
    "llama4 6:2": (LLAMA4, {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
    "llama4 8:1": (LLAMA4, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "llama4 without q/k norm": (LLAMA4, {"use_qk_norm": False}),
    "llama4 five layers": (LLAMA4, {"num_hidden_layers": 5, "no_rope_layers": [1] * 5}),
    "llama 4:2 untied": (LLAMA, {}),
    "llama 4:2 tied": (LLAMA, {"tie_word_embeddings": True}),
    "llama 4:4": (LLAMA, {"num_key_value_heads": 4}),
    "llama 9:3": (LLAMA, {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama 4:1": (LLAMA, {"num_key_value_heads": 1}),
    "qwen3 4:2 tied": (QWEN3, {}),
    "qwen3 4:2 untied": (QWEN3, {"tie_word_embeddings": False}),
    "qwen3 4:4 narrow heads": (QWEN3, {"num_key_value_heads": 4, "head_dim": 16}),
    "olmo2 4:4 untied": (OLMO2, {}),
    "olmo2 4:2 tied": (OLMO2, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "olmo2 4:1 three layers": (OLMO2, {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "qwen3 4:1 three layers": (QWEN3, {"num_key_value_heads": 1, "num_hidden_layers": 3}),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("base", "changes"), SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_transformers(
    base: dict[str, Any], changes: dict[str, Any], attention: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = lively(make_checkpoint, base, **changes)
    decoder = decoder_of(folder, 200)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    for length in (1, 17, 200):
        assert largest_difference(decoder, theirs, tokens_of(length)) < TOLERANCE, length


@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("steps", [[1] * 40, [17] + [1] * 23, [13, 13, 14]], ids=str)
def test_steps_with_the_cache_give_the_logits_of_the_whole_text(
    steps: list[int], base: dict[str, Any], make_checkpoint: MakeCheckpoint
) -> None:
    decoder, tokens = decoder_of(lively(make_checkpoint, base), 40), tokens_of(40)
    kv_cache, parts = StaticCache(decoder.config, 40), []
    with torch.inference_mode():
        for part in tokens.split(steps, dim=1):
            positions = torch.arange(kv_cache.start, kv_cache.start + part.shape[1])
            parts.append(decoder(part, positions, kv_cache.attend))
            kv_cache.start += part.shape[1]
        whole = decoder.score(tokens)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=TOLERANCE, rtol=0)


def test_a_batch_gives_the_logits_of_each_text_alone(make_checkpoint: MakeCheckpoint) -> None:
    decoder = decoder_of(lively(make_checkpoint, LLAMA4), 20)
    texts = [tokens_of(20), tokens_of(20).flip(1)]
    with torch.inference_mode():
        together = decoder.score(torch.cat(texts))
        for logits, text in zip(together, texts, strict=True):
            assert torch.allclose(logits, decoder.score(text)[0], atol=TOLERANCE, rtol=0)


def test_a_later_token_changes_no_earlier_logits(make_checkpoint: MakeCheckpoint) -> None:
    decoder, tokens = decoder_of(lively(make_checkpoint, LLAMA4), 20), tokens_of(20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 96
    with torch.inference_mode():
        before, after = decoder.score(tokens)[0], decoder.score(changed)[0]
    assert torch.equal(before[:12], after[:12])
    assert not torch.isclose(before[12:], after[12:]).all(-1).any()


def test_interleaved_rope_is_rope_of_halves_with_the_channels_in_another_order() -> None:
    config = parse_config(LLAMA4, Path("config.json"))
    cos, sin = rope_tables(config, 50)
    x = torch.randn(1, 50, 3, config.head_dim, generator=torch.Generator().manual_seed(0))
    order = torch.cat((torch.arange(0, config.head_dim, 2), torch.arange(1, config.head_dim, 2)))
    pairs = rotate(x, cos, sin, interleaved=True)[..., order]
    assert torch.equal(pairs, rotate(x[..., order], cos, sin, interleaved=False))
    assert not torch.allclose(pairs, rotate(x, cos, sin, interleaved=False))


def test_norm_before_rope_is_norm_after_rope() -> None:
    config = parse_config(LLAMA4, Path("config.json"))
    cos, sin = rope_tables(config, 50)
    x = torch.randn(1, 50, 3, config.head_dim, generator=torch.Generator().manual_seed(0))
    after = rms_normalize(rotate(x, cos, sin, interleaved=True), 1e-5)
    before = rotate(rms_normalize(x, 1e-5), cos, sin, interleaved=True)
    assert torch.allclose(after, before, atol=1e-5)
    assert not torch.allclose(after, rotate(x, cos, sin, interleaved=True), atol=1e-2)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "hidden", "inner", "count"),
    [
        (15, 9, 3, 576, 2048, 140_248_512),
        (15, 16, 4, 1024, 4096, 359_000_000),
        (22, 24, 6, 1536, 6144, 949_000_000),
    ],
    ids=["140M", "360M", "950M"],
)
def test_the_parameters_of_the_published_shapes_are_counted_right(
    layers: int, heads: int, kv_heads: int, hidden: int, inner: int, count: int
) -> None:
    config = parse_config(published(layers, heads, kv_heads, hidden, inner), Path("config.json"))
    found = sum(torch.Size(shape).numel() for shape in config.parameter_shapes().values())
    assert found == pytest.approx(count, rel=0 if count % 1000 else 2e-3)


def published(
    layers: int, heads: int, kv_heads: int, hidden: int, intermediate: int
) -> dict[str, Any]:
    """The configuration that Meta publishes, for one row of shared/notes/model.md."""
    return {
        **LLAMA4,
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_mlp": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "attention_chunk_size": 32768,
        "no_rope_layers": [1] * layers,
    }


@pytest.mark.slow
def test_logits_of_the_140m_shape_are_those_of_transformers() -> None:
    config = published(15, 9, 3, 576, 2048)
    options = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**options, attn_implementation="sdpa")).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    with torch.device("meta"):
        decoder = Decoder(parse_config(config, Path("config.json")), 512)
    decoder.load_state_dict(theirs.state_dict(), assign=True)
    cos, sin = rope_tables(decoder.config, 512)
    decoder.cos, decoder.sin = cos, sin
    assert sum(p.numel() for p in theirs.parameters()) == 140_248_512
    for length in (1, 17, 512):
        tokens = tokens_of(length, config["vocab_size"])
        assert largest_difference(decoder, theirs, tokens) < TOLERANCE, length


# The demo checkpoint.


@cache
def nano_in_transformers(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@pytest.mark.parametrize("length", [1, 17, 400])
def test_logits_of_the_demo_checkpoint_are_those_of_transformers(length: int, nano: Path) -> None:
    text = (ROOT / "exporter" / "evaluation" / "sample.txt").read_text(encoding="utf-8")
    tokens = torch.tensor([load_tokenizer(nano).encode(text)[:length]])
    assert tokens.shape[1] == length
    decoder = decoder_of(nano, length)
    assert largest_difference(decoder, nano_in_transformers(nano), tokens) < TOLERANCE


CONVERSATIONS = {
    "plain": ("What is 12 + 7?", None),
    "spaces around it": ("  Ada has 12 eggs.\n", None),
    "system": ("What is 12 + 7?", "Answer briefly."),
    "many scripts": ("Grüße, 你好, 🙂🇫🇷 !", "Ответь <b>кратко</b> & 'быстро'"),
    "text like a special token": ("<|eot_id|> is the end", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(("prompt", "system"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_chat_template_gives_the_ids_of_transformers(
    prompt: str, system: str | None, nano: Path
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    theirs = AutoTokenizer.from_pretrained(nano).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    tokenizer = load_tokenizer(nano)
    assert tokenizer.encode(tokenizer.chat_text(prompt, system)) == theirs


# A key that is left out.

TRANSFORMERS = {
    "llama4_text": Llama4TextConfig,
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
}

LEFT_OUT = {
    LLAMA4["model_type"]: ["rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings"],
    LLAMA["model_type"]: ["rope_theta", "rms_norm_eps", "num_key_value_heads"],
    OLMO2["model_type"]: [
        "rope_theta",
        "rms_norm_eps",
        "num_key_value_heads",
        "tie_word_embeddings",
    ],
    QWEN3["model_type"]: [
        "rope_theta",
        "rms_norm_eps",
        "head_dim",
        "num_key_value_heads",
        "tie_word_embeddings",
    ],
}


@pytest.mark.parametrize(
    ("base", "key"),
    [(base, key) for base in FAMILIES.values() for key in LEFT_OUT[base["model_type"]]],
    ids=[f"{model_type} {key}" for model_type, keys in LEFT_OUT.items() for key in keys],
)
def test_a_key_left_out_is_refused_or_read_as_transformers_reads_it(
    base: dict[str, Any], key: str
) -> None:
    kind = TRANSFORMERS[base["model_type"]]
    options = {name: value for name, value in base.items() if name not in (key, "model_type")}
    theirs = kind(**options)
    wanted = theirs.rope_parameters[key] if key == "rope_theta" else getattr(theirs, key)
    try:
        ours = parse_config({**options, "model_type": base["model_type"]}, Path("config.json"))
    except InputError as error:
        assert key in error.subject
    else:
        assert getattr(ours, key) == wanted


def test_a_chunk_size_left_out_is_refused_where_transformers_would_chunk() -> None:
    options = {
        **{k: v for k, v in LLAMA4.items() if k not in ("attention_chunk_size", "model_type")},
        "max_position_embeddings": 32768,
    }
    assert Llama4TextConfig(**options).attention_chunk_size < 32768
    with pytest.raises(InputError, match="attention_chunk_size"):
        parse_config({**options, "model_type": "llama4_text"}, Path("config.json"))
