"""What a model is on disk: its files, its manifest, who signed it, and what it can do. No engine, no network."""
