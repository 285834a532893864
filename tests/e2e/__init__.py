"""Real vLLM, the real model, real clients."""
