"""How paged decode cuts its work on Hopper GPUs, by the numbers of heads and the head dim."""

from dataclasses import dataclass

from .gpu import GPUS
from .paged_tiles import PageTiles, padded
from .tuned_tables import tuned

TILE = 64  # tokens of a step, the rows of one wgmma
MAX_COLUMNS = 32  # queries of an item: their softmax and output lie in registers
MULTIPROCESSORS = GPUS["h100"].multiprocessors
SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor, of which each of its blocks costs 1 KB
REDUCTION_BYTES = 4096  # shared memory through which the maximum over a tile's tokens goes


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut.

    heads: kv heads of an item. Neighbours in memory, so one TMA brings a page's rows of all of them: with 256 columns
      that is 8 KB for a page of 16 tokens, and a block has to issue one in 300 ns to get its 25 GB/s, the 132nd part
      of an H100's bandwidth.
    whole: tokens up to which a sequence is one item, for each of its groups of kv heads: what must not be merged is not
      written and read again, and in a step whose block tables have room for no more tokens there is no merge.
    chunk: tokens of an item at most in longer sequences, unless one then had more than `splits`. An item writes and
      reads 4 bytes an output element beside 4 bytes of keys and values a token that each query group shares: 512 tokens
      keep that at 3 % for 8 queries a kv head.
    splits: items of a sequence and group of kv heads at most; one sequence alone then fills the multiprocessors.
    stages: tiles of keys, and as many of values, in shared memory. By Little's law an H100 needs 3.35 TB/s * 1 us in
      flight, 25 KB a multiprocessor; at 256 columns two tiles of each are 128 KB while a third is being worked on.
    blocks: thread blocks, one or more a multiprocessor, which share its memory.
    """

    heads: int
    splits: int
    stages: int
    whole: int
    chunk: int
    blocks: int


def default_config(num_kv_heads: int, group: int, head_dim: int) -> DecodeConfig:
    """The fastest that was measured. group: query heads a kv head."""
    return fitting_config(num_kv_heads, group, head_dim, **tuned("paged_decode", padded(head_dim)))


def fitting_config(
    num_kv_heads: int, group: int, head_dim: int, *, width: int, whole: int, chunk: int, items: int, blocks: int
) -> DecodeConfig:
    """As many stages as the shared memory has room for. width: elements of an item's kv heads; items: of a sequence
    over all its kv heads; both at most."""
    columns, row = padded_columns(group), padded(head_dim)
    fits = (d for d in range(num_kv_heads, 0, -1) if num_kv_heads % d == 0)
    heads = next(d for d in fits if d == 1 or (d * row <= width and d * columns <= MAX_COLUMNS))
    tiles = 2 * PageTiles(TILE, 1, TILE, heads, head_dim).bytes
    others = heads * columns * (2 * row + 2 * TILE + 4 * row) + REDUCTION_BYTES + 2048
    room = SHARED_MEMORY // -(-blocks // MULTIPROCESSORS) - 1024
    stages = min((room - others) // tiles, 6)
    return DecodeConfig(heads, max(items * heads // num_kv_heads, 4), stages, whole, chunk, blocks)


def padded_columns(queries: int) -> int:
    """Columns of a kv head's queries: wgmma has them in eights."""
    return -(-queries // 8) * 8
