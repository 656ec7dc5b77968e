import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from models.gguf_checkpoint import GGUFCheckpoint
from models.tokenizer import Tokenizer

DATA = Path(__file__).with_name("data")
REFERENCE: dict[str, Any] = json.loads((DATA / "tokenizer_reference.json").read_text(encoding="utf-8"))
TEXTS: list[str] = REFERENCE["texts"]


@pytest.fixture(scope="module")
def smollm2_fields(smollm2_path: Path) -> dict[str, Any]:
    return GGUFCheckpoint(smollm2_path).fields


@pytest.fixture(scope="module")
def smollm2(smollm2_fields: dict[str, Any]) -> Tokenizer:
    return from_gguf(smollm2_fields)


@pytest.fixture(scope="module")
def sentence_piece() -> Tokenizer:
    return from_gguf(REFERENCE["spm_fields"])


def from_gguf(fields: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_gguf(fields)
    assert tokenizer is not None
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    stream = tokenizer.stream(**options)
    return [stream.add(i) for i in ids]


@pytest.mark.parametrize("pre", REFERENCE["ids"])
def test_byte_level_tokens_are_llama_cpps(smollm2_fields: dict[str, Any], pre: str) -> None:
    """The same vocabulary split by several models' rules (data/make_tokenizer_reference.py)."""
    tokenizer = from_gguf(smollm2_fields | {"tokenizer.ggml.pre": pre})
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == REFERENCE["ids"][pre]


def test_sentence_piece_tokens_are_llama_cpps(sentence_piece: Tokenizer) -> None:
    assert [sentence_piece.encode(text) for text in REFERENCE["spm_texts"]] == REFERENCE["spm_ids"]


def test_what_smollm2_calls_its_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token, smollm2.bos_token_id) == ("<|im_start|>", 1)
    assert (smollm2.eos_token, smollm2.eos_token_ids) == ("<|im_end|>", (2,))
    assert smollm2.encode("a<|im_end|>") == [*smollm2.encode("a"), 2]
    assert smollm2.decode([1, *smollm2.encode("a"), 2]) == "a"
    assert smollm2.decode([1, 2], skip_special_tokens=False) == "<|im_start|><|im_end|>"


def test_smollm2_chat(smollm2: Tokenizer) -> None:
    text = smollm2.chat([{"role": "user", "content": "Hi"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.chat([{"role": "system", "content": "x"}], add_generation_prompt=False) == (
        "<|im_start|>system\nx<|im_end|>\n"
    )
    assert smollm2.encode(text, add_special_tokens=False)[0] == 1


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_survive_the_round_trip(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert "".join(streamed(smollm2, ids, skip_special_tokens=False)) == text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(
        st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd"), max_size=30
    )
)
def test_any_text_survives_the_stream(smollm2: Tokenizer, text: str) -> None:
    # The vocabulary lacks the bytes of some control characters and of planes past the third.
    ids = smollm2.encode(text)
    pieces = streamed(smollm2, ids, skip_special_tokens=False)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("helowrd  ▁é😀x"), max_size=20))
def test_any_text_survives_the_sentence_piece_stream(sentence_piece: Tokenizer, text: str) -> None:
    ids = sentence_piece.encode(text)
    assert "".join(streamed(sentence_piece, ids)) == text.replace("▁", " ")


def test_an_emoji_comes_whole(smollm2: Tokenizer, sentence_piece: Tokenizer) -> None:
    for tokenizer in (smollm2, sentence_piece):
        ids = tokenizer.encode("hello😀", add_special_tokens=False)
        pieces = streamed(tokenizer, ids)
        assert len(ids) > 2
        assert pieces[0] == "hello"
        assert pieces[-1] == "😀"
        assert set(pieces[1:-1]) <= {""}
        # Cut short, it never shows.
        assert "".join(streamed(tokenizer, ids[:-1])) == "hello"


def test_the_first_space_goes_and_the_others_stay(sentence_piece: Tokenizer) -> None:
    token_id = REFERENCE["spm_fields"]["tokenizer.ggml.tokens"].index
    ids = [1, token_id("▁hello"), token_id("▁world"), 2, token_id("▁hello")]
    assert streamed(sentence_piece, ids) == ["", "hello", " world", "", " hello"]
    assert sentence_piece.decode(ids) == "hello world hello"


def test_a_stream_outlives_bytes_that_are_no_text(sentence_piece: Tokenizer) -> None:
    token_id = REFERENCE["spm_fields"]["tokenizer.ggml.tokens"].index
    ids = [token_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x82, 0xAC, 0xFF)]
    pieces = streamed(sentence_piece, [*ids, token_id("he"), token_id("ll")])
    assert pieces[:4] == ["", "", "€", ""]
    assert pieces[4].endswith("he")
    assert pieces[5] == "ll"


