"""What an engine is given to work with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .arguments import check_bool, check_int

if TYPE_CHECKING:  # so that the defaults can be read without JAX
    from jax.typing import DTypeLike


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and limits of one engine; the fields are also the keyword arguments of `LLM`.

    Raises ValueError that names the field, what was expected and what came.
    """

    block_size: int = 16
    """Tokens a block of the KV cache holds."""
    num_blocks: int | None = None
    """Blocks of the cache; None takes what fits (see `memory_utilization`)."""
    num_host_blocks: int = 0
    """Blocks in the host's memory that preempted requests are swapped to."""
    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_num_batched_tokens: int = 2048
    """Tokens one step computes; longer prompts are computed in chunks."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; None is the model's own limit."""
    enable_prefix_caching: bool = True
    """Keep the blocks of prompts and answers for later requests that begin with the same tokens."""
    preemption: Literal["auto", "swap", "recompute"] = "auto"
    """What becomes of the request that came last when blocks run out: "swap" copies its blocks to the host while
    there is room and back later, "recompute" computes its tokens anew, "auto" swaps requests of several sequences."""
    batch_invariant: bool = False
    """Give a request's tokens and log-probabilities the same bits alone and in any batch, preempted or not, with a
    warm prefix cache or a cold one. Every step then has one shape, of `max_num_seqs` tokens: prompts are computed in
    chunks of no more, token by token in attention, and a batch of few sequences costs as much as a full one."""
    memory_utilization: float = 0.9
    """Share of a GPU's memory that weights and cache may take, the rest being for activations. On a CPU, where memory
    is everybody's, `num_blocks=None` takes up to 2 GiB for the cache, and no more than this share of half of what is
    free."""
    dtype: "DTypeLike | None" = None
    """Of weights, activations and cache; None is bfloat16 on a GPU and float32 on a CPU."""
    seed: int = 0
    """Where requests without a seed of their own get theirs from."""

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is None and name in ("num_blocks", "max_model_len"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        check_int("num_host_blocks", self.num_host_blocks, 0)
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_bool("batch_invariant", self.batch_invariant)
        if self.preemption not in ("auto", "swap", "recompute"):
            raise ValueError(f'preemption: expected "auto", "swap" or "recompute", got {self.preemption!r}')
        if self.preemption == "swap" and self.num_host_blocks == 0:
            raise ValueError('num_host_blocks: expected at least 1 for preemption="swap", got 0')
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization: expected a number in (0, 1], got {self.memory_utilization!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an int, got {self.seed!r}")
