import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.config import LlamaConfig
from models.safetensors_checkpoint import SafetensorsCheckpoint, config_from_folder

Write = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_single_file(tmp_path: Path, dtype: Any) -> None:
    save_file({"a": np.arange(6).reshape(2, 3).astype(dtype)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert list(checkpoint) == ["a"]
    assert checkpoint.shape("a") == (2, 3)
    assert checkpoint["a"].dtype == dtype
    np.testing.assert_array_equal(checkpoint["a"].astype(np.float32), [[0, 1, 2], [3, 4, 5]])


def test_shards(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": np.zeros(2)}, "2.safetensors": {"b": np.ones(3), "c": np.ones(1)}}
    write_shards(tmp_path, {k: {n: t.astype(np.float32) for n, t in v.items()} for k, v in shards.items()})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert sorted(checkpoint) == ["a", "b", "c"]
    np.testing.assert_array_equal(checkpoint["b"], [1, 1, 1])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    ones = np.ones(2, np.float32)
    write_shards(tmp_path, {"1.safetensors": {"a": ones}, "2.safetensors": {"b": ones}})
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}: shards missing .*: 2.safetensors$"):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": {"a": np.ones(2, np.float32)}})
    index = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no shard holds what .* names: b$"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    complete = path.read_bytes()
    for length in (0, 5, 20, len(complete) - 1):
        path.write_bytes(complete[:length])
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a complete safetensors file: "):
            SafetensorsCheckpoint(tmp_path)


def test_integers_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(6)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor a: expected one of F32, F16, BF16, got I64"):
        SafetensorsCheckpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected model.safetensors or {INDEX}, found neither"):
        SafetensorsCheckpoint(tmp_path)


def test_config(write_folder: Write) -> None:
    assert config_from_folder(write_folder(eos_token_id=2)) == LlamaConfig(
        vocab_size=32,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=24,
        max_len=64,
        rope_theta=100.0,
        rope_factors=None,
        norm_eps=1e-5,
        tie_embeddings=False,
        eos_token_ids=(2,),
    )


def test_config_with_what_may_be_left_out(tmp_path: Path) -> None:
    """Defaults as transformers' LlamaConfig has them."""
    fields = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "intermediate_size": 24}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = config_from_folder(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.max_len) == (4, 4, 2048)
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings) == (10000.0, 1e-6, False)
    assert config.eos_token_ids == ()


def test_generation_config_has_the_last_word_on_eos(write_folder: Write) -> None:
    folder = write_folder(eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "top_p": 0.9}))
    assert config_from_folder(folder).eos_token_ids == (7, 8)


@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_llama3_frequencies_are_transformers(write_folder: Write, tiny: dict[str, Any], layout: str) -> None:
    rope = tiny["models"]["tied_llama3"]["config"]["rope_scaling"] | {"rope_theta": 500.0}
    other = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[layout]
    config = config_from_folder(write_folder("tied_llama3", **{layout: rope, other: None}))
    assert config.rope_factors is not None
    frequencies = 500.0 ** (-np.arange(4) / 4) / np.array(config.rope_factors)
    np.testing.assert_allclose(frequencies, tiny["models"]["tied_llama3"]["rotary_frequencies"], rtol=1e-6)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type: expected 'llama', got 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: expected False or None, got True"),
        ({"mlp_bias": True}, "mlp_bias: expected False or None, got True"),
        ({"sliding_window": 4096}, "sliding_window: expected None, got 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None, got {'bits': 4}"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: .* got 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "fields missing .*: low_freq_factor, "),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"vocab_size": "32"}, "vocab_size: expected a positive integer, got '32'"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(write_folder: Write, change: dict[str, Any], message: str) -> None:
    folder = write_folder(**change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / 'config.json'))}: {message}"):
        config_from_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_config_that_does_not_parse_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected a JSON "):
        config_from_folder(tmp_path)