def test_what_is_put_around_a_text(smollm2_fields: dict[str, Any]) -> None:
    def around(fields: dict[str, Any], **changes: Any) -> list[int]:
        fields = fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        plain, full = (from_gguf(fields).encode("hello", add_special_tokens=add) for add in (False, True))
        return [i for i in full if i not in plain]

    spm = REFERENCE["spm_fields"]
    assert around(spm) == [1]
    assert around(spm, add_bos_token=False) == []
    assert around(spm, add_eos_token=True) == [1, 2]
    assert around(smollm2_fields) == []
    assert around(smollm2_fields, add_bos_token=True) == [1]
    # Llama 3's files leave it out and mean it.
    without = {name: value for name, value in smollm2_fields.items() if not name.endswith("add_bos_token")}
    assert around(without) == []
    assert around(without, pre="llama-bpe") == [1]


def test_ids_past_the_vocabulary_are_no_text(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a b")
    assert smollm2.decode([ids[0], 60000, *ids[1:]]) == "a b"
    assert streamed(smollm2, [ids[0], 60000, *ids[1:]]) == ["a", "", " b"]


def test_a_model_without_template_does_not_chat(sentence_piece: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected a model with a chat template, this one has none"):
        sentence_piece.chat([{"role": "user", "content": "Hi"}])


def test_a_gguf_without_tokenizer() -> None:
    assert Tokenizer.from_gguf({"general.architecture": "llama"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: expected gpt2 or llama, got 'bert'"),
        ({"tokens": None}, "tokenizer.ggml.tokens: expected an array, got None"),
        ({"scores": None}, "tokenizer.ggml.scores: expected an array, got None"),
        ({"scores": [0.0]}, r"tokenizer.ggml.scores: expected \d+ \(one for each token\), got 1"),
        ({"token_type": [1]}, r"tokenizer.ggml.token_type: expected \d+ \(one for each token\), got 1"),
        ({"bos_token_id": None}, "add_bos_token: expected bos_token_id, found none"),
        ({"eos_token_id": 10**6}, r"tokenizer.ggml.eos_token_id: expected 0 to \d+, got 1000000"),
        ({"model": "gpt2", "pre": "x"}, "tokenizer.ggml.pre: expected one of gpt-2, .*, got 'x'"),
        ({"model": "gpt2"}, "tokenizer.ggml.pre: expected one of .*, got None"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["zz yy"]}, "tokenizer.ggml.merges: "),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["one"]}, "tokenizer.ggml.merges: "),
    ],
)
def test_what_is_wrong_with_a_gguf_is_named(change: dict[str, Any], message: str) -> None:
    fields = REFERENCE["spm_fields"] | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(fields)


@pytest.fixture
def write_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder with a tokenizer of bytes and one merge, and the JSON files given by name."""

    def write(**files: Any) -> Path:
        vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {"ab": 256}, [("a", "b")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "</s>", "<end>"])
        backend.enable_truncation(3)
        backend.enable_padding(length=9)
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_folder(write_tokenizer: Callable[..., Path]) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": "one"}
    folder = write_tokenizer(tokenizer_config=config, generation_config={"eos_token_id": [258, 259]})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token) == (257, "</s>")
    assert tokenizer.eos_token_ids == (258, 259)
    assert tokenizer.vocab_size == 260
    # Neither padded nor cut, whatever the file was saved with.
    assert tokenizer.decode(tokenizer.encode("abababab<end>é"), skip_special_tokens=False) == "abababab<end>é"
    assert tokenizer.encode("ab<end>") == [256, 259]
    assert tokenizer.chat([{"role": "user", "content": ""}]) == "one"


def test_chat_templates_of_a_folder(write_tokenizer: Callable[..., Path]) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write_tokenizer(tokenizer_config={"chat_template": templates})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    assert tokenizer.chat_template == "plain"
    (folder / "chat_template.jinja").write_text("own file: {{ bos_token }}é", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    assert tokenizer.chat([{"role": "user", "content": ""}]) == "own file: é"


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"expected tokenizer.json, found only tokenizer.model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer: "):
        Tokenizer.from_folder(tmp_path)
