"""Whole programs compiled for GPUs that are not here: memory, communication, and the same code twice."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, explain, flash_attention
from pallas_kernels.gpu import GPUS


def gradients(attention):
    """Forward and backward, by query, key and value."""

    def run(query, key, value):
        return jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    return run


def array(*shape: int, dtype=jnp.bfloat16, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_mosaic_serves_on_hopper(gpu: str):
    chosen = []

    def trace(query):
        chosen.append(explain(query, query, query).implementation)

    with jax.set_mesh(aot.mesh(gpu)):
        jax.eval_shape(trace, array(1, 512, 2, 64))
    assert chosen == ["mosaic"]


def test_memory_is_at_most_two_percent_of_the_plain_formula():
    one_head = [array(1, 16384, 1, 64)] * 3
    ours = aot.compile(gradients(partial(flash_attention, implementation="mosaic")), *one_head)
    with jax.numpy_dtype_promotion("standard"):
        plain = aot.compile(gradients(partial(jax.nn.dot_product_attention, implementation="xla")), *one_head)
    assert plain.memory.temp_size_in_bytes > 16384**2
    assert ours.memory.temp_size_in_bytes <= 0.02 * plain.memory.temp_size_in_bytes


def test_a_long_sequence_fits():
    report = aot.compile(
        gradients(partial(flash_attention, is_causal=True, implementation="mosaic")),
        *[array(1, 131072, 32, 128), array(1, 131072, 8, 128), array(1, 131072, 8, 128)],
    )
    memory = report.memory
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < arrays
    assert arrays + memory.temp_size_in_bytes < GPUS["h100"].memory
    assert report.faults({"flash_backward_dk_dv_dq": 4}) == []  # dV and dK, where dS is handed over


def test_the_same_function_gives_the_same_code():
    attention = partial(flash_attention, is_causal=True, implementation="mosaic")
    texts = []
    for _ in range(2):
        jax.clear_caches()
        report = aot.compile(gradients(attention), *[array(1, 500, 2, 64)] * 3)
        texts.append([kernel.sass.text for kernel in report.kernels])
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_eight_gpus_add_up_once():
    """Each of eight GPUs has an eighth of the heads, and a product with its rows of a matrix is summed over all."""
    mesh = aot.mesh("h100", (8,), ("tensor",))
    spec = jax.P(None, None, "tensor", None)
    heads = array(1, 512, 16, 64, sharding=jax.NamedSharding(mesh, spec))
    matrix = array(16, 64, 256, sharding=jax.NamedSharding(mesh, jax.P("tensor")))

    def local(heads, matrix):
        out = flash_attention(heads, heads, heads, implementation="mosaic")
        return jax.lax.psum(jnp.einsum("btnh,nhd->btd", out, matrix), "tensor")

    block = jax.shard_map(local, in_specs=(spec, jax.P("tensor")), out_specs=jax.P(), check_vma=False)
    report = aot.compile(block, heads, matrix, devices=mesh)
    assert report.collectives() == {"all-reduce": 1}
    assert len(report.kernels) == 1
    assert report.memory.argument_size_in_bytes == (512 * 16 * 64 + 16 * 64 * 256) * 2 / 8


def test_copies_are_counted():
    cache, row = array(64, 256, dtype=jnp.float32), array(256, dtype=jnp.float32)

    def put(cache, row):
        return cache.at[3].set(row)

    kept = aot.compile(put, cache, row)
    donated = aot.compile(jax.jit(put, donate_argnums=0), cache, row)
    assert (kept.copies(cache.shape), kept.memory.alias_size_in_bytes) == (1, 0)
    assert (donated.copies(cache.shape), donated.memory.alias_size_in_bytes) == (0, 64 * 256 * 4)


def test_unknown_gpu():
    with pytest.raises(ValueError, match="gpu: expected one of h100, h200, b200, got 'a100'"):
        aot.compile(jnp.sin, array(3), gpu="a100")


def test_a_mesh_of_another_gpu():
    with pytest.raises(ValueError, match="devices: expected NVIDIA H100 80GB HBM3, got NVIDIA H200"):
        aot.compile(jnp.sin, array(3), gpu="h100", devices=aot.mesh("h200"))


def test_blackwell_compiles_what_is_not_for_hopper():
    report = aot.compile(lambda x: x @ x, array(256, 256), gpu="b200")
    assert report.kernels == ()
    assert report.memory.output_size_in_bytes == 256 * 256 * 2
