"""Text to token ids and back, whole or as a stream, and conversations to text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .chat_template import render_chat
from .gguf_checkpoint import eos_token_ids_from_gguf
from .gguf_tokenizer import special_token, tokenizer_from_gguf
from .safetensors_checkpoint import eos_token_ids_from_json, read_json


class Tokenizer:
    """A model's tokenizer with its special tokens and its chat template.

    `eos_token_ids` are the tokens that end a text: `eos_token` and what the checkpoint names besides.

    >>> vocabulary = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    >>> tokenizer = Tokenizer(tokenizers.Tokenizer(vocabulary), chat_template="{{ messages[0].content }}")
    >>> tokenizer.encode("aba"), tokenizer.chat([{"role": "user", "content": "ab"}])
    ([2, 0], 'ab')
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        own = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_token_ids = tuple(dict.fromkeys([*([] if own is None else [own]), *eos_token_ids]))
        self.chat_template = chat_template

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer | None":
        """Returns the tokenizer in a GGUF's metadata, or None where there is none.

        Raises ValueError that names the known kinds when `tokenizer.ggml.model` or `.pre` is another.
        """
        if "tokenizer.ggml.model" not in fields:
            return None
        return cls(
            tokenizer_from_gguf(fields),
            bos_token=special_token(fields, "bos"),
            eos_token=special_token(fields, "eos"),
            eos_token_ids=eos_token_ids_from_gguf(fields),
            chat_template=fields.get("tokenizer.chat_template"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """Returns the tokenizer in a folder of Hugging Face's layout, or None where there is none.

        Reads `tokenizer.json`, and where they exist `tokenizer_config.json`, `chat_template.jinja` and
        `generation_config.json`. Raises ValueError with the path for a file that does not parse, and for a
        folder with a tokenizer of another format only.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
            if others:
                raise ValueError(f"{folder}: expected tokenizer.json, found only {others[0]}")
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        config = _json_if_any(folder / "tokenizer_config.json")
        return cls(
            backend,
            bos_token=_content(config.get("bos_token")),
            eos_token=_content(config.get("eos_token")),
            eos_token_ids=eos_token_ids_from_json(_json_if_any(folder / "generation_config.json")),
            chat_template=_chat_template(folder, config),
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, the added ones included; a model's logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`, in which special tokens are recognized where they are spelled out.

        `add_special_tokens` puts what the model expects at the start of a text (its BOS, if any) before it.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text: expected valid Unicode, got a lone surrogate at {error.start}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD, ids past the vocabulary nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, by the model's chat template, ready for the assistant's next turn.

        The text carries its special tokens already: encode it with `add_special_tokens=False`. Raises
        ValueError for a model without a template, and what `render_chat` raises.
        """
        if self.chat_template is None:
            raise ValueError("chat: expected a model with a chat template, this one has none")
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
        )

    def stream(self, skip_special_tokens: bool = True) -> "Detokenizer":
        """Returns a detokenizer for one sequence of tokens that arrive one by one."""
        return Detokenizer(self, skip_special_tokens)


class Detokenizer:
    """The text of a growing sequence of tokens, in pieces that never end within a character.

    The pieces joined equal `decode` of all tokens, as long as these are UTF-8 and end with a character: what
    ends in U+FFFD is held back until more text follows.
    """

    # Not tokenizers' DecodeStream: it raises when a byte that is no UTF-8 follows a character made of byte
    # tokens, which a model is free to sample.
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []  # the last piece's, without which a space may be missing, and those after
        self._num_given = 0  # how many of them are the last piece's

    def add(self, token_id: int) -> str:
        """Returns the text that has become complete with `token_id`, "" while a character is not."""
        self._ids.append(token_id)
        given = self._tokenizer.decode(self._ids[: self._num_given], self._skip_special_tokens)
        text = self._tokenizer.decode(self._ids, self._skip_special_tokens)
        if len(text) <= len(given) or text.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        return text[len(given) :]


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _json_if_any(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
