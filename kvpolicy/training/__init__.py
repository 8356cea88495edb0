"""Training of write gates and DuoAttention patterns; needs transformers and accelerate."""

from .._extras import extra

with extra("train"):
    import accelerate  # noqa: F401  (the modules below import it)

from ..adapters.hf.fingerprints import keys_fingerprint as keys_fingerprint
from .data import TrainingMix as TrainingMix
from .data import documents as documents
from .duo import TrainedPattern as TrainedPattern
from .duo import train_duo_attention as train_duo_attention
from .gate import TrainedGate as TrainedGate
from .gate import WriteGates as WriteGates
from .judge import train_judge as train_judge
from .kvzap import fit_kvzap as fit_kvzap
from .q_filters import fit_q_filters as fit_q_filters
from .settings import GateTraining as GateTraining
from .student import evaluate_gates as evaluate_gates
from .train import train_write_gate as train_write_gate
from .triattention import fit_triattention as fit_triattention
