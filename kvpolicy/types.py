"""What policies are given; names of 0.1, now beside the policies and in `kvpolicy` itself."""

from .admission import Write as Write
from .eviction import EvictionView as EvictionView
