# pyright: reportMissingImports=false
"""Writes smollm2_greedy.json: what Hugging Face transformers computes in float32 from smollm2-135m's GGUF.

Run by hand, in an environment with torch, transformers and gguf; the test suite needs only the JSON:

    python tests/data/make_smollm2_reference.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

Before it writes anything the script checks that transformers read the file right (every weight against the
`gguf` package's dequantization, rope theta, tied embedding, EOS), that decoding with a KV cache agrees with
one forward pass over the whole text, in float32 and in float64, and that no generated token was won by less
than MIN_MARGIN. All values in the file are those before any sampling filter:

    logit_ids         200 vocabulary ids, the same for all prompts
    prompts           a list of
        name, prompt, prompt_token_ids
        token_ids     48 greedy tokens; EOS does not stop them
        text          their decoding without special tokens
        eos_index     index in token_ids of the first EOS, or null
        margins       for each token, its logit less the second best
        logits        a list of {position, top_ids, top, values}: after prompt_token_ids[position], the ids
                      and values of the 20 best logits, and the values of logit_ids
        logprobs      for some prompts, of the first 16 tokens: {ids, values}, the 5 best log-probabilities
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers

NEW_TOKENS = 48
LOGPROB_TOKENS = 16
MIN_MARGIN = 1e-3  # a token won by less says nothing: two right implementations may differ on it
OUTPUT = Path(__file__).with_name("smollm2_greedy.json")
WITH_EARLIER_LOGITS = {"english", "python", "story"}
WITH_LOGPROBS = {"english", "french", "chat", "emoji"}


def long_table() -> str:
    """A table of more than 600 tokens."""
    rows = [f"| {n} | {n * n} | {'even' if n % 2 == 0 else 'odd'} |" for n in range(1, 61)]
    return "| number | square | parity |\n|---|---|---|\n" + "\n".join(rows) + "\n| 61 |"


def long_story() -> str:
    """A numbered story of more than 1,000 tokens."""
    who = ["the miller", "a young sailor", "the old teacher", "my sister", "the king's cook", "a quiet fox"]
    what = ["found a silver key", "planted an apple tree", "wrote a long letter", "lost the way home"]
    where = [
        "behind the church",
        "near the frozen lake",
        "in the empty market",
        "on the last ship",
        "under a bridge",
    ]
    lines = [
        f"Chapter {n}. On day {n * 3}, {who[n % 6]} {what[n % 4]} {where[n % 5]}, and nobody knew why."
        for n in range(1, 45)
    ]
    return "\n".join(lines) + "\nChapter 45. On the last day,"


PROMPTS = {
    "english": "The capital of France is Paris. The city is best known for",
    "science": "Photosynthesis is the process by which green plants",
    "python": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf(",
    "french": "Il était une fois, dans un petit village près de la forêt, une jeune fille qui",
    "chinese": "今天天气很好，我们一起去公园",  # noqa: RUF001
    "arabic": "مرحبا، كيف حالك اليوم؟ أنا",
    "hindi": "भारत एक विशाल देश है और इसकी राजधानी",
    "digits": "3.14159265358979 and 2718281828 and 1000000007 and 42 and",
    "arithmetic": "12 + 30 = 42\n7 * 8 = 56\n100 - 58 = 42\n81 / 9 =",
    "emoji": "I love my family 👩‍👩‍👧‍👦 and my dog 🐶! Let's celebrate 🎉🎂",
    "newline": "\n",
    "whitespace": "  \t\tname:\tvalue \n\n\n    key :\t 7  \n\t",
    "chat": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the largest planet of the solar system?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "one_token": "Once",
    "table": long_table(),
    "story": long_story(),
}


def build_tokenizer(fields: dict[str, gguf.ReaderField]) -> tokenizers.Tokenizer:
    """The tokenizer from the file's vocabulary and merges; "smollm" is single digits, then GPT-2's rule."""
    if fields["tokenizer.ggml.pre"].contents() != "smollm":
        raise SystemExit(f"expected the pre-tokenizer 'smollm', got {fields['tokenizer.ggml.pre'].contents()!r}")
    words = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    bpe = tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens(
        [word for word, kind in zip(words, types, strict=True) if kind == gguf.TokenType.CONTROL]
    )
    return tokenizer


def load_model(path: Path) -> torch.nn.Module:
    """The float32 model as transformers reads it from the GGUF."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def check_model(model: torch.nn.Module, reader: gguf.GGUFReader) -> None:
    """Compares what transformers loaded with what the file says, bit for bit."""
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    parameters = dict(model.named_parameters())
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.startswith("blk."):
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{names[kind]}.weight"
            if kind in heads:  # GGUF interleaves the halves that rotary embedding turns into each other
                value = value.reshape(heads[kind], -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        else:
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
            }[tensor.name]
        if not np.array_equal(parameters.pop(name).detach().numpy(), value):
            raise SystemExit(f"{name}: transformers' weight differs from the file's")
    facts = {
        "parameters left": sorted(parameters) == [],
        "tied embedding": model.lm_head.weight is model.model.embed_tokens.weight,
        "rope theta": _rope_theta(config) == reader.fields["llama.rope.freq_base"].contents(),
        "rms norm epsilon": config.rms_norm_eps == reader.fields["llama.attention.layer_norm_rms_epsilon"].contents(),
        "eos": config.eos_token_id == reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2,
        "float32": all(p.dtype == torch.float32 for p in model.parameters()),
    }
    if wrong := [fact for fact, holds in facts.items() if not holds]:
        raise SystemExit(f"transformers read the file wrong: {wrong}")


