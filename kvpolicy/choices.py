"""The words that arguments choose from, as types, so that a checker sees a wrong one."""

from __future__ import annotations

from typing import Literal

Phase = Literal["prompt", "decode"]  # of a call: queries read all, or select one by one
Generated = Literal["admission", "keep"]
When = Literal["prompt_end", "decode"]  # an eviction acts
AtCap = Literal["raise", "evict"]  # what happens where a cap is reached
Backend = Literal["auto", "reference", "triton"]
PageGroup = Literal["max", "mean", "each"]  # how query heads share a choice of pages
HeadGroup = Literal["mean", "max"]  # how query heads share a token's score
NumberGroup = Literal["mean", "max", "sum"]  # how query heads share what they add to its number
Accumulates = Literal["sum", "max"]  # what the number of a token is of the weights it was given
FloorForm = Literal["minimum", "window", "blend"]  # what AdaKV counts as a head's floor
Pooling = Literal["avg", "max"]
Normalize = Literal["visible", "global"]
PressReads = Literal["queries", "statistics", "hidden"]  # what stands for hidden states
