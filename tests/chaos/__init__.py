"""Process chaos: a real cluster under load, proven faults, and oracles that judge each of them (docs/chaos.md)."""
