"""PyTorch's attention backends on the GPU, for `attention_gpu.py`.

Reads problems as JSON from standard input and writes seconds, a JSON object a line, to standard output; what a backend
cannot do is left out.
"""

# pyright: reportMissingImports=false

import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"PyTorch flash": SDPBackend.FLASH_ATTENTION, "PyTorch cuDNN": SDPBackend.CUDNN_ATTENTION}
CALLS, REPEATS = 10, 5


def seconds(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPEATS + 1):
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(times[1:])


def main() -> None:
    for number, problem in enumerate(json.load(sys.stdin)):
        batch, length, heads, head_dim = problem["shape"]
        query, key, value, cotangent = (
            torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        for tensor in (query, key, value):
            tensor.requires_grad_()
        for name, backend in BACKENDS.items():
            with sdpa_kernel(backend):

                def forward(query=query, key=key, value=value, causal=problem["causal"]):
                    return scaled_dot_product_attention(query, key, value, is_causal=causal)

                def both(forward=forward, inputs=(query, key, value), cotangent=cotangent):
                    torch.autograd.grad(forward(), inputs, cotangent)

                try:
                    line = {"problem": number, "name": name, "forward": seconds(forward), "both": None}
                    if problem["backward"]:
                        line["both"] = seconds(both)
                except RuntimeError as error:
                    print(f"{name}, {problem}: {error}", file=sys.stderr)
                    continue
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
