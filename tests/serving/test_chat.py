from pathlib import Path

import pytest

from jpaged import LLM, SamplingParams
from serving.chat import Chat

PARAMS = SamplingParams(temperature=0.0, max_tokens=6)
HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def llm(letters: Path) -> LLM:
    return LLM(letters)


def test_pieces_add_up_to_the_answer(llm: LLM) -> None:
    pieces: list[str] = []
    chat = Chat(llm, PARAMS)
    chat.answer("hello", pieces.append)
    expected = llm.chat([HELLO], PARAMS, progress=False)[0].outputs[0].text
    assert len(pieces) > 1
    assert "".join(pieces) == expected
    assert chat.messages == [HELLO, {"role": "assistant", "content": expected}]


def test_the_system_message_outlives_reset(llm: LLM) -> None:
    chat = Chat(llm, PARAMS, system="be brief")
    chat.answer("hello", lambda piece: None)
    assert len(chat.messages) == 3
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]


def test_ctrl_c_keeps_the_answer_as_far_as_it_came(llm: LLM) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    chat = Chat(llm, PARAMS)
    chat.answer("hello", show)
    assert len(pieces) == 2
    assert chat.messages == [HELLO, {"role": "assistant", "content": "".join(pieces)}]
    assert not llm.engine.has_unfinished()
    assert llm.stats().num_free_blocks == llm.stats().num_blocks
    chat.answer("more", lambda piece: None)
    assert len(chat.messages) == 4


def test_ctrl_c_before_the_first_token_forgets_the_turn(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> list:
        raise KeyboardInterrupt

    chat = Chat(llm, PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", step)
        chat.answer("hello", lambda piece: None)
    assert chat.messages == []
    assert not llm.engine.has_unfinished()


def test_an_error_on_the_way_leaves_the_chat_usable(llm: LLM) -> None:
    def show(piece: str) -> None:
        raise OSError("no space left")

    chat = Chat(llm, PARAMS)
    with pytest.raises(OSError, match="no space left"):
        chat.answer("hello", show)
    assert chat.messages == []
    chat.answer("hello", lambda piece: None)
    assert len(chat.messages) == 2


def test_a_turn_that_does_not_fit_is_forgotten(llm: LLM) -> None:
    chat = Chat(llm, PARAMS)
    chat.answer("hello", lambda piece: None)
    before = chat.messages
    with pytest.raises(ValueError, match="prompt: expected fewer than 64 tokens"):
        chat.answer("x" * 64, lambda piece: None)
    assert chat.messages == before
    assert not llm.engine.has_unfinished()


def test_a_turn_that_outgrows_the_cache_is_forgotten(letters: Path) -> None:
    chat = Chat(LLM(letters, num_blocks=2), PARAMS)  # 32 slots
    with pytest.raises(ValueError, match="needs 3 blocks of 16 tokens, more than the pool's 2"):
        chat.answer("x" * 20, lambda piece: None)
    assert chat.messages == []


def test_a_model_that_cannot_chat_is_refused_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="expected a model with a chat template"):
        Chat(llm, PARAMS)
