"""The gateway against OpenAI's own description of its API: `make test-api`."""
