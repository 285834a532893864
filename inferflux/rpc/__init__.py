"""gRPC between our services: mTLS identities, a server that guards its handlers, channels, errors."""
