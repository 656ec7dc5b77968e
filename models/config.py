"""The numbers that fix a Llama's shape and arithmetic, whatever file they were read from."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of one model of the Llama family; hashable, so it can be static under `jax.jit`.

    Frequency i of the rotary embedding is `rope_theta ** (-2 i / head_dim) / rope_factors[i]`, no factors
    being all ones. `eos_token_ids` are the tokens that end a text according to the model's own files.

    Raises ValueError that names the field, what was expected and what came.

    >>> LlamaConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32,
    ...             max_len=128).rope_theta
    10000.0
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_len: int
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        heads = ("num_heads", "num_kv_heads", "head_dim")
        for name in ("vocab_size", "d_model", "num_layers", *heads, "d_ff", "max_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            expected = f"a divisor of num_heads ({self.num_heads})"
            raise ValueError(f"num_kv_heads: expected {expected}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary pairs), got {self.head_dim}")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            expected = f"{self.head_dim // 2} (half of head_dim)"
            raise ValueError(f"rope_factors: expected {expected}, got {len(self.rope_factors)}")


def llama3_rope_factors(
    head_dim: int,
    rope_theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_len: int,
) -> tuple[float, ...]:
    """Returns Llama 3.1's rotary scaling as the divisor of each of the head_dim // 2 frequencies.

    A frequency that turns fewer than `low_freq_factor` times within `original_max_len` tokens is divided by
    `factor`, one that turns more than `high_freq_factor` times is kept, and those between are blended
    (`apply_scaling` of Meta's llama-models, and `rope_type: "llama3"` in a config.json). Raises ValueError
    unless 0 < low_freq_factor < high_freq_factor.

    >>> llama3_rope_factors(4, 10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    ...                     original_max_len=512)
    (1.0, 8.0)
    """
    if not 0 < low_freq_factor < high_freq_factor:
        expected = f"more than low_freq_factor ({low_freq_factor})"
        raise ValueError(f"high_freq_factor: expected {expected}, got {high_freq_factor}")
    factors = []
    for i in range(head_dim // 2):
        turns = original_max_len * rope_theta ** (-2 * i / head_dim) / (2 * math.pi)
        kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        factors.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(factors)
