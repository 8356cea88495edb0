"""A real model, real texts and tasks that tell one cache policy from another."""
