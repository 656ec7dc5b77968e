# pyright: reportMissingImports=false
"""Writes beam_search.json: the beams and scores of Hugging Face transformers' beam search, in float32.

Run by hand, in an environment with torch, transformers 4.5x and gguf; the test suite needs only the JSON:

    python tests/data/make_beam_search_reference.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

Two models: a tiny Llama whose weights anyone can draw again (`tiny_weights`), and smollm2-135m. Each search is done in
float64 too, and left out unless the same beams come in the same order. In the file:

    tiny       config (of the folder's config.json), weights_seed, and searches
    smollm2    gguf_sha256, and searches
    searches   a list of {prompt_token_ids, beam_width, max_tokens, length_penalty, early_stopping, eos_token_ids,
               beams}, where beams is a list of {token_ids, score}, best first; token_ids end with the EOS, if any
"""

import argparse
import hashlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_smollm2_reference import PROMPTS, build_tokenizer, check_model, load_model

OUTPUT = Path(__file__).with_name("beam_search.json")
WEIGHTS_SEED = 7
TINY = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WIDTHS = (2, 4, 6)


def tiny_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tiny model's weights, in the order of their names. NumPy's legacy generator, whose stream never changes."""
    random = np.random.RandomState(WEIGHTS_SEED)
    return {name: random.standard_normal(shapes[name]).astype(np.float32) for name in sorted(shapes)}


def tiny_model() -> torch.nn.Module:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    assert model.generation_config.eos_token_id is None  # it would take the place of no EOS
    parameters = dict(model.named_parameters())
    for name, weight in tiny_weights({name: tuple(p.shape) for name, p in parameters.items()}).items():
        parameters[name].data.copy_(torch.from_numpy(weight))
    return model


def search(model: torch.nn.Module, prompt: list[int], eos: list[int], **asked: Any) -> list[dict[str, Any]]:
    """One search's beams, best first, cut after their EOS."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            num_beams=asked["beam_width"],
            num_return_sequences=asked["beam_width"],
            max_new_tokens=asked["max_tokens"],
            length_penalty=asked["length_penalty"],
            early_stopping=asked["early_stopping"],
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    beams = []
    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        token_ids = sequence[len(prompt) :]
        if ends := [i for i, token_id in enumerate(token_ids) if token_id in eos]:
            token_ids = token_ids[: ends[0] + 1]
        beams.append({"token_ids": token_ids, "score": round(score, 6)})
    return beams


def searches(
    name: str, model: torch.nn.Module, exact: torch.nn.Module, cases: list[tuple[list[int], list[int], dict[str, Any]]]
) -> list[dict[str, Any]]:
    kept = []
    for prompt, eos, asked in cases:
        beams, of_exact = (search(each, prompt, eos, **asked) for each in (model, exact))
        is_same = [beam["token_ids"] for beam in beams] == [beam["token_ids"] for beam in of_exact]
        lengths = [len(beam["token_ids"]) for beam in beams]
        print(f"{name} {prompt[:4]}... {asked}: lengths {lengths}{'' if is_same else ', LEFT OUT'}", flush=True)
        if is_same:
            kept.append({"prompt_token_ids": prompt, "eos_token_ids": eos, **asked, "beams": beams})
    return kept


def case(beam_width: int, max_tokens: int, length_penalty: float, early_stopping: bool | str) -> dict[str, Any]:
    return {
        "beam_width": beam_width,
        "max_tokens": max_tokens,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes beam_search.json.")
    parser.add_argument("gguf_path", type=Path)
    path = parser.parse_args().gguf_path
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    tiny, tiny_exact = tiny_model(), tiny_model().double()
    random = np.random.RandomState(0)
    prompts = [random.randint(0, 61, length).tolist() for length in (1, 5, 16, 23)]
    # EOS that beams meet early and often, in different places.
    ways = [(1.0, False), (1.0, True), (1.0, "never"), (0.0, False), (-0.5, "never"), (2.0, False), (2.0, "never")]
    tiny_cases = [
        (prompt, eos, case(width, 20, *way))
        for prompt, eos, width, way in product(prompts, ([11], [3, 30, 44], []), WIDTHS, ways)
        if eos or way == (1.0, False)
    ]
    document: dict[str, Any] = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"},
        "tiny": {
            "config": TINY,
            "weights_seed": WEIGHTS_SEED,
            "searches": searches("tiny", tiny, tiny_exact, tiny_cases),
        },
    }

    import gguf

    reader = gguf.GGUFReader(path)
    tokenizer = build_tokenizer(reader.fields)
    smollm2 = load_model(path)
    check_model(smollm2, reader)
    exact = load_model(path).double()
    smollm2_cases = [
        (tokenizer.encode(PROMPTS[name]).ids, [2], case(width, 24, *way))
        for name, way in (("english", (1.0, False)), ("chat", (1.0, "never")), ("arithmetic", (0.5, True)))
        for width in WIDTHS
    ]
    document["smollm2"] = {
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "searches": searches("smollm2", smollm2, exact, smollm2_cases),
    }
    OUTPUT.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
