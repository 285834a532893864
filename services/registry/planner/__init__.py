"""How many workers each pool should have, and who sees to it: pure decisions, one leader, one actuator."""
