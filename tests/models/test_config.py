import dataclasses
from typing import Any

import numpy as np
import pytest

from models.config import LlamaConfig, llama3_rope_factors

CONFIG = LlamaConfig(
    vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32, max_len=128
)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size: expected a positive integer, got 0"),
        ("d_model", 16.0, "d_model: expected a positive integer, got 16.0"),
        ("num_layers", True, "num_layers: expected a positive integer, got True"),
        ("num_kv_heads", 3, r"num_kv_heads: expected a divisor of num_heads \(4\), got 3"),
        ("head_dim", 5, "head_dim: expected an even number .*, got 5"),
        ("rope_theta", -1.0, "rope_theta: expected a positive number, got -1.0"),
        ("norm_eps", float("inf"), "norm_eps: expected a positive number, got inf"),
        ("rope_factors", (1.0,), r"rope_factors: expected 2 \(half of head_dim\), got 1"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_config_is_a_key() -> None:
    assert {CONFIG: 1}[dataclasses.replace(CONFIG)] == 1


def test_llama3_factors_need_a_band_to_blend_in() -> None:
    with pytest.raises(ValueError, match=r"high_freq_factor: expected more than low_freq_factor \(2.0\), got 2.0"):
        llama3_rope_factors(8, 1e4, factor=8.0, low_freq_factor=2.0, high_freq_factor=2.0, original_max_len=512)


def test_llama3_factors_are_those_of_the_wavelengths() -> None:
    """Llama 3.1's own numbers, by the formula as the paper's authors wrote it: over wavelengths."""
    head_dim, theta, factor, low, high, old_len = 128, 500000.0, 8.0, 1.0, 4.0, 8192
    factors = llama3_rope_factors(
        head_dim, theta, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_len=old_len
    )
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < old_len / high:
            scaled.append(frequency)
        elif wavelength > old_len / low:
            scaled.append(frequency / factor)
        else:
            smooth = (old_len / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    np.testing.assert_allclose(frequencies / np.array(factors), scaled, rtol=1e-12)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert any(1 < value < 8 for value in factors)
