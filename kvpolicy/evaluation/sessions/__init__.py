"""One conversation with a model through a cache, and how its answers score."""
