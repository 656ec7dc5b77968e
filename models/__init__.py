"""Flax NNX models over `pallas_kernels`, and the loading of real checkpoints into them."""

from .config import LlamaConfig as LlamaConfig
from .demo import home as home
from .demo import pull as pull
from .llama import Llama as Llama
from .load import load as load
from .tokenizer import Tokenizer as Tokenizer
