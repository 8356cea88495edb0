"""The methods of docs/policies.md, in one list for every comparison."""
