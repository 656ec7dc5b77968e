import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from typer.testing import CliRunner, Result

from jpaged import LLM, SamplingParams
from serving.cli import app

from .conftest import VOCABULARY

ROOT = Path(__file__).resolve().parents[2]
LETTERS = {token_id: letter for letter, token_id in VOCABULARY.items()}
MAIN = "from serving.cli import main; main()"
GREEDY = ["--temperature", "0"]


@pytest.fixture(autouse=True)
def jax_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes, after a test, what the command does to its own process's environment."""
    monkeypatch.setenv("JAX_LOGGING_LEVEL", "CRITICAL")


def run(*args: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def subprocess_of(*args: str, **options: Any) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    return subprocess.Popen([sys.executable, *args], **pipes | options)


class FakeLLM:
    """Stands in for `LLM` where the question is what reaches it."""

    calls: list[dict[str, Any]]

    def __init__(self, model: str, **config: Any) -> None:
        self.given = {"model": model, "config": config}

    def generate(self, prompts: list[str], params: SamplingParams, *, progress: bool) -> list:
        self.calls.append({**self.given, "prompts": prompts, "params": params, "progress": progress})
        return []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches `LLM`, a call each."""
    monkeypatch.setattr("jpaged.llm.LLM", FakeLLM)
    monkeypatch.setattr(FakeLLM, "calls", [], raising=False)
    return FakeLLM.calls


def test_json_has_a_line_an_answer_and_nothing_else(letters: Path) -> None:
    result = run(
        "generate", letters, "--prompt", "abc", "--prompt", "b a", *GREEDY, "--n", "2", "--max-tokens", "5", "--json"
    )
    assert result.exit_code == 0
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(record["prompt"], record["index"]) for record in records] == [
        ("abc", 0),
        ("abc", 1),
        ("b a", 0),
        ("b a", 1),
    ]
    for record in records:
        assert list(record) == ["prompt", "prompt_token_ids", "index", "token_ids", "text", "finish_reason"]
        assert record["prompt_token_ids"] == [VOCABULARY[letter] for letter in record["prompt"]]
        assert len(record["token_ids"]) == 5
        assert record["text"] == "".join(LETTERS[token_id] for token_id in record["token_ids"])
        assert record["finish_reason"] == "length"
    assert "tokens/s" in result.stderr


def test_a_request_that_fails_leaves_the_others_whole(letters: Path) -> None:
    """Two blocks hold 32 tokens, fewer than the second prompt has."""
    prompts = ("--prompt", "abc", "--prompt", "x" * 40, "--prompt", "ab")
    result = run(
        "generate", letters, *prompts, *GREEDY, "--max-tokens", "5", "--num-blocks", "2", "--json", "--no-progress"
    )
    assert result.exit_code == 1
    error = "the request needs 3 blocks of 16 tokens, more than the pool's 2"
    assert result.stderr == f"jpaged: error: prompts[1]: {error}\n"
    good, bad, last = (json.loads(line) for line in result.stdout.splitlines())
    assert len(good["token_ids"]) == len(last["token_ids"]) == 5
    assert "error" not in good
    assert (bad["error"], bad["finish_reason"], bad["token_ids"]) == (error, "error", [])


def test_people_read_prompts_with_their_answers(letters: Path) -> None:
    result = run("generate", letters, "--prompt", "abc", *GREEDY, "--max-tokens", "5", "--no-progress")
    expected = LLM(letters).generate("abc", SamplingParams(temperature=0.0, max_tokens=5), progress=False)
    assert result.exit_code == 0
    assert result.stdout == f"> abc\n{expected[0].outputs[0].text}\n\n"
    assert result.stderr == ""


def test_options_are_fields_of_sampling_params_and_engine_config(calls: list[dict[str, Any]]) -> None:
    sampling = {"max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1}
    sampling |= {"seed": 3, "n": 4}
    config = {"block_size": 8, "num_blocks": 10, "max_num_seqs": 11, "max_num_batched_tokens": 12}
    config |= {"max_model_len": 13, "dtype": "bfloat16"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (sampling | config).items()]
    result = run("generate", "m", "--prompt=a", *options, "--ignore-eos", "--stop=x", "--stop=y", "--no-progress")
    assert result.exit_code == 0
    params = SamplingParams(**sampling, ignore_eos=True, stop=("x", "y"))
    assert calls == [{"model": "m", "config": config, "prompts": ["a"], "params": params, "progress": False}]


def test_defaults_are_those_of_sampling_params_and_engine_config(calls: list[dict[str, Any]]) -> None:
    result = run("generate", "m", "--prompt", "a")
    assert result.exit_code == 0
    assert result.stderr == "Loading m on cpu\n"
    assert calls == [{"model": "m", "config": {}, "prompts": ["a"], "params": SamplingParams(), "progress": True}]


@pytest.mark.parametrize("text", ["one\n two \ndrei é\n", "one\r\n two \r\ndrei é"])
@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_prompt_file_has_a_prompt_a_line(
    tmp_path: Path, calls: list[dict[str, Any]], text: str, from_stdin: bool
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    source = "-" if from_stdin else path
    result = run("generate", "m", "--prompt-file", source, stdin=text.encode() if from_stdin else None)
    assert result.exit_code == 0
    assert calls[0]["prompts"] == ["one", " two ", "drei é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": expected one prompt a line, got an empty file"),
        (b"\n", ", line 1: expected a prompt, got an empty line"),
        (b"one\n\nthree\n", ", line 2: expected a prompt, got an empty line"),
        (b"one\n\n", ", line 2: expected a prompt, got an empty line"),
        (b"caf\xe9\n", ": expected text in UTF-8: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_prompt_file_that_is_wrong(tmp_path: Path, calls: list[dict[str, Any]], content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    result = run("generate", "m", "--prompt-file", path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"jpaged: error: {path}{message}")
    assert result.stderr.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize("prompts", [(), ("--prompt", "a", "--prompt-file", "-")])
def test_prompts_come_from_one_place(calls: list[dict[str, Any]], prompts: tuple[str, ...]) -> None:
    result = run("generate", "m", *prompts)
    assert result.exit_code == 2
    assert "expected one of the two" in result.stderr
    assert (result.stdout, calls) == ("", [])


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nothing", (), "'nothing': found no such file or folder, and it is neither a hub id"),
        ("{empty}", (), "expected config.json with safetensors or one .gguf file, found neither"),
        ("{truncated}", (), "truncated.gguf: not a readable GGUF file"),
        ("{letters}", ("--temperature", "-1"), "temperature: expected a number in [0, 2], got -1.0"),
        ("{letters}", ("--dtype", "float31"), "float31"),
        ("{letters}", ("--max-model-len", "0"), "max_model_len: expected an int >= 1, got 0"),
    ],
)
def test_an_error_is_one_line(
    tmp_path: Path, letters: Path, command: str, model: str, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x02\x00\x00\x00")
    model = model.format(empty=tmp_path / "empty", truncated=truncated, letters=letters)
    prompt = ("--prompt", "a", "--no-progress") if command == "generate" else ()
    result = run(command, model, *prompt, *options)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Loading ")]
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(lines) == 1
    assert lines[0].startswith("jpaged: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 64, "prompts[1]: prompt: expected fewer than 64 tokens, the model's length"),
        ("", "prompts[1]: prompt: expected at least one token, got none in ''"),
    ],
)
def test_a_prompt_that_cannot_be_served(letters: Path, prompt: str, message: str) -> None:
    result = run("generate", letters, "--prompt", "a", "--prompt", prompt, "--json", "--no-progress")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"jpaged: error: {message}")
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    process = subprocess_of("-c", MAIN, "--debug", "generate", "m", "--prompt=a", "--temperature=-1")
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.startswith(b"Traceback ")
    assert b"ValueError: temperature: " in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "jpaged: interrupted\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more"), 1, "jpaged: error: RESOURCE_EXHAUSTED: out of "),
        (MemoryError(), 1, "jpaged: error: MemoryError\n"),
        (ImportError("LLM needs models"), 1, "jpaged: error: LLM needs models\n"),
    ],
)
def test_what_goes_wrong_on_the_way(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def generate(self: FakeLLM, *args: Any, **options: Any) -> list:
        raise error

    monkeypatch.setattr(FakeLLM, "generate", generate)
    result = run("generate", "m", "--prompt", "a", "--no-progress")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_ctrl_c_in_the_middle(letter_model: Callable[..., Path]) -> None:
    """In the middle: the progress bar, which rich draws for FORCE_COLOR as for a terminal, has counted tokens."""
    folder = letter_model(100_000)
    long = (*GREEDY, "--ignore-eos", "--max-tokens=90000", "--max-num-seqs=1", "--num-blocks=6000")
    process = subprocess_of(
        *("-c", MAIN, "generate", str(folder), "--prompt=a", "--json", *long),
        env=os.environ
        | {"FORCE_COLOR": "1", "TERM": "xterm", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    seen = b""
    while b"tokens/s" not in seen and (chunk := os.read(process.stderr.fileno(), 4096)):
        seen += chunk
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == b""
    assert stderr.endswith(b"jpaged: interrupted\n")
    assert b"Traceback" not in seen + stderr


def test_chat_answers_each_line(letters: Path) -> None:
    turns = [{"role": "user", "content": "abc"}]
    params = SamplingParams(temperature=0.0, max_tokens=5)
    llm = LLM(letters)
    first = llm.chat(turns, params, progress=False)[0].outputs[0].text
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "d"}]
    second = llm.chat(turns, params, progress=False)[0].outputs[0].text
    result = run("chat", letters, *GREEDY, "--max-tokens", "5", stdin="abc\n\n  \nd\n/reset\nabc\n/exit\nabc\n")
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert result.stderr == "Loading " + f"{letters} on cpu\n"


def test_a_chat_outlives_a_conversation_that_has_outgrown_the_model(letters: Path) -> None:
    result = run("chat", letters, *GREEDY, "--max-tokens", "5", stdin=f"abc\n{'x' * 64}\n/reset\nabc\n")
    first, failed, again = result.stdout.splitlines()
    assert result.exit_code == 0
    assert len(first) == 5
    assert (failed, again) == ("", first)
    error = result.stderr.splitlines()[1:]
    assert len(error) == 1
    assert error[0].startswith("jpaged: error: prompt: expected fewer than 64 tokens")
    assert error[0].endswith("(/reset starts anew)")


def test_an_answer_may_take_all_the_room_the_model_has(letters: Path) -> None:
    result = run("chat", letters, *GREEDY, stdin="a\n")
    prompt = [*"user: a", "<end>", *"assistant: "]
    assert result.exit_code == 0
    assert len(result.stdout.removesuffix("\n")) == 64 - len(prompt)


def test_ctrl_c_between_answers_leaves_the_chat(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    result = run("chat", letters)
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize(("options", "level"), [((), "CRITICAL"), (("--debug",), None)])
def test_jax_logs_for_debug_alone(
    monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]], options: tuple[str, ...], level: str | None
) -> None:
    monkeypatch.delenv("JAX_LOGGING_LEVEL")
    assert run(*options, "generate", "m", "--prompt", "a").exit_code == 0
    assert os.environ.get("JAX_LOGGING_LEVEL") == level


def test_pull_prints_only_the_path(smollm2_path: Path) -> None:
    result = run("pull")
    assert (result.exit_code, result.stdout) == (0, f"{smollm2_path}\n")


def test_pull_of_what_is_no_demo_model() -> None:
    result = run("pull", "gpt-5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "jpaged: error: demo model: expected one of smollm2-135m, got 'gpt-5'\n"


def test_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version").stdout == f"jpaged {project['version']}\n"


@pytest.mark.parametrize("command", [(), ("generate",), ("chat",), ("pull",)])
def test_help_does_not_wait_for_jax(command: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom serving.cli import app\n"
        f"app([*{command!r}, '--help'], standalone_mode=False)\n"
        "assert 'jax' not in sys.modules"
    )
    process = subprocess_of("-c", code)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, b"")
    assert b"Usage" in stdout


def test_beams(letters: Path) -> None:
    result = run("generate", str(letters), "--prompt", "ab", "--beam-width", "2", "--max-tokens", "4", "--json")
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(record["prompt"], record["index"]) for record in records] == [("ab", 0), ("ab", 1)]
    assert records[0]["token_ids"] != records[1]["token_ids"]
    for options, message in (
        (("--beam-width", "2", "--n", "3"), "beam_width: expected no options of sampling beside it"),
        (("--beam-width", "0"), "beam_width: expected an int in [1, 64], got 0"),
    ):
        result = run("generate", str(letters), "--prompt", "ab", *options)
        assert (result.exit_code, message in result.stderr) == (1, True)
