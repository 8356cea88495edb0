"""A learned gate against admissions that have learned nothing: by chance and by frequency."""

from __future__ import annotations

from collections import Counter
from functools import partial

import attrs
import torch
from torch import Tensor

from ...admission import Admission, RandomGate, Write
from ...pipeline import CachePipeline
from ..chart import Chart
from .fronts import TAU_NOTE, charts_of, full, over_taus
from .lab import Lab, Pipelines


@attrs.frozen(kw_only=True, eq=False)
class AtPositions(Admission):
    """Admits positions of one document, alike in every head; `admitted` is bool `[N]`."""

    admitted: Tensor

    @property
    def by_position(self) -> bool:
        return True

    def admit(self, write: Write) -> Tensor:
        table = self.admitted.to(write.positions.device)
        inside = write.positions < len(table)
        found = table[write.positions.clamp(max=len(table) - 1)] | ~inside
        return found.expand(write.key.shape[0], -1)


def by_baseline(lab: Lab) -> list[Chart]:
    """The recipe's gate, uniform random admission, and rare or frequent tokens first."""
    window, length = lab.recipe.training.window, lab.recipe.length
    rows = [full(lab)]
    rows += [("write gate", point, of) for point, of in over_taus(lab, "base", lab.gate())]
    counts = _counts(lab)
    for part in lab.recipe.parts:
        # The window is held whatever an admission says.
        far = (part * length - window) / (length - window)
        if not 0 < far <= 1:
            continue
        random = CachePipeline(admission=RandomGate(sparsity=1 - far), window=window)
        made: dict[str, Pipelines] = {
            "random": random,
            "rare tokens": partial(_frequency, counts, far, window, False),
            "frequent tokens": partial(_frequency, counts, far, window, True),
        }
        for curve, pipeline in made.items():
            rows.append((curve, f"{part:.3g}", lab.measured(f"{curve} {part:.3g}", pipeline)))
    notes = (
        TAU_NOTE,
        "Frequency: a token's count in the texts that gates are trained on decides, for all heads "
        "alike; the rarest, or the most frequent, fill the part.",
    )
    return charts_of("learned, by chance, by frequency", rows, notes)


def _counts(lab: Lab) -> Counter[int]:
    found: Counter[int] = Counter()
    for text in lab.texts:
        found.update(lab.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return found


def _frequency(
    counts: Counter[int], far: float, window: int, frequent: bool, ids: Tensor
) -> CachePipeline:
    seen = torch.tensor([counts[token] for token in ids.tolist()])
    order = seen.argsort(descending=frequent, stable=True)
    admitted = torch.zeros(len(ids), dtype=torch.bool)
    admitted[order[: round(far * len(ids))]] = True
    return CachePipeline(admission=AtPositions(admitted=admitted), window=window)
