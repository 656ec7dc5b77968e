"""Eight questions of very different lengths, answered together by a small model."""

from jpaged import LLM, SamplingParams

SQUARES = ", ".join(str(n * n) for n in range(1, 40))
DIARY = "\n".join(f"Day {day}: we walked {10 + day % 7} km and slept in the village." for day in range(1, 31))

QUESTIONS = [
    "Say hello.",
    "What is the capital of France?",
    "Translate into Spanish: Good morning, my friend.",
    "Name three animals that can fly, with one fact about each.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at nine and arrives at half past eleven. How long does it travel? Explain step by step.",
    f"What do these numbers have in common? {SQUARES}",
    f"Here is the diary of a journey. Tell me in one sentence what happened.\n{DIARY}",
]

print("The demo model (98 MB) is fetched at the first run and kept; so are compiled programs.\n", flush=True)
llm = LLM("smollm2-135m")
params = SamplingParams(temperature=0.0, max_tokens=64)
outputs = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], params)

for question, output in zip(QUESTIONS, outputs, strict=True):
    shortened = question if len(question) <= 100 else f"{question[:80]} … {question[-15:]}"
    print(f"\n[{len(output.prompt_token_ids)} tokens] {shortened!r}\n{output.outputs[0].text.strip()}")
