"""The prefill worker: turns prompts into KV blocks and tickets."""