def _rope_theta(config: Any) -> float:
    """Where transformers 5 keeps it, or else 4."""
    return config.rope_parameters["rope_theta"] if hasattr(config, "rope_parameters") else config.rope_theta


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Decodes with a KV cache. Returns the prompt's logits, those each new token came from, and the tokens."""
    out = model(torch.tensor([prompt]), use_cache=True)
    prompt_logits, step_logits, tokens = out.logits[0], [], []
    for _ in range(NEW_TOKENS):
        step_logits.append(out.logits[0, -1])
        tokens.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return prompt_logits, torch.stack(step_logits), tokens


def rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 4) for v in values.tolist()]


def distance(model: torch.nn.Module, prompt: list[int], tokens: list[int], step_logits: torch.Tensor) -> float:
    """How far one forward pass over the whole text lies from decoding. Exits where it chooses other tokens."""
    logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    if logits.argmax(1).tolist() != tokens:
        raise SystemExit(f"{prompt[:8]}...: one pass in {logits.dtype} chooses other tokens than decoding does")
    return float((logits - step_logits).abs().max())


def logits_at(position: int, prompt_logits: torch.Tensor, logit_ids: torch.Tensor) -> dict[str, Any]:
    logits = prompt_logits[position]
    top = logits.topk(20)
    return {
        "position": position,
        "top_ids": top.indices.tolist(),
        "top": rounded(top.values),
        "values": rounded(logits[logit_ids]),
    }


def describe(
    name: str,
    tokenizer: tokenizers.Tokenizer,
    model: torch.nn.Module,
    exact: torch.nn.Module,
    logit_ids: torch.Tensor,
) -> dict[str, Any]:
    """One prompt's entry of the file; prints its least margin and how far float64 is."""
    prompt = tokenizer.encode(PROMPTS[name]).ids
    prompt_logits, step_logits, tokens = greedy(model, prompt)
    distance(model, prompt, tokens, step_logits)
    error = distance(exact, prompt, tokens, step_logits)
    best, second = step_logits.topk(2).values.T
    margins = best - second
    text = tokenizer.decode(tokens)
    print(f"{name:12} {len(prompt):5} tokens  least margin {margins.min():.4f}  float64 {error:.1e} off  {text!r}")
    if margins.min() < MIN_MARGIN:
        raise SystemExit(f"{name}: a margin of {margins.min():.1e} is a tie, choose another prompt")

    last = len(prompt) - 1
    earlier = [0, last // 4, last // 2, last * 3 // 4] if name in WITH_EARLIER_LOGITS else []
    eos = model.config.eos_token_id
    entry = {
        "name": name,
        "prompt": PROMPTS[name],
        "prompt_token_ids": prompt,
        "token_ids": tokens,
        "text": text,
        "eos_index": tokens.index(eos) if eos in tokens else None,
        "margins": rounded(margins),
        "logits": [logits_at(position, prompt_logits, logit_ids) for position in [*earlier, last]],
    }
    if name in WITH_LOGPROBS:
        tops = [row.log_softmax(-1).topk(5) for row in step_logits[:LOGPROB_TOKENS]]
        entry["logprobs"] = [{"ids": top.indices.tolist(), "values": rounded(top.values)} for top in tops]
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes smollm2_greedy.json from a GGUF of smollm2-135m.")
    parser.add_argument("gguf_path", type=Path)
    path = parser.parse_args().gguf_path
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    reader = gguf.GGUFReader(path)
    tokenizer = build_tokenizer(reader.fields)
    model = load_model(path)
    check_model(model, reader)
    exact = load_model(path).double()
    # NumPy's legacy generator, whose stream never changes.
    logit_ids = np.sort(np.random.RandomState(0).choice(model.config.vocab_size, 200, replace=False))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"}
    document = {
        "made_with": versions,
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "logit_ids": logit_ids.tolist(),
        "prompts": [describe(name, tokenizer, model, exact, torch.from_numpy(logit_ids)) for name in PROMPTS],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    OUTPUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
