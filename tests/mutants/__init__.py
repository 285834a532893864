"""Historical failures of serving systems, put into our code one at a time: tests must notice each (docs/chaos.md)."""
