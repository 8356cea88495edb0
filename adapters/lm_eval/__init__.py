"""lm-evaluation-harness: a model whose contexts, continuations and generations a pipeline serves.

    python -m kvpolicy.adapters.lm_eval --model kvpolicy --model_args pretrained=...,pipeline=FILE

takes what the command `lm_eval` takes. Importing this package registers the model, for
`lm_eval.simple_evaluate(model="kvpolicy", ...)`.
"""

from ..._extras import extra
from .model import KVPolicyLM as KVPolicyLM

with extra("lm-eval"):
    from lm_eval.api.registry import model_registry

if "kvpolicy" not in model_registry:  # an entry point may have been found already
    model_registry.register("kvpolicy")(KVPolicyLM)
