"""What prefix caching saves: 32 prompts that share 512 tokens, with it and without, and nothing to share, with it.

    python benchmarks/prefix_caching.py --model smollm2-135m [--repeats 3]

All three ways take turns in one run on warm engines (every shape compiled before); reported are medians. Before each
turn the engine's cache is emptied by serving prompts that share nothing with what follows, so that the first of the 32
prompts computes what the others find.
"""

import argparse
import time
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from jpaged import LLM, SamplingParams

NUM_PROMPTS = 32
NUM_SHARED = 512
NUM_OWN = 32
NUM_GENERATED = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_GENERATED, ignore_eos=True)


def prompts(random: np.random.Generator, vocab_size: int, num_shared: int) -> list[list[int]]:
    """NUM_PROMPTS of NUM_SHARED + NUM_OWN random tokens, the first `num_shared` of them alike."""
    head = random.integers(0, vocab_size, num_shared)
    tails = random.integers(0, vocab_size, (NUM_PROMPTS, NUM_SHARED + NUM_OWN - num_shared))
    return [[*head.tolist(), *tail.tolist()] for tail in tails]


def timed(llm: LLM, batch: list[list[int]]) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds, and what was said."""
    start = time.perf_counter()
    outputs = llm.generate(batch, GREEDY, progress=False)
    return time.perf_counter() - start, [output.outputs[0].token_ids for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=16)
    options = parser.parse_args()

    blocks_each = -(-(NUM_SHARED + NUM_OWN + NUM_GENERATED) // options.block_size)
    sizes = {
        "max_num_seqs": NUM_PROMPTS,
        "max_model_len": NUM_SHARED + NUM_OWN + NUM_GENERATED,
        "num_blocks": NUM_PROMPTS * blocks_each,
        "block_size": options.block_size,
    }
    caching = LLM(options.model, **sizes)
    plain = LLM(options.model, enable_prefix_caching=False, **sizes)
    vocab_size = 49152 if caching.tokenizer is None else caching.tokenizer.vocab_size
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"shared, with": [], "shared, without": [], "nothing shared, with": []}
    for turn in range(options.repeats + 1):  # the first compiles
        shared, own = (prompts(random, vocab_size, num_shared) for num_shared in (NUM_SHARED, 0))
        with_cache, said = timed(caching, shared)
        without, said_without = timed(plain, shared)
        nothing, _ = timed(caching, own)
        if said != said_without:
            raise SystemExit("answers differ with prefix caching and without it")
        if turn:
            for way, took in zip(seconds, (with_cache, without, nothing), strict=True):
                seconds[way].append(took)

    stats = caching.stats()
    table = Table(title=f"{NUM_PROMPTS} prompts of {NUM_SHARED + NUM_OWN} tokens, {NUM_GENERATED} generated each")
    for column in ("512 tokens shared, prefix caching", "seconds", "of the time without"):
        table.add_column(column)
    for way, took in seconds.items():
        table.add_row(way, f"{median(took):.2f}", f"{median(took) / median(seconds['shared, without']):.2f}")
    Console().print(table)
    print(f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} prompt tokens were found in the cache")


if __name__ == "__main__":
    main()
