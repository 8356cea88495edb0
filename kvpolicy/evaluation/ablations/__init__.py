"""Short trainings of one recipe that differ in one thing, and what that thing is worth."""
