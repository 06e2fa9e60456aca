"""Opening a Hugging Face folder: what is accepted, and what is refused with which message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LLAMA4, MakeCheckpoint, random_weights
from safetensors.torch import load_file, save_file

from exporter.errors import InputError
from exporter.model.checkpoint import open_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"

Weights = dict[str, torch.Tensor]


def refusal(source: str | Path, read: bool = False) -> InputError:
    with pytest.raises(InputError) as raised:
        checkpoint = open_checkpoint(source)
        if read:
            checkpoint.check_weights()
    return raised.value


def assert_names(error: InputError, *parts: str) -> None:
    """The message holds the parts, and says what to do about it."""
    missing = [part for part in parts if part not in str(error)]
    assert not missing, f"{missing} not in: {error}"
    assert error.remedy


def write_config(folder: Path, base: dict[str, Any] = LLAMA4, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**base, **changes}))


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Split the folder's weights over several files with an index; returns its weight_map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{part + 1:05}-of-{parts:05}.safetensors" for part in range(parts)]
    weight_map = {name: names[place % parts] for place, name in enumerate(weights)}
    for file in names:
        save_file({n: w for n, w in weights.items() if weight_map[n] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# What is accepted.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_every_weight_is_read_as_stored(
    base: dict[str, Any], sharded: bool, dtype: torch.dtype, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint(base, dtype)
    if sharded:
        shard(folder)
    checkpoint = open_checkpoint(folder)
    for name, weight in random_weights(base, dtype).items():
        assert checkpoint.tensors[name].dtype == dtype
        assert torch.equal(checkpoint.read(name), weight), name
        assert torch.equal(checkpoint.float_weight(name), weight.to(torch.float32)), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_an_output_layer_is_read_exactly_when_it_is_not_tied(
    base: dict[str, Any], tied: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base, tie_word_embeddings=tied))
    assert (HEAD in checkpoint.tensors) is not tied


def test_tensors_come_in_the_order_of_computation(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    assert list(checkpoint.tensors) == list(checkpoint.config.parameter_shapes())
    assert next(iter(checkpoint.tensors)) == EMBEDDING


def test_the_parameter_count_is_the_number_of_stored_values(
    make_checkpoint: MakeCheckpoint,
) -> None:
    values = sum(weight.numel() for weight in random_weights(LLAMA4, torch.bfloat16).values())
    assert open_checkpoint(make_checkpoint()).parameter_count == values


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_stored_copy_of_a_tied_output_layer_is_left_out(
    sharded: bool, make_checkpoint: MakeCheckpoint
) -> None:
    weights = random_weights(LLAMA4, torch.bfloat16)
    folder = make_checkpoint(weights={**weights, HEAD: weights[EMBEDDING].clone()})
    if sharded:
        shard(folder)
    assert HEAD not in open_checkpoint(folder).tensors


def test_a_tied_output_layer_that_differs_in_one_value_is_refused(
    make_checkpoint: MakeCheckpoint,
) -> None:
    weights = random_weights(LLAMA4, torch.bfloat16)
    head = weights[EMBEDDING].clone()
    head[95, 63] += 1
    error = refusal(make_checkpoint(weights={**weights, HEAD: head}))
    assert_names(error, HEAD, "differs from the embedding", "tie_word_embeddings")


ROPE_SPELLINGS: dict[str, dict[str, Any]] = {
    "rope_theta": {"rope_theta": 123456.0},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
    "both": {
        "rope_theta": 123456.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123456.0},
    },
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS.values(), ids=ROPE_SPELLINGS)
def test_the_base_of_rope_is_read_in_either_spelling(
    spelling: dict[str, Any], make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    config = {key: value for key, value in LLAMA4.items() if key != "rope_theta"} | spelling
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).config.rope_theta == 123456.0


ACCEPTED: dict[str, dict[str, Any]] = {
    "no_rope_layers longer than the layers": {"no_rope_layers": [1, 1, 0, 0]},
    "a chunk as long as the context": {"attention_chunk_size": 256},
    "no chunks at all": {"attention_chunk_size": None},
    "no experts": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "attn_scale of temperature tuning": {"attn_scale": 0.1, "floor_scale": 8192},
    "default rope_scaling": {"rope_scaling": {"rope_type": "default"}},
    "layer types of a saved config": {"layer_types": ["chunked_attention"] * 2},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_keys_that_leave_the_arithmetic_alone_are_accepted(
    changes: dict[str, Any], make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    plain = open_checkpoint(folder).config
    write_config(folder, **changes)
    assert open_checkpoint(folder).config == plain


def test_the_older_name_of_the_activation_is_read(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    plain = open_checkpoint(folder).config
    config = {key: value for key, value in LLAMA4.items() if key != "hidden_act"}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_activation": "silu"}))
    assert open_checkpoint(folder).config == plain


# Special tokens.


def test_special_tokens_are_those_of_the_configuration(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (0, (1, 2))


def test_generation_config_overrides_the_end_tokens(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (0, (5,))


def test_null_in_generation_config_overrides_nothing(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert open_checkpoint(folder).eos_token_ids == (1, 2)


def test_a_model_without_special_tokens_has_none(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint(bos_token_id=None, eos_token_id=None))
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (None, ())


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [96, -1, [1, 96], "1", 1.5, True])
def test_a_token_outside_the_vocabulary_is_refused_with_its_file(
    value: object, file: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    content = LLAMA4 if file == "config.json" else {}
    (folder / file).write_text(json.dumps({**content, "eos_token_id": value}))
    wrong = value[-1] if isinstance(value, list) else value
    assert_names(refusal(folder), f"{file}: eos_token_id", repr(wrong), "vocabulary of 96")


# Refused configurations: the key, its value, what is supported.

CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "MoE layers": ({"moe_layers": [0, 1]}, ["moe_layers", "[0, 1]", "dense layers"]),
    "MoE step": (
        {"interleave_moe_layer_step": 1},
        ["interleave_moe_layer_step", "1", "dense layers"],
    ),
    "experts": ({"num_local_experts": 16}, ["num_local_experts", "16", "dense layers"]),
    "experts per token": ({"num_experts_per_tok": 2}, ["num_experts_per_tok", "2", "dense"]),
    "a NoPE layer": ({"no_rope_layers": [1, 0]}, ["no_rope_layers", "[1, 0]", "2 times 1"]),
    "no list of RoPE layers": ({"no_rope_layers": None}, ["no_rope_layers", "None", "2 times 1"]),
    "an empty list of RoPE layers": ({"no_rope_layers": []}, ["no_rope_layers", "[]", "2 times"]),
    "a list of RoPE layers too short": (
        {"no_rope_layers": [1]},
        ["no_rope_layers", "[1]", "2 times 1"],
    ),
    "RoPE layers as a number": ({"no_rope_layers": 1}, ["no_rope_layers", "1"]),
    "temperature tuning": (
        {"attn_temperature_tuning": True},
        ["attn_temperature_tuning", "True", "false"],
    ),
    "a short chunk": (
        {"attention_chunk_size": 128},
        ["attention_chunk_size", "128", "max_position_embeddings (256)"],
    ),
    "a chunk as text": ({"attention_chunk_size": "256"}, ["attention_chunk_size", "'256'"]),
    "rope_scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ["rope_scaling", "llama3", "null"],
    ),
    "rope_scaling of old": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ["rope_scaling", "linear", "null"],
    ),
    "rope_parameters": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        ["rope_parameters.rope_type", "'yarn'", "'default'"],
    ),
    "part of a head rotated": (
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        ["rope_parameters.partial_rotary_factor", "0.5", "1.0"],
    ),
    "rope_parameters as a list": ({"rope_parameters": [1]}, ["rope_parameters", "[1]"]),
    "rope_theta": ({"rope_theta": "big"}, ["rope_theta", "'big'", "greater than one"]),
    "model type": ({"model_type": "gemma3"}, ["model_type", "'gemma3'", "'llama4_text'"]),
    "multimodal Llama 4": ({"model_type": "llama4"}, ["model_type", "'llama4'", "'llama4_text'"]),
    "no model type": ({"model_type": None}, ["model_type", "None", "'llama4_text'"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "attention biases": ({"attention_bias": True}, ["attention_bias", "True", "false"]),
    "MLP biases": ({"mlp_bias": True}, ["mlp_bias", "True", "false"]),
    "for the LLM compressor": (
        {"for_llm_compressor": True},
        ["for_llm_compressor", "True", "false"],
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        ["quantization_config", "gptq", "float checkpoints"],
    ),
    "sliding window": ({"sliding_window": 64}, ["sliding_window", "64", "full attention"]),
    "no layers": ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "greater than zero"]),
    "negative width": ({"hidden_size": -64}, ["hidden_size", "-64", "greater than zero"]),
    "width as text": ({"hidden_size": "64"}, ["hidden_size", "'64'", "a number"]),
    "half a head": ({"num_attention_heads": 2.5}, ["num_attention_heads", "2.5", "whole number"]),
    "width NaN": ({"hidden_size": float("nan")}, ["hidden_size", "nan"]),
    "context infinite": (
        {"max_position_embeddings": float("inf")},
        ["max_position_embeddings", "inf"],
    ),
    "heads that do not divide": (
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        ["num_key_value_heads", "2", "divisor of 3"],
    ),
    "odd head_dim": ({"head_dim": 31}, ["head_dim", "31", "even"]),
    "tied as text": ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'", "true"]),
}


@pytest.mark.parametrize(("changes", "parts"), CONFIGS.values(), ids=CONFIGS)
def test_what_the_decoder_does_not_compute_is_refused_by_its_key(
    changes: dict[str, Any], parts: list[str], make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    write_config(folder, **changes)
    assert_names(refusal(folder), "config.json", *parts)


@pytest.mark.parametrize("key", ["no_rope_layers", "model_type", "num_hidden_layers", "hidden_act"])
def test_a_key_that_is_not_there_is_refused_by_its_name(
    key: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    config = {name: value for name, value in LLAMA4.items() if name != key}
    (folder / "config.json").write_text(json.dumps(config))
    assert_names(refusal(folder), key, "None")


CONFIG_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"", "not valid JSON"),
    "not JSON": (b"{'model_type': 'llama'}", "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "a list": (b"[1, 2]", "holds a list, not an object"),
}


@pytest.mark.parametrize(("content", "problem"), CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_configuration_that_is_no_json_object_is_refused(
    content: bytes | None, problem: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    error = refusal(folder)
    assert "config.json" in error.subject
    assert problem in error.problem


# Refused tensors.

Change = Callable[[Weights], object]
TENSORS: dict[str, tuple[Change, list[str]]] = {
    "missing matrix": (lambda w: w.pop(Q_PROJ), [Q_PROJ, "no weight file holds it"]),
    "missing norm": (lambda w: w.pop(NORM), [NORM, "no weight file holds it"]),
    "missing embedding": (lambda w: w.pop(EMBEDDING), [EMBEDDING, "no weight file holds it"]),
    "extra": (
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}),
        ["q_proj.bias", "no such tensor", "1 extra"],
    ),
    "a layer too many": (
        lambda w: w.update({NORM.replace("1", "2"): torch.ones(64)}),
        ["model.layers.2.input_layernorm.weight", "no such tensor"],
    ),
    "transposed": (
        lambda w: w.update({Q_PROJ: w[Q_PROJ].T.contiguous()}),
        [Q_PROJ, "[64, 96]", "[96, 64]"],
    ),
    "flattened": (
        lambda w: w.update({Q_PROJ: w[Q_PROJ].flatten()}),
        [Q_PROJ, "[6144]", "[96, 64]"],
    ),
    "int8": (
        lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.int8)}),
        [Q_PROJ, "I8", "float checkpoints"],
    ),
    "int64": (
        lambda w: w.update({NORM: w[NORM].to(torch.int64)}),
        [NORM, "I64", "float checkpoints"],
    ),
    "float8": (
        lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.float8_e4m3fn)}),
        [Q_PROJ, "F8_E4M3", "float checkpoints"],
    ),
    "float64": (
        lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.float64)}),
        [Q_PROJ, "F64", "float checkpoints"],
    ),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(("change", "parts"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_the_models_are_refused_by_name(
    change: Change, parts: list[str], sharded: bool, make_checkpoint: MakeCheckpoint
) -> None:
    weights = random_weights(LLAMA4, torch.bfloat16)
    change(weights)
    folder = make_checkpoint(weights=weights)
    if sharded:
        shard(folder)
    assert_names(refusal(folder), *parts)


def test_an_untied_model_without_output_layer_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    write_config(folder, tie_word_embeddings=False)
    assert_names(refusal(folder), HEAD, "no weight file holds it")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused_with_its_tensor_and_count(
    value: float, dtype: torch.dtype, make_checkpoint: MakeCheckpoint
) -> None:
    weights = random_weights(LLAMA4, dtype)
    weights[Q_PROJ][[0, 50], 7] = value
    error = refusal(make_checkpoint(weights=weights), read=True)
    assert_names(error, f"model.safetensors: {Q_PROJ}", "2 of 6144 values are NaN or infinite")


# Refused files.


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/model.safetensors", "./a"),
        *(".", "..", "", "model.safetensors\0", "\x1b[2J"),
    ],
)
def test_a_shard_outside_the_folder_is_refused(name: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub")
    write_index(folder, dict.fromkeys(random_weights(LLAMA4, torch.bfloat16), name))
    assert_names(refusal(folder), INDEX, repr(name), "not the plain name", "own folder")


def test_a_missing_shard_is_refused_by_name(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    file = shard(folder)[Q_PROJ]
    (folder / file).unlink()
    assert_names(refusal(folder), file, "the index names this shard, but it is missing")


def test_a_tensor_that_its_shard_does_not_hold_is_refused_by_name(
    make_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_checkpoint()
    weight_map = shard(folder)
    other = next(file for file in weight_map.values() if file != weight_map[Q_PROJ])
    write_index(folder, {**weight_map, Q_PROJ: other})
    error = refusal(folder)
    assert error.subject == f"{other}: {Q_PROJ}"
    assert "the index names this tensor, but it is missing" in error.problem


WEIGHT_MAPS: dict[str, object] = {
    "missing": None,
    "empty": {},
    "a list": [Q_PROJ],
    "numbers": {Q_PROJ: 1},
    "lists": {Q_PROJ: ["model.safetensors"]},
    "mixed": {Q_PROJ: 1, NORM: "model.safetensors"},
}


@pytest.mark.parametrize("weight_map", WEIGHT_MAPS.values(), ids=WEIGHT_MAPS)
def test_an_index_without_file_names_is_refused(
    weight_map: object, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    write_index(folder, weight_map)
    error = refusal(folder)
    assert INDEX in error.subject
    assert "weight_map" in error.subject


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_without_being_read(
    name: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    assert_names(refusal(folder), name, "pickle", "can run code", "Convert it to safetensors")


def test_a_folder_without_weights_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    assert_names(refusal(folder), "model", "holds no model.safetensors", "complete")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1], ids=lambda size: f"cut at {size}")
def test_a_truncated_weight_file_is_refused(size: int, make_checkpoint: MakeCheckpoint) -> None:
    file = make_checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert_names(refusal(file.parent), "model.safetensors", "not a whole safetensors file")


def test_a_header_that_claims_more_than_the_file_is_refused(
    make_checkpoint: MakeCheckpoint,
) -> None:
    file = make_checkpoint() / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])
    assert_names(refusal(file.parent), "model.safetensors", "not a whole safetensors file")


# Refused places.


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", "~/model"])
def test_a_place_that_is_no_folder_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_names(refusal(source), source, "is not a folder", "Hugging Face model folder")


def test_a_file_is_refused_as_a_checkpoint(make_checkpoint: MakeCheckpoint) -> None:
    file = make_checkpoint() / "model.safetensors"
    assert_names(refusal(file), str(file), "is not a folder")


@pytest.mark.parametrize("source", ["facebook/MobileLLM-R1-140M", "facebook/a b", "a--b/c..d"])
def test_a_hub_id_without_network_is_refused_with_the_remedy(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_names(refusal(source), source, "no such folder", "Check the name and the network")
