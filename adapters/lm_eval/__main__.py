"""The command `lm_eval`, with the model "kvpolicy"; lm-eval 0.4.13 looks for no plugins itself."""

from ..._extras import extra

with extra("lm-eval"):
    from lm_eval.__main__ import cli_evaluate

from . import KVPolicyLM as KVPolicyLM

if __name__ == "__main__":
    cli_evaluate()
