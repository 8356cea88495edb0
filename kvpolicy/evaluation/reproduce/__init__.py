"""Figures of WG-KV (arXiv 2512.17452) again: its settings, its figures, ours beside them."""
