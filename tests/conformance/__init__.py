"""What clients are promised, measured on a real cluster: one command each, `make test-conformance` for all."""
