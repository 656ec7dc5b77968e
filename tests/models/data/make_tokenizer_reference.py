# pyright: reportMissingImports=false
"""Writes tokenizer_reference.json: how llama.cpp splits texts into the tokens of a GGUF's vocabulary.

Run by hand, in an environment with llama-cpp-python and gguf; the test suite needs only the JSON:

    python tests/models/data/make_tokenizer_reference.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

smollm2-135m's vocabulary is split by its own pre-tokenizer and by those of other models, each written into a
file without weights; a small SentencePiece vocabulary, kept in the JSON, stands for that kind.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

OUTPUT = Path(__file__).with_name("tokenizer_reference.json")
PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2", "gpt-2")
TEXTS = [
    "Hello world",
    " leading and trailing ",
    "I'm sure they'll say we've won, DON'T THEY'RE?",
    "1234567 and 3.14159 in 2024, x1y22z333",
    "def f(x):\n    if x > 0:\n\treturn x ** 2  # square\n\n\nprint(f(10))\r\n",
    "今天天气很好, 123 元. こんにちは 안녕하세요",
    "Ünïcödé naïve façade Straße",
    "भारत एक विशाल देश है",
    "مرحبا كيف حالك؟ ١٢٣",
    "👩‍👩‍👧‍👦 family 🐶🎉 and ½ ² Ⅷ",
    "a\u00a0b\u2003c\u200bd   e \n  \n f\t\t",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "https://example.com/a_b?c=d&e=%20#frag!!! ---- ...",
    "",
    "\n",
]
SPM_TEXTS = ["hello world", "hello", " hello  world", "low lower lowest", "wé 😀 x\nhe</s>hello", "", "▁he world"]
SPM_WORDS = ["he", "ll", "hell", "▁hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "lo", "▁low"]
SPM_WORDS += ["er", "▁lower", "es", "st", "est", "▁▁", "lowe", "wer", "▁lowe"]
SPM_LETTERS = list("▁helowrdst")


def spm_fields() -> dict[str, Any]:
    """A SentencePiece vocabulary: control tokens, bytes, words (the earlier, the better), letters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_WORDS, *SPM_LETTERS]
    num_plain = len(SPM_WORDS) + len(SPM_LETTERS)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(num_plain)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * num_plain,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write(path: Path, fields: dict[str, Any]) -> None:
    """Writes a GGUF with a vocabulary and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def tokenize(fields: dict[str, Any], texts: list[str], *, add_special: bool = False) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write(path, fields)
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return [model.tokenize(text.encode(), add_bos=add_special, special=True) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes tokenizer_reference.json.")
    parser.add_argument("gguf_path", type=Path)
    reader = gguf.GGUFReader(parser.parse_args().gguf_path)
    names = [name for name in reader.fields if name.startswith("tokenizer.ggml.")]
    fields = {name: reader.fields[name].contents() for name in names}
    spm = spm_fields()
    document = {
        "made_with": {"llama-cpp-python": llama_cpp.__version__},
        "texts": TEXTS,
        "ids": {pre: tokenize(fields | {"tokenizer.ggml.pre": pre}, TEXTS) for pre in PRE_TOKENIZERS},
        "spm_fields": spm,
        "spm_texts": SPM_TEXTS,
        "spm_ids": tokenize(spm, SPM_TEXTS, add_special=True),
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    OUTPUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
