"""Admission policies: what to write."""

from ._base import Admission as Admission
from ._base import AdmitAll as AdmitAll
from ._base import Write as Write
from .ada_ea import AdaEA as AdaEA
from .combine import AllOf as AllOf
from .combine import AnyOf as AnyOf
from .combine import all_of as all_of
from .combine import any_of as any_of
from .duo import DuoAttention as DuoAttention
from .kvzap import KVzap as KVzap
from .local import LocalAttention as LocalAttention
from .random_gate import RandomGate as RandomGate
from .write_gate import WriteGate as WriteGate
