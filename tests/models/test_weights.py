import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from models.gguf_checkpoint import GGUFCheckpoint, config_from_gguf
from models.llama import Llama
from models.safetensors_checkpoint import SafetensorsCheckpoint, config_from_folder
from models.weights import LLAMA_GGUF, LLAMA_HUGGING_FACE, fill

Write = Callable[..., Path]
Tensors = dict[str, np.ndarray]
D, N, K, H, F = 16, 4, 2, 8, 24


def fill_from_gguf(path: Path, *, dtype: str = "float32", scan_layers: bool = False) -> dict[str, jax.Array]:
    checkpoint = GGUFCheckpoint(path)
    config = config_from_gguf(checkpoint)
    empty = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, scan_layers=scan_layers))
    return by_path(fill(empty, checkpoint, LLAMA_GGUF, config))


def by_path(model: Llama) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def placed_by_hand(tensors: Tensors) -> Tensors:
    """Where every number of a GGUF belongs, head by head and pair by pair."""
    placed = {
        "embedding.weight_vd": tensors["token_embd.weight"],
        "norm.weight_d": tensors["output_norm.weight"],
        "head.weight_vd": tensors["output.weight"],
    }
    for i in range(2):
        layer = {name.removeprefix(f"blk.{i}."): array for name, array in tensors.items()}
        placed[f"layers.{i}.attention_norm.weight_d"] = layer["attn_norm.weight"]
        placed[f"layers.{i}.mlp_norm.weight_d"] = layer["ffn_norm.weight"]
        placed[f"layers.{i}.mlp.gate_up_weight_2fd"] = np.stack([layer["ffn_gate.weight"], layer["ffn_up.weight"]])
        placed[f"layers.{i}.mlp.down_weight_df"] = layer["ffn_down.weight"]
        of_heads = {}
        for letter, heads in (("q", N), ("k", K)):
            weight = np.empty((heads, H, D), np.float32)
            for head in range(heads):
                for pair in range(H // 2):
                    rows = layer[f"attn_{letter}.weight"][head * H : (head + 1) * H]
                    weight[head, pair] = rows[2 * pair]
                    weight[head, pair + H // 2] = rows[2 * pair + 1]
            of_heads[letter] = weight
        value = [layer["attn_v.weight"][head * H : (head + 1) * H] for head in range(K)]
        placed[f"layers.{i}.attention.qkv_weight_kghd"] = np.stack(
            [[*of_heads["q"][k * N // K : (k + 1) * N // K], of_heads["k"][k], value[k]] for k in range(K)]
        )
        output = [layer["attn_output.weight"][:, head * H : (head + 1) * H] for head in range(N)]
        placed[f"layers.{i}.attention.o_weight_dnh"] = np.stack(output, axis=1)
    return placed


def test_every_tensor_of_a_gguf_is_in_its_place(write_gguf: Write, gguf_tensors: Tensors) -> None:
    expected = placed_by_hand(gguf_tensors)
    filled = fill_from_gguf(write_gguf())
    assert filled.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(filled[path], array, err_msg=path)


def test_stacked_layers_are_the_separate_ones(write_gguf: Write, gguf_tensors: Tensors) -> None:
    expected = placed_by_hand(gguf_tensors)
    filled = fill_from_gguf(write_gguf(), scan_layers=True)
    assert len(filled) == 3 + 6
    for path, array in filled.items():
        if path.startswith("layers."):
            rest = path.removeprefix("layers.")
            np.testing.assert_array_equal(array, [expected[f"layers.{i}.{rest}"] for i in range(2)], err_msg=path)
        else:
            np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_all_leaves_take_the_dtype(write_gguf: Write, gguf_tensors: Tensors) -> None:
    filled = fill_from_gguf(write_gguf(), dtype="bfloat16")
    assert {leaf.dtype for leaf in filled.values()} == {np.dtype("bfloat16")}
    np.testing.assert_allclose(filled["head.weight_vd"].astype("float32"), gguf_tensors["output.weight"], rtol=2**-8)


def test_a_filled_model_does_not_look_into_the_file(write_gguf: Write, gguf_tensors: Tensors) -> None:
    path = write_gguf()
    filled = fill_from_gguf(path)
    with open(path, "r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    for leaf, array in placed_by_hand(gguf_tensors).items():
        np.testing.assert_array_equal(filled[leaf], array)


def test_missing_and_left_over_tensors_are_listed(write_gguf: Write, gguf_tensors: Tensors) -> None:
    gguf_tensors["blk.0.attn_q.bias"] = np.ones(32, np.float32)
    gguf_tensors["blk.2.ffn_up.weight"] = np.ones((24, 16), np.float32)
    del gguf_tensors["blk.1.ffn_gate.weight"], gguf_tensors["output_norm.weight"]
    message = (
        "tensors missing: blk.1.ffn_gate.weight, output_norm.weight; left over: blk.0.attn_q.bias, blk.2.ffn_up.weight"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill_from_gguf(write_gguf(gguf_tensors))


def test_rotary_frequencies_are_not_left_over(write_gguf: Write, gguf_tensors: Tensors) -> None:
    gguf_tensors["rope_freqs.weight"] = np.ones(4, np.float32)
    fill_from_gguf(write_gguf(gguf_tensors))


def test_a_wrong_shape_is_named(write_gguf: Write, gguf_tensors: Tensors) -> None:
    gguf_tensors["blk.1.attn_k.weight"] = np.ones((32, 16), np.float32)
    message = "tensor blk.1.attn_k.weight: expected shape (16, 16), got (32, 16)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill_from_gguf(write_gguf(gguf_tensors))


@pytest.mark.parametrize("name", ["untied", "tied_llama3"])
def test_a_folders_missing_and_left_over_tensors_are_listed(
    name: str, write_folder: Write, tiny_weights: Callable[[str], Tensors]
) -> None:
    weights = tiny_weights(name)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # a known extra
    weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    del weights["model.layers.1.mlp.up_proj.weight"]
    folder = write_folder(name, weights)
    config = config_from_folder(folder)
    empty = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    message = "tensors missing: model.layers.1.mlp.up_proj.weight; left over: model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill(empty, SafetensorsCheckpoint(folder), LLAMA_HUGGING_FACE, config)
