"""The command `jpaged`: generate, chat, pull, compile."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.exceptions import TyperException

from jpaged.beam_search_params import BeamSearchParams
from jpaged.sampling_params import SamplingParams

from . import options

if TYPE_CHECKING:  # these import JAX, which takes a second: commands that need them wait for it, --help does not
    from jpaged import LLM, RequestOutput

    from .chat import Chat

DEFAULT = SamplingParams()
DEFAULT_BEAMS = BeamSearchParams()

Model = Annotated[
    str, typer.Argument(help="A demo model's name, a GGUF file, a folder with safetensors, or a Hugging Face hub id.")
]


class Commands(TyperGroup):
    """Our commands: what goes wrong in one is a line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("jpaged: interrupted", err=True)
            raise typer.Exit(130) from None
        except (TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise  # Typer's own
        except Exception as error:
            if ctx.params["debug"]:
                raise
            complain(str(error).strip().partition("\n")[0] or type(error).__name__)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """The entry point of the command `jpaged`."""
    app(prog_name="jpaged")


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"jpaged {version('jpaged')}")
        raise typer.Exit


@app.callback()
def jpaged(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what JAX logs.")] = False,
) -> None:
    """Run language models with PagedAttention, in JAX."""
    if not debug:
        os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")  # read when JAX is imported; XLA's log obeys it too


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompt_file: Annotated[
        typer.FileText | None,
        typer.Option(encoding="utf-8", help="A file with one prompt a line, none of them empty; - is standard input."),
    ] = None,
    max_tokens: options.MaxTokens = DEFAULT.max_tokens,
    min_tokens: options.MinTokens = DEFAULT.min_tokens,
    temperature: options.Temperature = DEFAULT.temperature,
    top_p: options.TopP = DEFAULT.top_p,
    top_k: options.TopK = DEFAULT.top_k,
    min_p: options.MinP = DEFAULT.min_p,
    presence_penalty: options.PresencePenalty = DEFAULT.presence_penalty,
    frequency_penalty: options.FrequencyPenalty = DEFAULT.frequency_penalty,
    repetition_penalty: options.RepetitionPenalty = DEFAULT.repetition_penalty,
    seed: options.Seed = DEFAULT.seed,
    n: options.Samples = DEFAULT.n,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = DEFAULT.ignore_eos,
    beam_width: options.BeamWidth = None,
    length_penalty: options.LengthPenalty = DEFAULT_BEAMS.length_penalty,
    block_size: options.BlockSize = None,
    num_blocks: options.NumBlocks = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    max_model_len: options.MaxModelLen = None,
    dtype: options.DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    progress: Annotated[bool, typer.Option(help="Show progress and statistics on standard error.")] = True,
) -> None:
    """Answer prompts, all in one batch.

    With --json, standard output has one line for each answer, in the order of the prompts, and nothing else: an
    object with the keys prompt, prompt_token_ids, index (of the answer among the prompt's, from 0), token_ids, text,
    finish_reason (stop, length or error), and error where there is one.
    """
    params = SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
    )
    if beam_width is not None:
        if params != replace(DEFAULT, max_tokens=max_tokens):
            raise ValueError("beam_width: expected no options of sampling beside it but max_tokens")
        BeamSearchParams(beam_width=beam_width, length_penalty=length_penalty)  # checked before a model is loaded
    if prompt is None and prompt_file is not None:
        prompt = read_prompts(prompt_file)
    elif prompt is None or prompt_file is not None:
        raise typer.BadParameter("expected one of the two", param_hint="--prompt / --prompt-file")
    llm = load(
        model,
        quiet=not progress,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        dtype=dtype,
    )
    if beam_width is None:
        outputs = llm.generate(prompt, params, progress=progress)
    else:
        outputs = llm.beam_search(prompt, beam_width, max_tokens, length_penalty, progress=progress)
    for output in outputs:
        print_json(output) if as_json else print_text(output)
    errors = [f"prompts[{i}]: {output.error}" for i, output in enumerate(outputs) if output.error is not None]
    for error in errors:
        complain(error)
    if errors:
        raise typer.Exit(1)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of an answer; none: what the model has room for.", rich_help_panel="Sampling"),
    ] = None,
    temperature: options.Temperature = DEFAULT.temperature,
    top_p: options.TopP = DEFAULT.top_p,
    top_k: options.TopK = DEFAULT.top_k,
    min_p: options.MinP = DEFAULT.min_p,
    seed: options.Seed = DEFAULT.seed,
    max_model_len: options.MaxModelLen = None,
    dtype: options.DType = None,
) -> None:
    """Talk with a model.

    Each line from the terminal, or from standard input, is a turn. Ctrl-C stops an answer; between answers
    Ctrl-C, Ctrl-D or /exit leaves the chat, and /reset starts a new one.
    """
    params = SamplingParams(  # checked before a model is loaded
        max_tokens=sys.maxsize if max_tokens is None else max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
    )
    llm = load(model, max_model_len=max_model_len, max_num_seqs=1, dtype=dtype)
    from .chat import Chat

    conversation = Chat(llm, params, system)
    for turn in read_turns():
        if turn == "/exit":
            break
        elif turn == "/reset":
            conversation.reset()
        else:
            print_answer(conversation, turn)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A demo model's name.")] = "smollm2-135m",
) -> None:
    """Fetch a demo model, unless it is there, and print the path of its file.

    It is kept under $JPAGED_HOME (~/.cache/jpaged by default).
    """
    from models.demo import pull

    typer.echo(pull(name))


