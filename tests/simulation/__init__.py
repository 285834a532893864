"""The real gateway, sessions, leases and tickets in virtual time, on a simulated network and engine (docs/chaos.md)."""
