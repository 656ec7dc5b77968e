"""`LLM` over a small random Llama in a folder of Hugging Face's layout, which speaks in letters."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from jpaged import LLM, SamplingParams

pytest.importorskip("models")

WORDS = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,:")} | {"<end>": 30}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant: "
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    config = {
        "model_type": "llama", "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    attention = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
    mlp = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}
    shapes = {"model.embed_tokens": (31, 16), "model.norm": (16,)}
    shapes |= {f"model.layers.0.self_attn.{x}_proj": shape for x, shape in attention.items()}
    shapes |= {f"model.layers.0.mlp.{x}_proj": shape for x, shape in mlp.items()}
    shapes |= {f"model.layers.0.{x}_layernorm": (16,) for x in ("input", "post_attention")}
    random = np.random.default_rng(0)
    weights = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(WORDS, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=16)


@pytest.fixture(autouse=True)
def _leaves_nothing(llm):
    yield
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def test_one_text_and_a_list_of_it(llm):
    (one,) = llm.generate("abc", GREEDY, progress=False)
    (listed,) = llm.generate(["abc"], GREEDY, progress=False)
    (ids,) = llm.generate([[0, 1, 2]], GREEDY, progress=False)
    assert one.outputs == listed.outputs == ids.outputs
    assert (one.prompt, ids.prompt) == ("abc", None)
    assert one.prompt_token_ids == ids.prompt_token_ids == (0, 1, 2)
    assert one.outputs[0].text == "".join(list(WORDS)[token] for token in one.outputs[0].token_ids if token != 30)
    assert one.finished
    assert len(one.outputs[0].token_ids) == 6


def test_outputs_keep_the_order_of_prompts(llm):
    """Of five prompts two run at once, and later ones end before earlier ones."""
    prompts = ["a", "bc", [3, 4, 5], "fghi", "j"]
    lengths = [9, 1, 5, 2, 3]
    params = [SamplingParams(temperature=0.0, max_tokens=length) for length in lengths]
    outputs = llm.generate(prompts, params, progress=False)
    assert [output.prompt for output in outputs] == ["a", "bc", None, "fghi", "j"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    alone = [llm.generate([prompt], p, progress=False)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert texts(outputs) == texts(alone)


def test_parameters_default_to_sixteen_tokens(llm):
    (output,) = llm.generate("a", progress=False)
    assert len(output.outputs[0].token_ids) == 16


def test_chat(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, progress=False)
    ids = [WORDS[letter] for letter in "user: hi"] + [30] + [WORDS[letter] for letter in "assistant: "]
    assert output.prompt_token_ids == tuple(ids)
    (plain,) = llm.generate([ids], GREEDY, progress=False)
    assert output.outputs == plain.outputs
    two = llm.chat([messages, [{"role": "user", "content": "no"}]], GREEDY, progress=False)
    assert texts(two)[0] == texts([output])[0]
    assert two[1].prompt_token_ids[6:8] == (WORDS["n"], WORDS["o"])


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([], None, ValueError, "^prompts: expected at least one"),
        ([1, 2], None, TypeError, "^prompts: .*put them in a list"),
        (["a", "b"], [GREEDY], ValueError, "^sampling_params: expected .* 2 prompts, got 1"),
        ("a", [GREEDY] * 2, ValueError, "^sampling_params: expected .* 1 prompts, got 2"),
        (["a", "b"], [], ValueError, "^sampling_params: .*got 0"),
        (["a", ""], None, ValueError, r"^prompts\[1\]: prompt: expected at least one token"),
        (["a", [31]], None, ValueError, r"^prompts\[1\]: prompt: .*\[0, 31\)"),
        (["a", "b" * 64], None, ValueError, r"^prompts\[1\]: prompt: expected fewer than 64 tokens"),
        (["a", None], None, TypeError, r"^prompts\[1\]: prompt: "),
        (["a", "b"], [GREEDY, None], TypeError, r"^prompts\[1\]: params: "),
    ],
)
def test_bad_input_leaves_nothing_queued(llm, prompts, params, error, message):
    with pytest.raises(error, match=message):
        llm.generate(prompts, params, progress=False)
    assert not llm.engine.has_unfinished()


def test_no_conversations(llm):
    with pytest.raises(ValueError, match=r"^prompts: expected at least one"):
        llm.chat([], GREEDY, progress=False)


@pytest.mark.parametrize("steps", [0, 2])
def test_ctrl_c_ends_the_call_and_nothing_else(llm, monkeypatch, steps):
    alone = texts(llm.generate(["a", "bc", "def"], GREEDY, progress=False))
    start, left = llm.engine._runner.start, iter(range(steps))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return start(*args)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine._runner, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "bc", "def"], GREEDY, progress=False)
    assert not llm.engine.has_unfinished()
    assert texts(llm.generate(["a", "bc", "def"], GREEDY, progress=False)) == alone


def test_a_request_that_outgrows_the_cache(folder, llm):
    small = LLM(folder, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=1)
    outputs = small.generate(["a", "b" * 20, "a"], GREEDY, progress=False)
    assert [output.error is None for output in outputs] == [True, False, True]
    assert texts(outputs)[0] == texts(outputs)[2] == texts(llm.generate("a", GREEDY, progress=False))[0]


def test_progress_is_on_standard_error(llm, capfd):
    llm.generate(["a", "b"], GREEDY, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "12 tokens in" in err
    llm.generate(["a", "b"], GREEDY, progress=False)
    assert capfd.readouterr() == ("", "")


def test_unknown_argument(folder):
    with pytest.raises(TypeError, match="block_sizes"):
        LLM(folder, block_sizes=4)
    with pytest.raises(ValueError, match=r"^block_size: expected an int >= 1, got 0"):
        LLM(folder, block_size=0)


def test_a_compile_cache_of_the_users_stays(llm, request):
    """The tests' own, which was set before `LLM` was made."""
    assert jax.config.jax_compilation_cache_dir == str(request.config.cache.mkdir("jax"))


