"""Made-up things to ask about. Training draws on other words than evaluation."""

from __future__ import annotations

EVALUATION_OBJECTS = tuple(
    f"{colour} {thing}"
    for colour in ("amber", "silver", "crimson", "velvet", "copper", "ivory", "golden", "marble")
    for thing in ("lantern", "compass", "violin", "teapot", "falcon", "mirror", "anchor", "locket")
)
TRAINING_OBJECTS = tuple(
    f"{quality} {thing}"
    for quality in ("wooden", "purple", "hollow", "frozen", "painted", "rusty", "glass", "woollen")
    for thing in ("bridge", "helmet", "kettle", "engine", "ladder", "basket", "turtle", "trumpet")
)
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
