"""Attention kernels for JAX: FlashAttention and PagedAttention, arrays in, arrays out."""

from .block_mask import BlockMask as BlockMask
from .copy_blocks import copy_blocks as copy_blocks
from .copy_blocks import gather_blocks as gather_blocks
from .copy_blocks import scatter_blocks as scatter_blocks
from .flash_attention import explain as explain
from .flash_attention import flash_attention as flash_attention
from .flax_attention import flax_attention_fn as flax_attention_fn
from .host_pool import HostPool as HostPool
from .kv_cache import KVCache as KVCache
from .kv_head_sharding import kv_head_sharding as kv_head_sharding
from .paged_attention import paged_attention as paged_attention
from .paged_batch import PagedBatch as PagedBatch
from .rotary import rotate as rotate
from .write_kv import rotate_and_write_kv as rotate_and_write_kv
from .write_kv import write_kv as write_kv
