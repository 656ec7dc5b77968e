import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file

from models.llama import Block
from models.load import load

Write = Callable[..., Path]
Tensors = dict[str, np.ndarray]


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    return np.asarray(model(jnp.array([tokens], jnp.int32)))[0]


@pytest.mark.parametrize("name", ["untied", "tied_llama3"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_logits_are_transformers(tiny: dict[str, Any], write_folder: Write, name: str, scan_layers: bool) -> None:
    model, tokenizer = load(write_folder(name), dtype="float32", scan_layers=scan_layers)
    assert tokenizer is None
    assert model.config.tie_embeddings == (name == "tied_llama3")
    np.testing.assert_allclose(logits(model, tiny["tokens"]), tiny["models"][name]["logits"], rtol=1e-4, atol=2e-5)


def test_shards_hold_the_same_model(
    tiny: dict[str, Any], write_folder: Write, tiny_weights: Callable[[str], Tensors]
) -> None:
    folder = write_folder()
    (folder / "model.safetensors").unlink()
    weights = tiny_weights("untied")
    shards = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, _ = load(str(folder), dtype="float32")
    np.testing.assert_allclose(logits(model, tiny["tokens"]), tiny["models"]["untied"]["logits"], rtol=1e-4, atol=2e-5)


def test_a_gguf_is_the_same_model(
    tiny: dict[str, Any], write_gguf: Write, tiny_weights: Callable[[str], Tensors]
) -> None:
    """The Hugging Face weights, with the rows of q and k in the order of llama.cpp's converter."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    tensors = {}
    for name, array in tiny_weights("untied").items():
        layer = re.match(r"model\.layers\.(\d)\.", name)
        prefix, rest = (f"blk.{layer[1]}.", name[layer.end() :]) if layer else ("", name)
        rest = names[rest.removesuffix(".weight")]
        if rest in ("attn_q", "attn_k"):
            num_heads = len(array) // 8
            array = array.reshape(num_heads, 2, 4, 16).swapaxes(1, 2).reshape(array.shape)
        tensors[f"{prefix}{rest}.weight"] = array
    model, tokenizer = load(write_gguf(tensors), dtype="float32")
    assert tokenizer is None
    np.testing.assert_allclose(logits(model, tiny["tokens"]), tiny["models"]["untied"]["logits"], rtol=1e-4, atol=2e-5)


def test_a_folder_with_one_gguf(write_gguf: Write) -> None:
    path = write_gguf()
    model, _ = load(path.parent, dtype="bfloat16")
    assert model.norm.weight_d.dtype == jnp.bfloat16
    (path.parent / "other.gguf").touch()
    with pytest.raises(ValueError, match=r"or one .gguf file, found model.gguf, other.gguf"):
        load(path.parent, dtype="float32")


def test_the_demo_model_is_read_as_transformers_reads_it(smollm2_path: Path) -> None:
    reference = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"
    document = json.loads(reference.read_text(encoding="utf-8"))
    prompt = next(prompt for prompt in document["prompts"] if prompt["name"] == "english")
    model, tokenizer = load("smollm2-135m", dtype="float32", scan_layers=True)
    assert tokenizer is not None
    tokens = tokenizer.encode(prompt["prompt"])
    assert tokens == prompt["prompt_token_ids"]
    assert model.config.eos_token_ids == tokenizer.eos_token_ids == (2,)
    ours = logits(model, tokens)
    for expected in prompt["logits"]:
        row = ours[expected["position"]]
        np.testing.assert_allclose(row[document["logit_ids"]], expected["values"], atol=2e-3)
        assert row.argmax() == expected["top_ids"][0]


def test_layers_are_scanned_where_asked(write_folder: Write) -> None:
    folder = write_folder()
    assert isinstance(load(folder, dtype="float32")[0].layers, nnx.List)
    assert isinstance(load(folder, dtype="float32", scan_layers=True)[0].layers, Block)


def test_a_hub_id_is_a_folder(tiny: dict[str, Any], write_folder: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder()
    calls = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load("some-org/some.model-1B", dtype="float32")
    assert model.config.num_layers == 2
    assert calls == [("some-org/some.model-1B", ["*.json", "*.jinja", "*.safetensors"])]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection\nand many words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=r"^org/none: .* could it be fetched .* hub: no connection$"):
        load("org/none", dtype="float32")


@pytest.mark.parametrize("name", ["nothing", "./no/such/model", "/no/such.gguf", "a/b/c", "", "../x"])
def test_an_unknown_name_says_what_was_tried(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = f"^{re.escape(repr(name))}: found no such file or folder, .* hub id .* demo model .smollm2-135m.$"
    with pytest.raises(ValueError, match=message):
        load(name, dtype="float32")


def test_a_folder_without_weights(tmp_path: Path, write_folder: Write) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty: expected config.json with safetensors or one .gguf file, found nei"):
        load(empty, dtype="float32")
    folder = write_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"untied: expected model.safetensors or "):
        load(folder, dtype="float32")


def test_errors_name_the_file(write_gguf: Write, gguf_tensors: Tensors) -> None:
    del gguf_tensors["output_norm.weight"]
    path = write_gguf(gguf_tensors)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: tensors missing: output_norm.weight; "):
        load(path, dtype="float32")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ValueError, match=r"model.bin: not a readable GGUF file: "):
        load(path, dtype="float32")


def test_dtype_must_be_floating() -> None:
    with pytest.raises(TypeError, match="dtype: expected a floating type, got int32"):
        load("smollm2-135m", dtype="int32")
