"""inferctl and what it needs on one machine: model preparation, the local supervisor, an embedded Redis server."""
