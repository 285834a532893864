"""The only door for clients: authenticates, routes, relays tokens. Never imports an engine. Start with `flow.py`."""
