"""Attacks on a cluster that runs."""
