"""Attention kernels for JAX: FlashAttention and PagedAttention, arrays in, arrays out."""

from .block_mask import BlockMask as BlockMask
from .flash_attention import explain as explain
from .flash_attention import flash_attention as flash_attention
from .flax_attention import flax_attention_fn as flax_attention_fn
from .kv_cache import KVCache as KVCache
from .kv_cache import write_kv as write_kv
from .paged_attention import paged_attention as paged_attention
from .paged_batch import PagedBatch as PagedBatch
