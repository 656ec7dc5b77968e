"""Llama in Flax NNX: one set of parameters, a dense forward pass to train with and a paged one to serve with."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels import KVCache, PagedBatch, flash_attention, paged_attention, rotate_and_write_kv

from .config import LlamaConfig
from .linear import linear
from .rotary import Rotary, rotate

State = TypeVar("State")
Attend = Callable[[Array], tuple[Array, State]]
"""Of each kv head its query heads, key and value, [..., K, N/K + 2, H] -> output [..., N, H], and what the caller
wants carried on."""


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype))


class RMSNorm(nnx.Module):
    """Root mean square layer normalization (arXiv 1910.07467, eq. 4), computed in float32."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike):
        self.weight_d = nnx.Param(jnp.ones(config.d_model, dtype))
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * _as_row(self.weight_d[...], x)


def _as_row(weight_d: Array, x: Array) -> Array:
    return weight_d.reshape((1,) * (x.ndim - 1) + weight_d.shape)


class Attention(nnx.Module):
    """Grouped-query attention; positions, and what attends to what, are the caller's."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        # Of each kv head: its N/K query heads, its keys, its values. One product, and sharded by kv heads.
        self.qkv_weight_kghd = _weight(rngs, (K, N // K + 2, H, D), D, dtype)
        self.o_weight_dnh = _weight(rngs, (D, N, H), N * H, dtype)

    def __call__(self, x: Float[Array, "*B D"], attend: Attend[State]) -> tuple[Float[Array, "*B D"], State]:
        weight = self.qkv_weight_kghd[...]
        qkv = linear(weight.reshape(-1, x.shape[-1]), x).reshape(*x.shape[:-1], *weight.shape[:3])
        out, state = attend(qkv)
        o_weight = self.o_weight_dnh[...].reshape(x.shape[-1], -1)
        return linear(o_weight, out.reshape(*x.shape[:-1], -1)), state


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        D, F = config.d_model, config.d_ff
        self.gate_up_weight_2fd = _weight(rngs, (2, F, D), D, dtype)
        self.down_weight_df = _weight(rngs, (D, F), F, dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gate, up = jnp.split(linear(self.gate_up_weight_2fd[...].reshape(-1, x.shape[-1]), x), 2, axis=-1)
        return linear(self.down_weight_df[...], jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One layer: attention, then the MLP, each behind its norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.attention_norm = RMSNorm(config, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "*B D"], attend: Attend[State]) -> tuple[Float[Array, "*B D"], State]:
        with jax.named_scope("attention"):
            out, state = self.attention(self.attention_norm(x), attend)
            x = x + out
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class Embedding(nnx.Module):
    """A vector for each token; also the output head, with weights of its own or the embedding's."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.weight_vd = _weight(rngs, (config.vocab_size, config.d_model), config.d_model, dtype)

    def __call__(self, tokens: Int32[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.weight_vd[...].at[tokens].get(mode="clip")

    def logits(self, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
        return linear(self.weight_vd[...], hidden, out_dtype=jnp.float32)


class Llama(nnx.Module):
    """The Llama family (arXiv 2407.21783 and before): pre-norm, rotary positions, grouped queries, SwiGLU.

    Args:
      config: shape and constants.
      rngs: of the random initial weights.
      dtype: of parameters and activations; norms, softmax and logits are float32.
      scan_layers: layers stacked in one leaf a weight and run by `lax.scan`, which compiles a program of one layer;
        else separate leaves run one after the other, which spares a step that decodes a copy of every layer's weights.

    >>> config = LlamaConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    ...                      d_ff=32, max_len=128)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 64)
    """

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, scan_layers: bool = False
    ):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs, dtype=dtype)
        if scan_layers:
            keys = jax.random.split(rngs.params(), config.num_layers)
            self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key), dtype=dtype))(keys)
        else:
            self.layers = nnx.List([Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config, dtype=dtype)
        self.head = None if config.tie_embeddings else Embedding(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits (float32) of a dense batch, causal; packed sequences by `segment_ids` and their `positions`."""
        B, T = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        rotary = Rotary.at(positions, self.config)

        def attend(qkv: Array) -> tuple[Array, None]:
            query = qkv[..., :-2, :].reshape(B, T, -1, qkv.shape[-1])
            query, key = rotate(query, rotary), rotate(qkv[..., -2, :], rotary)
            return flash_attention(query, key, qkv[..., -1, :], is_causal=True, segment_ids=segment_ids), None

        def run(block: Block, layer: Array, x: Array, state: None) -> tuple[Array, None]:
            return block(x, attend)

        x, _ = self._run_layers(run, self.embedding(tokens), None)
        return self.logits(self.norm(x).reshape(B * T, -1)).reshape(B, T, -1)

    def step(
        self,
        tokens: Int32[Array, " T"],
        positions: Int32[Array, " T"],
        cache: KVCache,
        batch: PagedBatch,
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """The final hidden states of T packed tokens, whose keys and values go into the cache (see `PagedBatch`)."""
        rotary = Rotary.at(positions, self.config)

        def run(block: Block, layer: Array, x: Array, cache: KVCache) -> tuple[Array, KVCache]:
            def attend(qkv: Array) -> tuple[Array, KVCache]:
                query, written = rotate_and_write_kv(cache, batch, layer, qkv, rotary.cos, rotary.sin)
                return paged_attention(query, written, batch, layer), written

            return block(x, attend)

        x, cache = self._run_layers(run, self.embedding(tokens), cache)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
        """Next-token logits, float32, of the hidden states that `step` returned."""
        with jax.named_scope("logits"):
            return (self.embedding if self.head is None else self.head).logits(hidden)

    def _run_layers(
        self, run: Callable[[Block, Array, Array, State], tuple[Array, State]], x: Array, state: State
    ) -> tuple[Array, State]:
        if isinstance(self.layers, Block):
            layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)

            def body(carry: tuple[Array, State], xs: tuple[Block, Array]) -> tuple[tuple[Array, State], None]:
                return run(*xs, *carry), None

            return lax.scan(body, (x, state), (self.layers, layers))[0]
        run = jax.jit(run)  # one trace for all layers
        for number, block in enumerate(self.layers):
            x, state = run(block, jnp.asarray(number, jnp.int32), x, state)  # a constant, which no kernel has to make
        return x, state