def python(code, tmp_path):
    """Runs a program of its own, with `tmp_path` first on sys.path, and as the project's home."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "JPAGED_HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_compile_cache_is_in_the_projects_home(folder, tmp_path):
    code = f"import jax, jpaged; jpaged.LLM({str(folder)!r}, num_blocks=1); print(jax.config.jax_compilation_cache_dir)"
    done = python(code, tmp_path)
    assert done.stdout == f"{tmp_path / 'xla'}\n", done.stderr


def test_another_package_named_models(tmp_path):
    (tmp_path / "models.py").write_text("x = 1\n")
    done = python("import jpaged; jpaged.LLM('x')", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: LLM needs the package `models` that is installed with jpaged"), done.stderr
    assert str(tmp_path / "models.py") in last


def test_beam_search(llm):
    """The widths and ends are tested elsewhere; here, that texts come back and prompts keep their order."""
    outputs = llm.beam_search(["abc", [3, 4]], beam_width=2, max_tokens=5, progress=False)
    assert [output.prompt for output in outputs] == ["abc", None]
    for output in outputs:
        first, second = output.outputs
        assert (first.index, second.index) == (0, 1)
        assert first.cumulative_logprob / len(first.token_ids) >= second.cumulative_logprob / len(second.token_ids)
        assert first.text == "".join(list(WORDS)[token] for token in first.token_ids if token != 30)
    (one,) = llm.beam_search("abc", beam_width=1, max_tokens=5, progress=False)
    (greedy,) = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=5), progress=False)
    assert one.outputs[0].token_ids == greedy.outputs[0].token_ids
    with pytest.raises(ValueError, match=r"^prompts\[0\]: beam_width: expected at most max_num_seqs \(2\), got 3"):
        llm.beam_search("a", beam_width=3, progress=False)
    with pytest.raises(ValueError, match=r"^beam_width: expected an int in \[1, 64\], got 0"):
        llm.beam_search("a", beam_width=0, progress=False)


def test_a_cached_prefix_stays_until_it_is_released(folder):
    text = "the quick brown fox jumps over the "  # 35 tokens, two blocks of 16
    llm = LLM(folder, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=6)
    (cold,) = llm.generate(text + "dog", GREEDY, progress=False)
    assert cold.num_cached_tokens == 0
    prefix = llm.cache_prefix(text)
    assert prefix.num_tokens == 32
    assert llm.stats().num_free_blocks == 4
    llm.generate(["x" * 40, "y" * 40, "z" * 40], GREEDY, progress=False)  # which need every block that is not reserved
    (warm,) = llm.generate(text + "dog", GREEDY, progress=False)
    assert warm.num_cached_tokens == 32
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    prefix.release()
    assert llm.stats().num_free_blocks == 6
    with pytest.raises(KeyError):
        prefix.release()
    llm.generate(["x" * 40, "y" * 40, "w" * 40, "z" * 40], GREEDY, progress=False)
    (again,) = llm.generate(text + "dog", GREEDY, progress=False)
    assert again.num_cached_tokens == 0
    with pytest.raises(RuntimeError, match="needs"):
        LLM(folder, num_blocks=2).cache_prefix(text)
    with pytest.raises(ValueError, match="enable_prefix_caching"):
        LLM(folder, num_blocks=6, enable_prefix_caching=False).cache_prefix(text)
