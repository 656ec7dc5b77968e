"""A GGUF file as a mapping from tensor names to arrays, with its metadata (ggml-org/ggml, docs/gguf.md)."""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from .config import LlamaConfig

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = {
    GGMLQuantizationType[name]
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
}


class _Header:
    """Reads a GGUF's header front to back. (The gguf package's own reader makes several arrays of every
    vocabulary entry, which takes seconds, and does not notice the end of the file.)"""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def bytes(self, n: int) -> bytes:
        if n > len(self.data) - self.offset:
            raise ValueError("the file ends within its header")
        self.offset += n
        return self.data[self.offset - n : self.offset]

    def scalars(self, letter: str, n: int) -> tuple:
        return struct.unpack(f"<{n}{letter}", self.bytes(n * struct.calcsize(letter)))

    def scalar(self, letter: str) -> Any:
        return self.scalars(letter, 1)[0]

    def string(self) -> str:
        return self.bytes(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            kind, n = self.scalar("I"), self.scalar("Q")
            if kind in _SCALARS:
                return list(self.scalars(_SCALARS[GGUFValueType(kind)], n))
            return [self.value(kind) for _ in range(n)]
        return self.scalar(_SCALARS[GGUFValueType(kind)])


@dataclass(frozen=True)
class _TensorInfo:
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int


class GGUFCheckpoint:
    """The tensors of one GGUF file by name, read and dequantized when asked for; `fields` is the metadata.

    A quantized tensor comes as float32, a plain one as stored (float32, float16, bfloat16), always with the
    last axis contiguous as in the file: a matrix is [out, in]. The file stays mapped as long as this object
    lives.

    Raises ValueError with the path for a file that is not GGUF version 2 or 3 (little endian), that is cut
    short anywhere, or that holds a tensor of a type outside F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and
    Q2_K to Q6_K.
    """

    fields: dict[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _Header(self._data)
            if header.bytes(4) != b"GGUF":
                raise ValueError("expected it to begin with the letters GGUF")
            version = header.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"expected version 2 or 3 (little endian), got {version}")
            num_tensors, num_fields = header.scalars("Q", 2)
            self.fields = {header.string(): header.value(header.scalar("I")) for _ in range(num_fields)}
            self._tensors = _read_tensor_infos(header, num_tensors, self.fields.get("general.alignment", 32))
        except (ValueError, KeyError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path}: not a readable GGUF file: {error}") from None

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._tensors[name]
        if info.kind in _PLAIN:
            return np.frombuffer(self._data, _PLAIN[info.kind], math.prod(info.shape), info.offset).reshape(info.shape)
        blocks = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        # gguf dequantizes 16 rows at a time; long rows are several times as fast as a matrix's own.
        num_rows = math.prod(info.shape[:-1])
        return dequantize(blocks.reshape(num_rows // math.gcd(num_rows, 16), -1), info.kind).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._tensors[name].shape


def _read_tensor_infos(header: _Header, num_tensors: int, alignment: int) -> dict[str, _TensorInfo]:
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment: expected a positive integer, got {alignment!r}")
    entries = []
    for _ in range(num_tensors):
        name = header.string()
        shape = tuple(reversed(header.scalars("Q", header.scalar("I"))))
        entries.append((name, shape, header.scalar("I"), header.scalar("Q")))
    start = -(-header.offset // alignment) * alignment
    infos = {}
    for name, shape, kind, offset in entries:
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"tensor {name} has the unknown type {kind}") from None
        if kind not in _PLAIN and kind not in _QUANTIZED:
            supported = ", ".join(k.name for k in (*_PLAIN, *sorted(_QUANTIZED)))
            raise ValueError(f"tensor {name} has type {kind.name}, expected one of {supported}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if math.prod(shape) == 0 or not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of type {kind.name}: expected rows of multiples of {block}, got {shape}")
        num_bytes = math.prod(shape) // block * block_bytes
        end = start + offset + num_bytes
        if end > len(header.data):
            raise ValueError(f"tensor {name} ends at byte {end}, the file at byte {len(header.data)}")
        if name in infos:
            raise ValueError(f"tensor {name} is there twice")
        infos[name] = _TensorInfo(kind, shape, start + offset, num_bytes)
    return infos


def config_from_gguf(checkpoint: GGUFCheckpoint) -> LlamaConfig:
    """Returns the configuration; raises ValueError for what is no Llama or has a part that is not supported."""
    try:
        return _config(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def _config(checkpoint: GGUFCheckpoint) -> LlamaConfig:
    fields = checkpoint.fields

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"the field llama.{name} is missing")
        return value

    def size(name: str) -> int:
        value = field(name)
        if not isinstance(value, int):
            raise ValueError(f"llama.{name}: expected one integer, got {value!r}")
        return value

    def expect(name: str, value: Any, expected: Any) -> None:
        if value != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {value!r}")

    expect("general.architecture", fields.get("general.architecture"), "llama")
    for name in ("expert_count", "attention.sliding_window"):
        expect(f"llama.{name}", field(name, 0), 0)
    expect("llama.rope.scaling.type", field("rope.scaling.type", "none"), "none")
    expect("llama.rope.scale_linear", field("rope.scale_linear", 1.0), 1.0)
    d_model, num_heads = size("embedding_length"), size("attention.head_count")
    head_dim = field("attention.key_length", d_model // max(num_heads, 1))
    expect("llama.rope.dimension_count", field("rope.dimension_count", head_dim), head_dim)
    expect("llama.attention.value_length", field("attention.value_length", head_dim), head_dim)
    if "token_embd.weight" not in checkpoint:
        raise ValueError("the tensor token_embd.weight is missing")
    has_factors = "rope_freqs.weight" in checkpoint
    return LlamaConfig(
        vocab_size=checkpoint.shape("token_embd.weight")[0],
        d_model=d_model,
        num_layers=field("block_count"),
        num_heads=num_heads,
        num_kv_heads=field("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        d_ff=field("feed_forward_length"),
        max_len=field("context_length"),
        rope_theta=float(field("rope.freq_base", 10000.0)),
        rope_factors=tuple(checkpoint["rope_freqs.weight"].tolist()) if has_factors else None,
        norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in checkpoint,
        eos_token_ids=eos_token_ids_from_gguf(fields),
    )


def eos_token_ids_from_gguf(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end a text, a turn or a message, in this order."""
    names = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(fields[name] for name in names if name in fields))
