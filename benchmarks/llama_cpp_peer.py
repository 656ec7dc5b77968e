# pyright: reportMissingImports=false
"""llama.cpp as a peer of vs_transformers.py: weights and KV cache in float32. Speaks as transformers_peer.py does.

Needs llama-cpp-python and gguf. Quantized weights are written out as float32 first, to a temporary file.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np


def write_float32(source: Path, target: Path) -> None:
    """Copy a GGUF, its tensors dequantized."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """One run's sequences, decoded together, a step at a time."""

    def __init__(self, model: llama_cpp.llama_model_p, num_seqs: int, length: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        length += -length % 256  # llama.cpp rounds up to this
        params.n_ctx, params.n_seq_max = num_seqs * length, num_seqs
        params.n_batch = params.n_ubatch = num_seqs * length
        # Its flash attention rounds to float16: enough to change tokens.
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp could not make a context")
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(self, sequences: list[list[int]], start: list[int]) -> list[int]:
        """Decode each sequence's new tokens from its start on; returns the likeliest next token of each."""
        batch, n, last = self._batch, 0, []
        for seq_id, (tokens, first) in enumerate(zip(sequences, start, strict=True)):
            for i, token in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, first + i, 1, seq_id
                batch.logits[n] = i == len(tokens) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if error := llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode returned {error}")
        rows = (llama_cpp.llama_get_logits_ith(self._context, i) for i in last)
        return [int(np.ctypeslib.as_array(row, (self._vocab_size,)).argmax()) for row in rows]

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


def generate(context: Context, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens; nothing ends a sequence early."""
    new, lengths = prompts, [0] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        chosen = context.step(new, lengths)
        lengths = [length + len(tokens) for length, tokens in zip(lengths, new, strict=True)]
        new = [[token] for token in chosen]
        for output, token in zip(outputs, chosen, strict=True):
            output.append(token)
    return outputs


@llama_cpp.llama_log_callback
def no_log(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log, which is long."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf_path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    llama_cpp.llama_log_set(no_log, None)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float32.gguf")
        write_float32(args.gguf_path, path)
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit("llama.cpp could not load the model")
    print(json.dumps({"versions": {"llama-cpp-python": llama_cpp.__version__}}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts, max_tokens = request["prompts"], request["max_tokens"]
        context = Context(model, len(prompts), max(map(len, prompts)) + max_tokens, args.threads)
        start = time.perf_counter()
        token_ids = generate(context, prompts, max_tokens)
        seconds = time.perf_counter() - start
        context.close()
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), flush=True)


if __name__ == "__main__":
    main()
