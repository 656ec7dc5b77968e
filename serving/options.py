"""The options that commands share: those of `SamplingParams` and of `EngineConfig`, by the same names."""

from typing import Annotated

from typer import Option

_SAMPLING = "Sampling"
_ENGINE = "Engine (what is not given is as in EngineConfig)"

MaxTokens = Annotated[int, Option(help="Most tokens of an answer.", rich_help_panel=_SAMPLING)]
MinTokens = Annotated[int, Option(help="Tokens before an answer may stop.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float, Option(help="0 to 2; 0 always takes the likeliest token.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, Option(help="Draw from the likeliest tokens that hold this share.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, Option(help="Draw from so many likeliest tokens; 0 is off.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float, Option(help="Draw from tokens at least this likely, next to the likeliest.", rich_help_panel=_SAMPLING)
]
PresencePenalty = Annotated[
    float, Option(help="-2 to 2; above 0 against tokens that were generated before.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float, Option(help="-2 to 2; the same, for each time they were generated.", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float, Option(help="Above 1 against tokens of prompt and answer.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, Option(help="Draw the same again; none: the engine chooses.", rich_help_panel=_SAMPLING)]
Samples = Annotated[int, Option("--n", help="Answers a prompt.", rich_help_panel=_SAMPLING)]
Stop = Annotated[list[str] | None, Option(help="Text that ends an answer; may be repeated.", rich_help_panel=_SAMPLING)]
IgnoreEos = Annotated[
    bool, Option("--ignore-eos", help="Go on after the end-of-sequence token.", rich_help_panel=_SAMPLING)
]
BeamWidth = Annotated[
    int | None,
    Option(help="Search for so many likeliest answers instead of drawing them.", rich_help_panel="Beam search"),
]
LengthPenalty = Annotated[
    float, Option(help="Above 0 long answers are the better, below 0 short ones.", rich_help_panel="Beam search")
]

BlockSize = Annotated[int | None, Option(help="Tokens a block of the KV cache holds.", rich_help_panel=_ENGINE)]
NumBlocks = Annotated[int | None, Option(help="Blocks of the KV cache.", rich_help_panel=_ENGINE)]
MaxNumSeqs = Annotated[int | None, Option(help="Sequences that run at once.", rich_help_panel=_ENGINE)]
MaxNumBatchedTokens = Annotated[int | None, Option(help="Tokens one step computes.", rich_help_panel=_ENGINE)]
MaxModelLen = Annotated[int | None, Option(help="Tokens of prompt and answer together.", rich_help_panel=_ENGINE)]
DType = Annotated[str | None, Option("--dtype", help="float32 or bfloat16.", rich_help_panel=_ENGINE)]
