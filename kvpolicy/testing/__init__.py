"""The conformance kit: does a new policy keep the contract that composition relies on?

    check_admission(policy), check_selection(policy), check_eviction(policy)

Each raises ConformanceError at the first broken property and returns None otherwise. Give the
sizes that the policy was made for, if it was made for some. docs/writing-a-policy.md says what the
properties mean.
"""

from ._common import ConformanceError as ConformanceError
from .admission import check_admission as check_admission
from .eviction import check_eviction as check_eviction
from .selection import check_selection as check_selection
