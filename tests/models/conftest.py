"""Small Llamas in every file format, written by each test into its own folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jaxtyping
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

DATA = Path(__file__).with_name("data")
# In a GGUF a value of Python says nothing about its width.
UINT32_FIELDS = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.rope.dimension_count": 8,
}
FLOAT32_FIELDS = {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 100.0}


@pytest.fixture
def no_annotation_checks() -> Iterator[None]:
    """Lets wrong types through to the code's own checks, which is what a user without the test suite's meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """Two random Llamas with the logits that transformers computes for them (data/make_tiny_llama_reference.py)."""
    return json.loads((DATA / "tiny_llama.json").read_text())


@pytest.fixture(scope="session")
def tiny_weights(tiny: dict[str, Any]) -> Callable[[str], dict[str, np.ndarray]]:
    """The weights of one of these models, by Hugging Face's names."""

    def weights(name: str) -> dict[str, np.ndarray]:
        random = np.random.RandomState(tiny["seed"])
        shapes = tiny["models"][name]["shapes"]
        return {
            key: np.asarray(random.standard_normal(shapes[key]) * tiny["scale"], np.float32) for key in sorted(shapes)
        }

    return weights


@pytest.fixture
def write_folder(
    tmp_path: Path, tiny: dict[str, Any], tiny_weights: Callable[[str], dict[str, np.ndarray]]
) -> Callable[..., Path]:
    """Writes one of the tiny models as a folder in Hugging Face's layout; `changes` are made to its config.json."""

    def write(name: str = "untied", weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = tiny["models"][name]["config"] | changes
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tiny_weights(name) if weights is None else weights, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def gguf_tensors() -> dict[str, np.ndarray]:
    """Random tensors of the untied model, with a GGUF's names and shapes."""
    random = np.random.default_rng(0)
    layer = {
        "attn_norm": (16,),
        "attn_q": (32, 16),
        "attn_k": (16, 16),
        "attn_v": (16, 16),
        "attn_output": (16, 32),
        "ffn_norm": (16,),
        "ffn_gate": (24, 16),
        "ffn_up": (24, 16),
        "ffn_down": (16, 24),
    }
    shapes = {"token_embd": (32, 16), "output_norm": (16,), "output": (32, 16)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    return {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write_gguf(tmp_path: Path, gguf_tensors: dict[str, np.ndarray]) -> Callable[..., Path]:
    """Writes a GGUF: the untied model's fields, changed by `fields` (None removes one), and tensors.

    A tensor is an array, or a pair of a quantized one's bytes and its type.
    """

    def write(tensors: dict[str, Any] | None = None, fields: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "model.gguf"
        fields = fields or {}
        writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
        for name, value in (UINT32_FIELDS | FLOAT32_FIELDS | fields).items():
            if isinstance(value, list):
                writer.add_array(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif value is not None:
                writer.add_uint32(name, value)
        for name, tensor in (gguf_tensors if tensors is None else tensors).items():
            array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
            assert kind is None or isinstance(kind, GGMLQuantizationType)
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
