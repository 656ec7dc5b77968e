"""A conversation with a model, whose answers are given as they are generated."""

from collections.abc import Callable

from jpaged import LLM, SamplingParams

REQUEST_ID = "chat"


class Chat:
    """Turns and answers so far, and the next answer.

    Args:
      llm: a model with a chat template.
      params: of each answer; `n` is 1.
      system: what the model is told before the first turn.

    Raises ValueError for a model without a chat template, or one whose template takes no system message.

    >>> chat = Chat(LLM("smollm2-135m"), SamplingParams(max_tokens=100))  # doctest: +SKIP
    >>> chat.answer("What is a kernel?", show=print)                      # doctest: +SKIP
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        llm.render_chat([*self._opening, {"role": "user", "content": ""}])
        self.reset()

    def reset(self) -> None:
        """Forgets all turns, not the system message."""
        self.messages = list(self._opening)

    def answer(self, turn: str, show: Callable[[str], None]) -> None:
        """Answers the next turn, giving the text to `show` piece by piece.

        An answer that Ctrl-C stops counts as far as it came. Raises ValueError for a conversation that has
        outgrown the model or the cache, and has then forgotten the turn.
        """
        engine = self._llm.engine
        messages = [*self.messages, {"role": "user", "content": turn}]
        text = ""
        try:
            engine.add_request(REQUEST_ID, self._llm.render_chat(messages), self._params)
            while engine.has_unfinished():
                for output in engine.step():
                    if output.error is not None:
                        raise ValueError(output.error)
                    shown, text = text, output.outputs[0].text
                    if piece := text[len(shown) :]:
                        show(piece)
        except KeyboardInterrupt:
            if not text:
                return
        finally:
            engine.abort(REQUEST_ID)  # unless it has ended
        self.messages = [*messages, {"role": "assistant", "content": text}]
