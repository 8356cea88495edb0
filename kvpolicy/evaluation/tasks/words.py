"""Made-up things to ask about; keep them out of training data."""

from __future__ import annotations

COLOURS = ("amber", "silver", "crimson", "velvet", "copper", "ivory", "golden", "marble")
THINGS = ("lantern", "compass", "violin", "teapot", "falcon", "mirror", "anchor", "locket")
PEOPLE = (
    "Alice Brenner", "Boris Lindqvist", "Clara Nakamura", "Daniel Okafor", "Elena Petrova",
    "Felix Moreau", "Greta Santos", "Hassan Qureshi", "Ingrid Larsen", "Jonas Weber",
    "Keiko Tanaka", "Luis Herrera", "Marta Kowalska", "Nadia Haddad", "Oscar Jensen",
    "Priya Sharma", "Quentin Dubois", "Rosa Fontana", "Stefan Novak", "Teresa Silva",
)  # fmt: skip
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Cairo", "Boston", "Chicago",
    "Sydney", "Toronto", "Moscow", "Dublin", "Athens", "Mumbai", "Seattle", "Beijing", "Denver",
    "Houston",
)  # fmt: skip
