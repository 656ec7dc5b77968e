"""A progress bar over a batch of requests on standard error, and the statistics that close it."""

import time
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from .llm_engine import LLMEngine
from .outputs import RequestOutput


class Progress:
    """Shows how far a batch of `total` requests has come; nothing at all unless `shown`."""

    def __init__(self, total: int, engine: LLMEngine, *, shown: bool) -> None:
        self._engine = engine
        self._shown = shown
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = RichProgress(
            *columns,
            TextColumn("{task.fields[rate]}"),
            console=self._console,
            disable=not (shown and (self._console.is_terminal or self._console.is_jupyter)),
            transient=True,
        )
        self._task = self._bar.add_task("generating", total=total, rate="")

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._before = self._engine.stats()
        self._first_tokens: list[float] = []
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._shown and kind is None:
            self._console.print(self._summary(), highlight=False)

    def compiling(self, what: str) -> None:
        """Something is about to be compiled."""
        self._bar.update(self._task, description=f"compiling {what}", refresh=True)

    def finished(self, output: RequestOutput) -> None:
        """A request has ended."""
        if output.metrics.time_to_first_token is not None:
            self._first_tokens.append(output.metrics.time_to_first_token)
        self._bar.advance(self._task)

    def stepped(self) -> None:
        """A step is done."""
        if self._bar.disable:
            return
        tokens = self._engine.stats().generation_tokens - self._before.generation_tokens
        rate = tokens / (time.monotonic() - self._start)
        self._bar.update(self._task, description="generating", rate=f"{rate:.0f} tokens/s")

    def _summary(self) -> str:
        now, before = self._engine.stats(), self._before
        seconds = time.monotonic() - self._start
        tokens = now.generation_tokens - before.generation_tokens
        compiling = now.compile_seconds - before.compile_seconds
        held = now.held_slot_steps - before.held_slot_steps
        carrying = (now.used_slot_steps - before.used_slot_steps) / held if held else 1.0
        hits = now.prefix_cache_hits - before.prefix_cache_hits
        first = f"{median(self._first_tokens):.2f} s" if self._first_tokens else "-"
        return (
            f"{tokens} tokens in {seconds:.1f} s, {compiling:.1f} s of them compiling "
            f"{now.compiled_shapes - before.compiled_shapes} programs: {tokens / seconds:.0f} tokens/s\n"
            f"first token after {first} in the median; {now.num_preemptions - before.num_preemptions} preemptions; "
            f"{hits} prompt tokens found in the prefix cache\n"
            f"at most {now.peak_blocks} of {now.num_blocks} blocks held; {carrying:.1%} of held slots carried a token"
        )
