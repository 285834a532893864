"""Who may do what: API keys, stored hashed and pushed to gateways."""
