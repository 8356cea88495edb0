"""Values of a policy's number: the one that gives a size, and those worth their bytes."""
