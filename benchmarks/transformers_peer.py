# pyright: reportMissingImports=false
"""The peer's process of vs_transformers.py: Hugging Face transformers on the CPU, one JSON line a command.

Needs torch, transformers and gguf, nothing of jpaged. Says {"versions": {...}} once it has loaded; answers each
line {"prompts": [[token id, ...], ...], "max_tokens": n} with {"seconds": s, "token_ids": [[...], ...]}.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers


def generate(model: torch.nn.Module, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of one padded static batch: every row runs for all of max_tokens."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, use_cache=True)
    return out[:, longest:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf_path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.gguf_path.parent, gguf_file=args.gguf_path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    model.generation_config.pad_token_id = 0
    print(json.dumps({"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        token_ids = generate(model, request["prompts"], request["max_tokens"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), flush=True)


if __name__ == "__main__":
    main()
