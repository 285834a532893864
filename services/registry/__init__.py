"""Which workers and models there are: leases, records, and their snapshots for gateways."""
