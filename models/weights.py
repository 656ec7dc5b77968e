"""Fills a model's leaves from a checkpoint's tensors, by one table of names for a family and file format."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from .config import LlamaConfig

# name in the checkpoint -> (path of the leaf, its axes there -> its axes here); {} is the layer, and what stands in
# brackets behind the path the part of the leaf. What stands between two commas is one axis of the checkpoint. G is
# the query heads of a kv head. h is half of H: GGUF keeps the two numbers of a rotary pair of q and k beside each
# other, Hugging Face and this model half a head apart.
Table = Mapping[str, tuple[str, str]]

LLAMA_HUGGING_FACE: Table = {
    "model.embed_tokens.weight": ("embedding.weight_vd", "V, D -> V D"),
    "model.layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight_d", "D -> D"),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.{}.attention.qkv_weight_kghd[:, :-2]", "K G H, D -> K G H D"),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.{}.attention.qkv_weight_kghd[:, -2]", "K H, D -> K H D"),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.{}.attention.qkv_weight_kghd[:, -1]", "K H, D -> K H D"),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.o_weight_dnh", "D, N H -> D N H"),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.{}.mlp_norm.weight_d", "D -> D"),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.{}.mlp.gate_up_weight_2fd[0]", "F, D -> F D"),
    "model.layers.{}.mlp.up_proj.weight": ("layers.{}.mlp.gate_up_weight_2fd[1]", "F, D -> F D"),
    "model.layers.{}.mlp.down_proj.weight": ("layers.{}.mlp.down_weight_df", "D, F -> D F"),
    "model.norm.weight": ("norm.weight_d", "D -> D"),
    "lm_head.weight": ("head.weight_vd", "V, D -> V D"),
}
LLAMA_GGUF: Table = {
    "token_embd.weight": ("embedding.weight_vd", "V, D -> V D"),
    "blk.{}.attn_norm.weight": ("layers.{}.attention_norm.weight_d", "D -> D"),
    "blk.{}.attn_q.weight": ("layers.{}.attention.qkv_weight_kghd[:, :-2]", "K G h 2, D -> K G 2 h D"),
    "blk.{}.attn_k.weight": ("layers.{}.attention.qkv_weight_kghd[:, -2]", "K h 2, D -> K 2 h D"),
    "blk.{}.attn_v.weight": ("layers.{}.attention.qkv_weight_kghd[:, -1]", "K H, D -> K H D"),
    "blk.{}.attn_output.weight": ("layers.{}.attention.o_weight_dnh", "D, N H -> D N H"),
    "blk.{}.ffn_norm.weight": ("layers.{}.mlp_norm.weight_d", "D -> D"),
    "blk.{}.ffn_gate.weight": ("layers.{}.mlp.gate_up_weight_2fd[0]", "F, D -> F D"),
    "blk.{}.ffn_up.weight": ("layers.{}.mlp.gate_up_weight_2fd[1]", "F, D -> F D"),
    "blk.{}.ffn_down.weight": ("layers.{}.mlp.down_weight_df", "D, F -> D F"),
    "output_norm.weight": ("norm.weight_d", "D -> D"),
    "output.weight": ("head.weight_vd", "V, D -> V D"),
}
# Rotary frequencies, which the configuration holds.
_KNOWN_EXTRAS = re.compile(r"rope_freqs\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"layers\.(?:(\d+)\.)?(.+)")


@runtime_checkable
class Checkpoint(Protocol):
    """Tensors by name, each read only when asked for."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...
    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str, /) -> tuple[int, ...]: ...


def fill[Model](model: Model, checkpoint: Checkpoint, table: Table, config: LlamaConfig) -> Model:
    """Returns `model`, made by `nnx.eval_shape`, with the checkpoint's tensors in place of its shapes.

    Layers may be separate modules (`layers.0.mlp_norm.weight_d` [D]) or one with stacked leaves
    (`layers.mlp_norm.weight_d` [L, D]). Tensors are read and converted one at a time, so the peak of memory
    is the model and one of its leaves.

    Raises ValueError that lists the tensors missing or left over, or names one of the wrong shape, before any
    is read.
    """
    sizes = {"V": config.vocab_size, "D": config.d_model, "N": config.num_heads, "K": config.num_kv_heads}
    sizes["G"] = config.num_heads // config.num_kv_heads
    sizes |= {"H": config.head_dim, "h": config.head_dim // 2, "2": 2, "F": config.d_ff}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    sources = [_source(path.removesuffix(".value"), table, config) for path in paths]

    axes_by_name = {part.name: part.axes for source in sources for part in source}
    present = set(checkpoint)
    missing = [name for name in axes_by_name if name not in present]
    left_over = [name for name in checkpoint if name not in axes_by_name and not _KNOWN_EXTRAS.fullmatch(name)]
    if missing or left_over:
        raise ValueError(f"tensors missing: {_listed(missing)}; left over: {_listed(left_over)}")
    for name, axes in axes_by_name.items():
        groups = axes.partition("->")[0].split(",")
        expected = tuple(prod(sizes[axis] for axis in group.split()) for group in groups)
        if checkpoint.shape(name) != expected:
            raise ValueError(f"tensor {name}: expected shape {expected}, got {checkpoint.shape(name)}")

    arrays = []
    for (_, leaf), source in zip(leaves, sources, strict=True):
        array = np.empty(leaf.shape, leaf.dtype)
        for part in source:
            target = array[part.place]
            target[...] = _rearranged(checkpoint[part.name], part.axes, sizes).reshape(target.shape)
        arrays.append(jax.device_put(array))
    return jax.tree_util.tree_unflatten(treedef, arrays)


class _Part(NamedTuple):
    """A tensor, and which part of a leaf it is."""

    name: str
    axes: str
    place: tuple[int | slice, ...]


def _source(path: str, table: Table, config: LlamaConfig) -> list[_Part]:
    """The tensors that a leaf is made of, those of all layers where they are stacked."""
    layer, rest = None, path
    if match := _LAYER.fullmatch(path):
        layer, rest = match.groups()
        rest = "layers.{}." + rest
    parts: list[_Part] = []
    for name, (target, axes) in table.items():
        leaf, _, index = target.partition("[")
        if leaf != rest:
            continue
        within = _index(index)
        if match is not None and layer is None:
            parts += [_Part(name.format(i), axes, (i, *within)) for i in range(config.num_layers)]
        else:
            parts.append(_Part(name.format(layer), axes, within))
    if not parts:
        raise KeyError(path)
    return parts


def _index(text: str) -> tuple[int | slice, ...]:
    """`:, -2]` as the index that it stands for; of all where there is none."""
    items = text.rstrip("]").split(", ") if text else []
    return tuple(slice(*(int(n) if n else None for n in i.split(":"))) if ":" in i else int(i) for i in items)


def _rearranged(tensor: np.ndarray, axes: str, sizes: Mapping[str, int]) -> np.ndarray:
    before, _, after = axes.replace(",", "").partition("->")
    before, after = before.split(), after.split()
    return tensor.reshape([sizes[axis] for axis in before]).transpose([before.index(axis) for axis in after])


def _listed(names: list[str], most: int = 20) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
