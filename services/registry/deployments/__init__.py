"""Models that are loaded and unloaded while the cluster runs."""
