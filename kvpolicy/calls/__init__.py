"""What happens between `begin` and `commit`: check, decide, write, select, attend, evict."""
