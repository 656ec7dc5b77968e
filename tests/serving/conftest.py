"""A small Llama of random weights that speaks in letters, as a folder in Hugging Face's layout."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

VOCABULARY = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,:")} | {"<end>": 30}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant: "


@pytest.fixture(scope="session")
def letter_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the model with room for `max_len` tokens. Its greedy answers never end by themselves."""

    def write(max_len: int = 64) -> Path:
        folder = tmp_path_factory.mktemp("letters")
        (folder / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": max_len}))
        shapes = {"model.embed_tokens": (32, 16), "model.norm": (16,), "lm_head": (32, 16)}
        for i in range(2):
            attention = {"q": (32, 16), "k": (16, 16), "v": (16, 16), "o": (16, 32)}
            mlp = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}
            shapes |= {f"model.layers.{i}.self_attn.{x}_proj": shape for x, shape in attention.items()}
            shapes |= {f"model.layers.{i}.mlp.{x}_proj": shape for x, shape in mlp.items()}
            shapes |= {f"model.layers.{i}.{x}_layernorm": (16,) for x in ("input", "post_attention")}
        random = np.random.default_rng(0)
        weights = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        weights["lm_head.weight"][29:] = 0  # <end> and what has no letter: never the likeliest
        save_file(weights, folder / "model.safetensors")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(VOCABULARY, []))
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<end>", "chat_template": CHAT_TEMPLATE})
        )
        return folder

    return write


@pytest.fixture(scope="session")
def letters(letter_model: Callable[..., Path]) -> Path:
    """The model with room for 64 tokens."""
    return letter_model()
