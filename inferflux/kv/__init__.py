"""KV blocks in host memory: the arena they lie in, how a reader gets at it, and the digests that prove them."""
