"""Models to evaluate with: two real ones that are known by their bytes, and a tiny random Llama."""

from .qwen_coder import load_qwen_coder as load_qwen_coder
from .qwen_coder import qwen_coder_config as qwen_coder_config
from .smollm2 import load_smollm2 as load_smollm2
from .smollm2 import smollm2_config as smollm2_config
from .tiny import tiny_llama as tiny_llama
from .tiny import tiny_tokenizer as tiny_tokenizer
