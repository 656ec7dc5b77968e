"""transformers' continuous batching on a GPU with random weights, for `engine_gpu.py`.

Reads a Llama configuration, prompts of token ids and the number of new tokens as JSON from standard input, and writes
tokens/s of all requests, prefills included, as JSON to the last line of standard output. The first run warms up.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import os
import sys
import time

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def main() -> None:
    given = json.load(sys.stdin)
    config = LlamaConfig(**given["config"], eos_token_id=None, bos_token_id=None)
    config._attn_implementation = "paged|sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    generation = GenerationConfig(max_new_tokens=given["new"], do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = given["prompts"]
    rates = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=generation, persistent_manager=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        generated = sum(len(output.generated_tokens) for output in outputs.values())
        if generated != len(prompts) * given["new"]:
            raise SystemExit(f"expected {len(prompts) * given['new']} new tokens, got {generated}")
        rates.append(generated / seconds)
    print(json.dumps({"tokens_per_second": rates[-1]}), flush=True)
    os._exit(0)  # the manager's thread goes on waiting for requests


if __name__ == "__main__":
    main()
