"""The decode worker: turns tickets into streams of tokens."""
