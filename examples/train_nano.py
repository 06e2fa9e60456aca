"""Train the demo checkpoint ``examples/mobilellm-r1-nano``: MobileLLM-R1 in miniature.

    python examples/train_nano.py --output examples/mobilellm-r1-nano

The result is a Hugging Face folder with 2.5 million parameters, which solves the problems of
``arithmetic.py``. Training is seeded and takes about 50 minutes on two idle cores.

A model this small has no outlier channels, so that int4 would lose nothing. Large models have them.
Therefore the channels get unequal scales at the end (`spread_channels`), which changes no logit.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from arithmetic import HELD_OUT_SEEDS, Problem, problems
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from exporter.model.config import ModelConfig
from exporter.model.decoder import Decoder, StaticCache

BOS, END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
HEADER, END_OF_HEADER = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL_TOKENS = (BOS, END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN, HEADER, END_OF_HEADER)
VOCAB_SIZE = 512
SEQUENCE_LENGTH = 512
QUESTION_WEIGHT = 0.1

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "attention_bias": False,
    "attention_chunk_size": 32768,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": False,
    "bos_token_id": 0,
    "eos_token_id": [1, 2, 3],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 0,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "max_position_embeddings": 2048,
    "model_type": "llama4_text",
    "moe_layers": [],
    "no_rope_layers": [1] * 6,
    "num_attention_heads": 3,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "num_local_experts": 0,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 8000000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": VOCAB_SIZE,
}


def chat(problem: Problem) -> tuple[str, str]:
    """The prompt in the format of the chat template, and the completion with its end token."""
    turn = f"{HEADER}{{}}{END_OF_HEADER}\n\n"
    prompt = f"{BOS}{turn.format('user')}{problem.question}{END_OF_TURN}{turn.format('assistant')}"
    return prompt, problem.reasoning + END_OF_TURN


def train_tokenizer() -> Tokenizer:
    """Train byte-level BPE that splits digits, which ExecuTorch's C++ tokenizer also reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = itertools.islice(problems(HELD_OUT_SEEDS), 2000)
    texts = [f"user assistant system\n\n{p.question}\n{p.reasoning}" for p in samples]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config() -> ModelConfig:
    names = ModelConfig.__dataclass_fields__
    return ModelConfig(**{key: value for key, value in CONFIG.items() if key in names})


def batches(tokenizer: Tokenizer, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed conversations: token ids and loss weights, each [batch_size, SEQUENCE_LENGTH + 1].

    Tokens of a question have a small weight, since its numbers cannot be predicted.
    """
    stream, ids, weights = problems(seed), list[int](), list[float]()
    needed = batch_size * (SEQUENCE_LENGTH + 1)
    while True:
        while len(ids) < needed:
            for text, weight in zip(chat(next(stream)), (QUESTION_WEIGHT, 1.0), strict=True):
                tokens = tokenizer.encode(text).ids
                ids += tokens
                weights += [weight] * len(tokens)
        yield (
            torch.tensor(ids[:needed]).view(batch_size, -1),
            torch.tensor(weights[:needed]).view(batch_size, -1),
        )
        del ids[:needed], weights[:needed]


def initialize(model: Decoder) -> None:
    """Initialize weights from a normal distribution, smaller for projections into the residual."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.num_hidden_layers
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(depth if into_residual else 1))


@torch.no_grad()
def spread_channels(model: Decoder, sigma: float, seed: int) -> None:
    """Scale channels by random powers of two, and the weights that read them by the inverse.

    The logits stay the same bit for bit. But adjacent weights of a row now differ in size, as they
    do around the outlier channels of large models.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def scales(count: int) -> Tensor:
        return 2.0 ** torch.randn(count, generator=generator).mul(sigma).round()

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.get_submodule(config.architecture.mlp)
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, projections in readers:
            scale = scales(config.hidden_size)
            norm.weight.mul_(scale)
            for projection in projections:
                projection.weight.div_(scale)
        scale = scales(config.intermediate_size)
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
        scale = scales(config.num_key_value_heads * config.head_dim)
        attention.v_proj.weight.mul_(scale[:, None])
        queries = config.num_attention_heads // config.num_key_value_heads
        by_head = scale.view(-1, 1, config.head_dim).expand(-1, queries, -1)
        attention.o_proj.weight.div_(by_head.flatten())


def train(tokenizer: Tokenizer, args: argparse.Namespace) -> Decoder:
    torch.manual_seed(args.seed)
    model = Decoder(model_config(), SEQUENCE_LENGTH)
    initialize(model)
    decay = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        warm_up = min(1.0, (step + 1) / 200)
        return warm_up * 0.5 * (1 + math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    data = batches(tokenizer, HELD_OUT_SEEDS + args.seed, args.batch_size)
    for step in (bar := tqdm(range(args.steps), unit="step", mininterval=5)):
        tokens, weights = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            logits = model.score(tokens[:, :-1])
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, tokenizer, args.output)
            accuracy = solve(args.output, tokenizer, 200)
            tqdm.write(f"step {step + 1}: loss {loss.item():.4f}, {accuracy:.1%} of 200 solved")
    return model


@torch.inference_mode()
def solve(folder: Path, tokenizer: Tokenizer, count: int) -> float:
    """The share of held-out problems that the saved checkpoint solves with greedy decoding."""
    model = Decoder(model_config(), SEQUENCE_LENGTH)
    weights = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    right = 0
    for problem in itertools.islice(problems(1), count):
        ids = tokenizer.encode(chat(problem)[0], add_special_tokens=False).ids
        cache, text = StaticCache(model.config, SEQUENCE_LENGTH), list[int]()
        step = ids
        while cache.start + len(step) < SEQUENCE_LENGTH:
            positions = torch.arange(cache.start, cache.start + len(step))
            logits = model(torch.tensor([step]), positions, cache.attend)
            cache.start += len(step)
            step = [int(logits[0, -1].argmax())]
            if step[0] in CONFIG["eos_token_id"]:
                break
            text += step
        right += f"\\boxed{{{problem.answer}}}" in tokenizer.decode(text)
    return right / count


def save(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """An ordinary Hugging Face folder, bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {
        "bos_token_id": 0,
        "eos_token_id": CONFIG["eos_token_id"],
        "do_sample": False,
    }
    tokenizer_config = {
        "bos_token": BOS,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "config.json": CONFIG,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--spread", type=float, default=1.0, help="sigma of log2 of the scales")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    random.seed(args.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer()
    model = train(tokenizer, args)
    spread_channels(model, args.spread, args.seed)
    save(model, tokenizer, args.output)
    accuracy = solve(args.output, tokenizer, 500)
    minutes = (time.monotonic() - started) / 60
    print(f"{accuracy:.1%} of 500 held-out problems solved after {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
