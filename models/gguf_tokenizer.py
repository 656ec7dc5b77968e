"""The pipeline that a GGUF's metadata describes: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

# Llama 3's and Qwen 2's tokenizer.json differ in how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "default": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Returns the pipeline for `tokenizer.ggml.*`; raises ValueError for one missing or unknown."""
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    kind = fields.get("tokenizer.ggml.model")
    if kind not in kinds:
        raise ValueError(f"tokenizer.ggml.model: expected {' or '.join(kinds)}, got {kind!r}")
    tokens, types = _field(fields, "tokens"), _field(fields, "token_type")
    if len(tokens) != len(types):
        raise ValueError(f"tokenizer.ggml.token_type: expected {len(tokens)} (one for each token), got {len(types)}")
    tokenizer = kinds[kind](fields, tokens, types)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    return tokenizer


def _byte_level(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre: expected one of {', '.join(_PRE_TOKENIZERS)}, got {pre!r}")
    merges = [tuple(merge.split(" ")) for merge in _field(fields, "merges")]
    tokenizer = _bpe(tokens, merges, ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    _add_bos_and_eos(tokenizer, fields, add_bos=pre == "llama-bpe")
    return tokenizer


def _sentence_piece(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    tokenizer = _bpe(
        tokens,
        _merges_from_scores(tokens, types, _field(fields, "scores")),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    add_space = fields.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = [normalizers.Prepend("▁")] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(" ", "▁")])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)] if add_space else decoder)
    _add_bos_and_eos(tokenizer, fields, add_bos=True)
    return tokenizer


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that join into a third, the best third first: SentencePiece's order."""
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores: expected {len(tokens)} (one for each token), got {len(scores)}")
    mergeable = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (_NORMAL, _UNUSED)
    }
    merges = []
    for token, i in mergeable.items():
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in mergeable and right in mergeable]
        pairs.sort(key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))
        merges += [(-scores[i], pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def _bpe(tokens: list[str], merges: list, **options: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges, **options))
    except Exception as error:  # tokenizers raises no narrower one, as for a merge of unknown tokens
        raise ValueError(f"tokenizer.ggml.merges: {error}") from None


def _add_bos_and_eos(tokenizer: Tokenizer, fields: Mapping[str, Any], *, add_bos: bool) -> None:
    template, ids = ["$A"], []
    for kind, wanted, position in (("bos", add_bos, 0), ("eos", False, 2)):
        if fields.get(f"tokenizer.ggml.add_{kind}_token", wanted):
            token = special_token(fields, kind)
            if token is None:
                raise ValueError(f"tokenizer.ggml: add_{kind}_token: expected {kind}_token_id, found none")
            template.insert(position, token)
            ids.append((token, tokenizer.token_to_id(token)))
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def special_token(fields: Mapping[str, Any], kind: str) -> str | None:
    """Returns the text of the token `tokenizer.ggml.{kind}_token_id`, or None where there is none."""
    i = fields.get(f"tokenizer.ggml.{kind}_token_id")
    if i is None:
        return None
    tokens = _field(fields, "tokens")
    if not 0 <= i < len(tokens):
        raise ValueError(f"tokenizer.ggml.{kind}_token_id: expected 0 to {len(tokens) - 1}, got {i}")
    return tokens[i]


def _field(fields: Mapping[str, Any], name: str) -> list:
    value = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise ValueError(f"tokenizer.ggml.{name}: expected an array, got {value!r}")
    return value
