"""One text or a few questions up close: what a cache kept, and what that changed."""
