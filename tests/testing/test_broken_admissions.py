"""The conformance kit rejects broken admissions by the name of what they break."""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch

from kvpolicy.admission import Admission
from kvpolicy.testing import ConformanceError, check_admission

# Each function below is a policy's method with one fault; its name says which.


def rms(x):
    return x.square().mean(-1)


def good_admit(self, write):
    return rms(write.key) > 1


def looks_ahead(self, write):
    after = torch.cat([write.key[:, 1:], write.key[:, -1:]], 1)
    return rms(after) > 1


def depends_on_the_cut(self, write):
    sums = write.key[..., 0].cumsum(1)
    starts = torch.repeat_interleave(
        write.cu_seqlens[:-1].long(), write.cu_seqlens.diff(), output_size=write.key.shape[1]
    )
    before = sums.gather(1, starts.expand(len(sums), -1)) - write.key[:, starts, 0]
    return sums - before > 0


def depends_on_the_batch(self, write):
    return rms(write.key) > len(write.cu_seqlens) / 2


def depends_on_the_pack_order(self, write):
    short_first = (write.cu_seqlens[1] == 1) & (write.key.shape[1] > 1)
    return (rms(write.key) > 1) ^ short_first


CALLS = itertools.count()


def keeps_state(self, write):
    return (rms(write.key) > 1) ^ bool(next(CALLS) % 2)


MEMORY = {}


def remembers_other_calls(self, write):
    MEMORY["scale"] = max(MEMORY.get("scale", 0.0), write.key.abs().max().item())
    return rms(write.key) > MEMORY["scale"] / 4


def uses_item(self, write):
    limit = max(rms(write.key)[0, 0].item(), 1.0) if write.layer < 0 else 1.0
    return rms(write.key) > limit + 0 * write.key.sum().item()


def uses_bool(self, write):
    score = rms(write.key)
    return score > 1 if (score > 0).all() else score > 0


def uses_cpu(self, write):
    return (rms(write.key).cpu() > 1).to(write.key.device)


def uses_tolist(self, write):
    assert write.cu_seqlens.tolist()[0] == 0
    return rms(write.key) > 1


def uses_a_boolean_mask(self, write):
    score = rms(write.key)
    score[write.positions.expand_as(score) < 4] = 2.0
    return score > 1


def uses_a_list(self, write):
    return (rms(write.key) > 1) & (write.positions >= torch.tensor([4, 5]).max())


def compares_nan(self, write):
    return rms(write.key / write.key.norm(dim=-1, keepdim=True)) * rms(write.key) > 1


def wrong_shape(self, write):
    return good_admit(self, write).T


def wrong_dtype(self, write):
    return good_admit(self, write).float()


def wrong_device(self, write):
    return good_admit(self, write).to("meta")


def mutates_its_input(self, write):
    return rms(write.key.mul_(2)) > 1


def counts_heads_locally(self, write):
    local = torch.arange(write.key.shape[0])[:, None]
    return rms(write.key) > 1 + 0.1 * local


def admits_nothing(self, write):
    return rms(write.key) < 0


def uses_repeat_interleave(self, write):
    sizes = write.cu_seqlens.diff()
    return (rms(write.key) > 1) & (torch.repeat_interleave(sizes, sizes) > 0)


def raises(self, write):
    return rms(write.hidden) > 1


def broken(base, **members):
    """A frozen policy with the given methods; its class is named after the first."""
    name = next(iter(members.values())).__name__
    return attrs.frozen(kw_only=True)(type(name, (base,), members))()


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (looks_ahead, "causal"),
        (depends_on_the_cut, "cut"),
        (depends_on_the_batch, "batch"),
        (depends_on_the_pack_order, "pack order"),
        (keeps_state, "stateless"),
        (remembers_other_calls, "no host sync"),
        (uses_item, "no host sync"),
        (uses_bool, "no host sync"),
        (uses_cpu, "no host sync"),
        (uses_tolist, "no host sync"),
        (uses_a_boolean_mask, "no host sync"),
        (uses_a_list, "no host sync"),
        (uses_repeat_interleave, "no host sync"),
        (compares_nan, "no NaN"),
        (wrong_shape, "shape"),
        (wrong_dtype, "dtype"),
        (wrong_device, "device"),
        (mutates_its_input, "inputs unchanged"),
        (counts_heads_locally, "heads"),
        (admits_nothing, "takes effect"),
        (raises, "runs"),
    ],
)
def test_broken_admission_is_rejected(method, rule):
    policy = broken(Admission, admit=method)
    with pytest.raises(ConformanceError, match=f"^{method.__name__} breaks '{rule}': wanted"):
        check_admission(policy)


def test_policy_that_can_change_is_rejected():
    class Loose(Admission):
        admit = good_admit

    with pytest.raises(ConformanceError, match="^Loose breaks 'frozen': wanted"):
        check_admission(Loose())


def test_tensor_field_that_takes_part_in_equality_is_rejected():
    @attrs.frozen
    class Weighed(Admission):
        weight: torch.Tensor = attrs.field(factory=lambda: torch.ones(3))
        admit = good_admit

    with pytest.raises(ConformanceError, match="^Weighed breaks 'comparable': wanted"):
        check_admission(Weighed())


def test_neutral_admission_that_drops_is_rejected():
    policy = attrs.frozen(type("Liar", (Admission,), {"admit": good_admit, "neutral": True}))()
    with pytest.raises(ConformanceError, match="^Liar breaks 'neutral': wanted"):
        check_admission(policy)


def test_undeclared_need_is_unknown():
    policy = attrs.frozen(
        type("Curious", (Admission,), {"admit": good_admit, "needs": frozenset({"logits"})})
    )()
    with pytest.raises(ConformanceError, match="^Curious breaks 'needs': wanted"):
        check_admission(policy)


def test_error_holds_rule_and_policy():
    policy = broken(Admission, admit=looks_ahead)
    with pytest.raises(ConformanceError) as caught:
        check_admission(policy)
    assert (caught.value.rule, caught.value.policy) == ("causal", policy)
