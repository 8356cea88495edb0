"""A stand-in for the dense kernel of rectangles."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.kernels.pool import NAN


class Dense:
    """The dense kernel of the contract, in float64; what it does not compute is NaN."""

    def __init__(self, softcap: float | None = None) -> None:
        self.rows: list[int] = []
        self.softcap = softcap

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_q: Tensor,
        used_k: Tensor, longest_q: int, longest_k: int, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert q.is_contiguous() and k.shape == v.shape and k.shape[1] == 1
        assert len(cu_q) == len(cu_k) == len(used_q) + 1 == len(used_k) + 1
        assert cu_q[0] == 0 and cu_q[-1] == len(q) and bool((cu_q.diff() >= used_q).all())
        assert cu_k[-1] == len(k)
        assert int(used_q.max()) <= longest_q and int(used_k.max()) <= longest_k
        out, lse = torch.full_like(q, NAN), torch.full(q.shape[1::-1], NAN).to(q.device)
        numbers = (x.tolist() for x in (cu_q[:-1], cu_k[:-1], used_q, used_k))
        for q0, k0, queries, rows in zip(*numbers, strict=True):
            self.rows.append(rows)
            assert (queries > 0) == (rows > 0)
            if rows:
                part, keys = slice(q0, q0 + queries), slice(k0, k0 + rows)
                scores = torch.einsum("qgd,kd->gqk", q[part].double(), k[keys, 0].double()) * scale
                if self.softcap is not None:
                    scores = (scores / self.softcap).tanh() * self.softcap
                lse[:, part] = scores.logsumexp(-1).float()
                found = torch.einsum("gqk,kd->qgd", scores.softmax(-1), v[keys, 0].double())
                out[part] = found.to(out)
        return out, lse
