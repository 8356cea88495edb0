"""The rule by which a decoder is served: kinds of layers, a probe, keys before RoPE, the table."""
