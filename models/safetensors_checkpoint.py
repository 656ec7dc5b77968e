"""A folder in Hugging Face's layout as a mapping from tensor names to arrays, with its configuration."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .config import LlamaConfig, llama3_rope_factors

_FLOATS = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """The tensors of `model.safetensors` or of `model.safetensors.index.json`'s shards, read when asked for.

    Raises ValueError with the path when there are no weights, a shard is missing, a file is cut short or
    otherwise damaged, the index names a tensor that its shard lacks, or a tensor is not float32, float16 or
    bfloat16.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        index = folder / _INDEX
        if index.is_file():
            shard_by_name = read_json(index).get("weight_map")
            if not isinstance(shard_by_name, dict):
                raise ValueError(f"{index}: expected an object weight_map, got {shard_by_name!r}")
            shards = sorted(set(shard_by_name.values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ValueError(f"{folder}: shards missing that {_INDEX} names: {', '.join(missing)}")
        elif (folder / "model.safetensors").is_file():
            shard_by_name, shards = {}, ["model.safetensors"]
        else:
            raise ValueError(f"{folder}: expected model.safetensors or {_INDEX}, found neither")
        for shard in shards:
            try:
                file = safe_open(folder / shard, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{folder / shard}: not a complete safetensors file: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
        absent = [name for name in shard_by_name if name not in self._files]
        if absent:
            raise ValueError(f"{folder}: no shard holds what {_INDEX} names: {', '.join(absent)}")
        for name, file in self._files.items():
            kind = file.get_slice(name).get_dtype()
            if kind not in _FLOATS:
                raise ValueError(f"{folder}: tensor {name}: expected one of {', '.join(_FLOATS)}, got {kind}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())


def config_from_folder(folder: Path) -> LlamaConfig:
    """Returns the configuration in `config.json`, with the EOS ids of `generation_config.json` if it has
    some.

    Raises ValueError with the path for what is no Llama or has a part that is not supported.
    """
    path = folder / "config.json"
    fields = read_json(path)
    generation = folder / "generation_config.json"
    if generation.is_file():
        fields |= {key: value for key, value in read_json(generation).items() if key == "eos_token_id"}
    try:
        return _config(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config(fields: Mapping[str, Any]) -> LlamaConfig:
    def expect(name: str, *expected: Any) -> None:
        value = fields.get(name, expected[0])
        if value not in expected:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, expected))}, got {value!r}")

    if fields.get("model_type") != "llama":
        raise ValueError(f"model_type: expected 'llama', got {fields.get('model_type')!r}")
    expect("hidden_act", "silu")
    expect("attention_bias", False, None)
    expect("mlp_bias", False, None)
    expect("sliding_window", None)
    expect("quantization_config", None)
    expect("partial_rotary_factor", 1.0, None)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in names:
        value = fields.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    num_heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // num_heads
    # transformers 5 keeps the base and the scaling together, older versions apart.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_theta = float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        d_ff=fields["intermediate_size"],
        max_len=fields.get("max_position_embeddings", 2048),
        rope_theta=rope_theta,
        rope_factors=_rope_factors(rope, head_dim, rope_theta),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        eos_token_ids=eos_token_ids_from_json(fields),
    )


def _rope_factors(rope: Mapping[str, Any], head_dim: int, rope_theta: float) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type: expected 'default' or 'llama3', got {kind!r}")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"fields missing of the llama3 rope scaling: {', '.join(missing)}")
    factor, low, high, original_max_len = (rope[name] for name in names)
    return llama3_rope_factors(
        head_dim,
        rope_theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=original_max_len,
    )


def eos_token_ids_from_json(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns `eos_token_id`, which is one id, several or null."""
    ids = fields.get("eos_token_id")
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises ValueError with the path when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
