"""The five deployables. They share code through `inferflux` and meet in `protos`, never in imports."""
