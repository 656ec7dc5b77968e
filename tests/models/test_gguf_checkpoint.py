import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from models.config import LlamaConfig
from models.gguf_checkpoint import GGUFCheckpoint, config_from_gguf

Write = Callable[..., Path]
# Where a block's float16 scales stand (the k-quants' structs in ggml-common.h); the rest may be any bytes.
K_QUANT_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_tensors_come_as_stored(write_gguf: Write, dtype: Any) -> None:
    values = np.arange(-12, 12).reshape(4, 6).astype(dtype)
    stored = (values.view(np.uint8), GGMLQuantizationType.BF16) if dtype == ml_dtypes.bfloat16 else values
    checkpoint = GGUFCheckpoint(write_gguf({"a": np.ones(3, np.float32), "b": stored}))
    assert list(checkpoint) == ["a", "b"]
    assert checkpoint.shape("b") == (4, 6)
    assert checkpoint["b"].dtype == dtype
    np.testing.assert_array_equal(checkpoint["b"].astype(np.float32), np.arange(-12, 12).reshape(4, 6))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("rows", [1, 12, 48])
def test_quantized_tensors_are_near_what_was_quantized(write_gguf: Write, kind: str, rows: int) -> None:
    quantization = GGMLQuantizationType[kind]
    values = np.random.default_rng(rows).uniform(-1, 1, (rows, 64)).astype(np.float32)
    data = quantize(values, quantization)
    loaded = GGUFCheckpoint(write_gguf({"a": (data, quantization)}))["a"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, dequantize(data, quantization))
    bits = int(kind[1])
    np.testing.assert_allclose(loaded, values, atol=2.1 * 2.0**-bits)


@pytest.mark.parametrize("kind", K_QUANT_SCALES)
def test_k_quants(write_gguf: Write, kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    size = GGML_QUANT_SIZES[quantization][1]
    blocks = np.random.default_rng(0).integers(0, 256, (20, 2, size), np.uint8)
    for at in K_QUANT_SCALES[kind]:
        blocks[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    data = blocks.reshape(20, 2 * size)
    loaded = GGUFCheckpoint(write_gguf({"a": (data, quantization)}))["a"]
    assert loaded.shape == (20, 512)
    assert loaded.std() > 0
    np.testing.assert_array_equal(loaded, dequantize(data, quantization))


def test_q8_0_by_hand(write_gguf: Write) -> None:
    # A block is a float16 scale and 32 signed bytes.
    numbers = np.arange(-16, 16, dtype=np.int8)
    block = np.frombuffer(np.float16(0.5).tobytes() + numbers.tobytes(), np.uint8)
    loaded = GGUFCheckpoint(write_gguf({"a": (block[None], GGMLQuantizationType.Q8_0)}))["a"]
    np.testing.assert_array_equal(loaded, np.arange(-16, 16)[None] * 0.5)


def test_fields(write_gguf: Write) -> None:
    fields = {"a": "é", "b": [1, -2], "c": ["x", "", "日本"], "d": True, "e": 7, "f": 0.5, "g": [0.25, 2.0]}
    checkpoint = GGUFCheckpoint(write_gguf(fields=dict(fields)))
    assert {name: checkpoint.fields[name] for name in fields} == fields


def test_a_file_cut_short_anywhere_is_refused(write_gguf: Write, tmp_path: Path) -> None:
    complete = write_gguf(fields={"a": ["some", "words"]}).read_bytes()
    path = tmp_path / "cut.gguf"
    # The writer pads the last tensor's 16 * 32 * 4 bytes to nothing: every cut loses something.
    for length in [*range(0, 2000, 7), *range(2000, len(complete), 997), len(complete) - 1]:
        path.write_bytes(complete[:length])
        with pytest.raises(ValueError, match=re.escape(f"{path}: not a readable GGUF file: ")):
            GGUFCheckpoint(path)
    path.write_bytes(complete)
    GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "expected it to begin with the letters GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "expected version 2 or 3"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "expected version 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(8), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(99), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + struct.pack("<I", 77), "77"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(path))}: not a readable GGUF file: .*{message}"):
        GGUFCheckpoint(path)


def test_an_unsupported_tensor_type_is_named(write_gguf: Write) -> None:
    data = np.zeros((2, GGML_QUANT_SIZES[GGMLQuantizationType.IQ4_NL][1]), np.uint8)
    path = write_gguf({"strange": (data, GGMLQuantizationType.IQ4_NL)})
    with pytest.raises(ValueError, match="tensor strange has type IQ4_NL, expected one of F32, F16, BF16"):
        GGUFCheckpoint(path)


def test_a_tensor_that_is_there_twice_is_named(write_gguf: Write) -> None:
    path = write_gguf({"one": np.ones(3, np.float32), "two": np.ones(3, np.float32)})
    path.write_bytes(path.read_bytes().replace(b"two", b"one"))
    with pytest.raises(ValueError, match="tensor one is there twice"):
        GGUFCheckpoint(path)


def test_config(write_gguf: Write) -> None:
    fields = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5}
    assert config_from_gguf(GGUFCheckpoint(write_gguf(fields=fields))) == LlamaConfig(
        vocab_size=32,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=24,
        max_len=128,
        rope_theta=100.0,
        rope_factors=None,
        norm_eps=float(np.float32(1e-5)),
        tie_embeddings=False,
        eos_token_ids=(2, 5),
    )


def test_config_without_output_tensor_is_tied(write_gguf: Write, gguf_tensors: dict[str, Any]) -> None:
    del gguf_tensors["output.weight"]
    assert config_from_gguf(GGUFCheckpoint(write_gguf(gguf_tensors))).tie_embeddings


def test_config_takes_the_rotary_factors(write_gguf: Write, gguf_tensors: dict[str, Any]) -> None:
    gguf_tensors["rope_freqs.weight"] = np.array([1, 1, 2.5, 8], np.float32)
    assert config_from_gguf(GGUFCheckpoint(write_gguf(gguf_tensors))).rope_factors == (1, 1, 2.5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture: expected 'llama', got 'qwen2'"),
        ({"llama.expert_count": 8}, "llama.expert_count: expected 0, got 8"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window: expected 0, got 64"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected 'none', got 'yarn'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count: expected 8, got 4"),
        ({"llama.attention.head_count": [4, 2]}, r"llama.attention.head_count: expected one integer, got \[4, 2\]"),
        ({"llama.attention.head_count_kv": 3}, r"num_kv_heads: expected a divisor of num_heads \(4\), got 3"),
        ({"llama.block_count": None}, "the field llama.block_count is missing"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(write_gguf: Write, change: dict[str, Any], message: str) -> None:
    path = write_gguf(fields=change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        config_from_gguf(GGUFCheckpoint(path))