@app.command("compile")
def compile_kernels(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Compile what has each of these words in its name, as in `causal`."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="The GPU, which need not be there: h100, h200 or b200.")] = "h100",
    inner_loop: Annotated[bool, typer.Option("--inner-loop", help="Show the cost of the inner loops, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Compile the kernels for a GPU, over real shapes, and show what they take of it.

    Needs the extra `aot`. Ends with code 1 where a kernel spills registers, waits in a wrong order or fails to compile.

    With --json, standard output has one object a program and nothing else, with the keys program, gpu, flops, bytes,
    bound (compute or memory), seconds (at least, by that bound), faults, temporary_bytes, and kernels.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported: the card is described, not looked for
    from .compile import compile_entries, kernel_table, loop_table, record, select

    results = []
    for result in compile_entries(select(words or ()), gpu, Console(stderr=True)):
        results.append(result)
        if as_json:
            typer.echo(record(result))
    if not as_json:
        console = Console()
        console.print(kernel_table(results, gpu))
        if inner_loop:
            console.print(loop_table(results, gpu))
    faults = [f"{result.entry.name}: {fault}" for result in results for fault in result.faults]
    for fault in faults:
        complain(fault)
    if faults:
        raise typer.Exit(1)


def load(model: str, *, quiet: bool = False, **config: Any) -> "LLM":
    """The model, with those fields of EngineConfig that were given."""
    import jax

    from jpaged import LLM

    if not quiet:
        typer.echo(f"Loading {model} on {jax.devices()[0].device_kind}", err=True)
    return LLM(model, **{name: value for name, value in config.items() if value is not None})


def read_prompts(file: TextIO) -> list[str]:
    """One prompt a line. Raises ValueError for an empty one, with its line, and where there is none."""
    try:
        text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: expected text in UTF-8: {error}") from None
    if not text:
        raise ValueError(f"{file.name}: expected one prompt a line, got an empty file")
    prompts = text.removesuffix("\n").split("\n")
    if "" in prompts:
        raise ValueError(f"{file.name}, line {prompts.index('') + 1}: expected a prompt, got an empty line")
    return prompts


def print_text(output: "RequestOutput") -> None:
    """A prompt and its answers, for people."""
    typer.secho(f"> {output.prompt}", bold=True)
    for sample in output.outputs:
        typer.echo(f"{sample.text}\n")


def print_json(output: "RequestOutput") -> None:
    """A line of JSON for each of a prompt's answers."""
    for sample in output.outputs:
        record = {
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "index": sample.index,
            "token_ids": sample.token_ids,
            "text": sample.text,
            "finish_reason": sample.finish_reason,
        }
        if output.error is not None:
            record["error"] = output.error
        typer.echo(json.dumps(record, ensure_ascii=False))


def read_turns() -> Iterator[str]:
    """Lines with something in them, until Ctrl-D or Ctrl-C."""
    prompt = ""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not everywhere
            import readline  # noqa: F401  # gives `input` arrow keys and a history
        typer.echo("Ctrl-C stops an answer; /reset starts anew; /exit or Ctrl-D leaves.", err=True)
        prompt = "> "
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if turn := input(prompt).strip():
                yield turn


def print_answer(conversation: "Chat", turn: str) -> None:
    """The answer as it comes; a spinner until then, for the first ones wait for compilation."""
    with Console(stderr=True).status("thinking") as spinner:

        def show(piece: str) -> None:
            spinner.stop()
            typer.echo(piece, nl=False)

        try:
            conversation.answer(turn, show)
        except ValueError as error:
            complain(f"{error} (/reset starts anew)")
    typer.echo()


def complain(message: str) -> None:
    """One line on standard error."""
    typer.echo(f"jpaged: error: {message}", err=True)
