"""Attention kernels for JAX: FlashAttention and PagedAttention, arrays in, arrays out."""

from .flash_attention import flash_attention as flash_attention
from .kv_cache import KVCache as KVCache
from .kv_cache import write_kv as write_kv
from .paged_attention import paged_attention as paged_attention
from .paged_batch import PagedBatch as PagedBatch
