"""The policy document, section by section: what administrators write, and what gateways make of it."""
