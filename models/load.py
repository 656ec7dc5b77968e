"""From a name to a model with its weights, and its tokenizer."""

import os
import re
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import LlamaConfig
from .demo import DEMO_MODELS, pull
from .gguf_checkpoint import GGUFCheckpoint, config_from_gguf
from .llama import Llama
from .safetensors_checkpoint import SafetensorsCheckpoint, config_from_folder
from .tokenizer import Tokenizer
from .weights import LLAMA_GGUF, LLAMA_HUGGING_FACE, Checkpoint, Table, fill

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]


def load(name_or_path: str | Path, *, dtype: DTypeLike, scan_layers: bool = False) -> tuple[Llama, Tokenizer | None]:
    """Returns a model with its weights, and its tokenizer (None if it has none).

    `name_or_path` is, in this order: a demo model's name, a `.gguf` file, a folder (with `config.json` and
    safetensors, or with one `.gguf` file), or an id on the Hugging Face hub (`org/name`). All parameters take
    `dtype`. With `scan_layers` the layers' weights are stacked, and compile sooner; but a decoding step then
    copies each layer's weights out of the stack before it reads them.

    Raises TypeError for a dtype that is not floating; ValueError when nothing is found under the name, or
    when what is found is no Llama, is damaged, or lacks a tensor or has one too many; OSError when a download
    fails.

    >>> model, tokenizer = load("smollm2-135m", dtype="float32")  # doctest: +SKIP
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating type, got {dtype}")
    path = _locate(name_or_path)
    if path.is_dir():
        checkpoint, config = SafetensorsCheckpoint(path), config_from_folder(path)
        tokenizer, table = Tokenizer.from_folder(path), LLAMA_HUGGING_FACE
    else:
        checkpoint = GGUFCheckpoint(path)
        config = config_from_gguf(checkpoint)
        tokenizer, table = Tokenizer.from_gguf(checkpoint.fields), LLAMA_GGUF
    try:
        return _model(config, checkpoint, table, dtype, scan_layers), tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model(config: LlamaConfig, checkpoint: Checkpoint, table: Table, dtype: DTypeLike, scan_layers: bool) -> Llama:
    empty = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, scan_layers=scan_layers))
    return fill(empty, checkpoint, table, config)


def _locate(name_or_path: str | Path) -> Path:
    """Returns the GGUF file or the folder in Hugging Face's layout that a name stands for."""
    name = str(name_or_path)
    if name in DEMO_MODELS:
        return pull(name)
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if name and path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return path
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "neither"
            raise ValueError(f"{name}: expected config.json with safetensors or one .gguf file, found {found}")
        return files[0]
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _snapshot(name)
    raise ValueError(
        f"{name!r}: found no such file or folder, and it is neither a hub id (org/name) nor a demo model "
        f"({', '.join(DEMO_MODELS)})"
    )


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second, which local models need not wait for

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{hub_id}: found no such folder, nor could it be fetched from the Hugging Face hub: {reason}"
        ) from None
