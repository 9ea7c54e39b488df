"""Tiny random decoders of transformers, in folders as `save_pretrained` writes them."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import processors

from memlm.assemble import build_model, build_tokenizer, settled
from memlm.data.tokenizer import train_tokenizer

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma", "mistral")
N_VOCAB = 40
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role[0] }}|{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|a|{% endif %}"
)

_SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 10},
}


def make_base(family: str, folder: Path, **settings: Any) -> Path:
    """A decoder with random weights, in a folder of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(_SIZES) | _OWN[family] | settings
    if family == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": sizes["num_hidden_layers"], "n_head": 4, "n_positions": 64}
        sizes = {name: sizes[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder / family)
    return folder / family


def loaded(folder: Path) -> Any:
    """The decoder as transformers alone has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_tokenizer(folder: Path) -> Path:
    """Put a tokenizer of letters beside a decoder, which begins each text with ``<s>``, and a chat template."""
    made = tokenizers.Tokenizer.from_str(
        train_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz .?!\n|<>AB"], 0).to_json()
    )
    made.add_special_tokens(["<s>"])
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    made.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def attached(folder: Path, memory: dict[str, Any], **settings: Any) -> Any:
    """A decoder with memories, whose gates are open."""
    model = {"_target_": "memlm.models.pretrained.Pretrained", "path": str(folder), "segment_len": 16, "overlap": 4}
    tokenizer = {"n_vocab": None, "kind": "byte", "vocab_size": 0, "path": None}
    config = {"model": model | settings, "memory": memory, "data": {"tokenizer": tokenizer}, "seed": 0}
    config = dict(settled(config))
    made: Any = build_model(config, build_tokenizer(config)).eval()
    with torch.no_grad():
        for gate in made.gates.values():
            gate.fill_(0.5)
    return made
