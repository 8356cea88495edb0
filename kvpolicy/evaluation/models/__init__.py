"""Models to evaluate with: SmolLM2 from its package, and a tiny random Llama."""

from .smollm2 import load_smollm2 as load_smollm2
from .smollm2 import smollm2_config as smollm2_config
from .tiny import tiny_llama as tiny_llama
from .tiny import tiny_tokenizer as tiny_tokenizer
