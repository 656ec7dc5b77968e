# pyright: reportMissingImports=false
"""Writes tiny_llama.json: the logits that Hugging Face transformers computes for small random Llamas.

Run by hand, in an environment with torch and transformers; the test suite needs only the JSON:

    python tests/models/data/make_tiny_llama_reference.py

The weights are not kept: tensor after tensor, in the order of their names, they are
`RandomState(SEED).standard_normal(shape) * SCALE`, a stream of NumPy's that never changes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

OUTPUT = Path(__file__).with_name("tiny_llama.json")
SEED, SCALE = 7, 0.3
TOKENS = [3, 17, 4, 4, 30, 0, 21, 9, 12, 28, 1, 5]
SIZES = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "untied": {**SIZES, "rope_theta": 100.0, "tie_word_embeddings": False},
    "tied_llama3": {**SIZES, "rope_theta": 500.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
}


def describe(config: dict[str, Any]) -> dict[str, Any]:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    random = np.random.RandomState(SEED)
    shapes = {}
    for name, parameter in sorted(model.named_parameters()):
        shapes[name] = list(parameter.shape)
        value = random.standard_normal(parameter.shape) * SCALE
        parameter.data = torch.from_numpy(value.astype(np.float32))
    logits = model(torch.tensor([TOKENS])).logits[0]
    frequencies = model.model.rotary_emb.inv_freq
    return {
        "config": config,
        "shapes": shapes,
        "rotary_frequencies": [float(f"{value:.8g}") for value in frequencies.tolist()],
        "logits": [[round(value, 5) for value in row] for row in logits.tolist()],
    }


def main() -> None:
    torch.set_grad_enabled(False)
    document = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seed": SEED,
        "scale": SCALE,
        "tokens": TOKENS,
        "models": {name: describe(config) for name, config in CONFIGS.items()},
    }
    OUTPUT.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
