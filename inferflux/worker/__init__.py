"""What prefill and decode workers share: their life, their registration, admission of work, sessions and leases.

`main` is a worker process from start to end; `services.prefill` and `services.decode` add their servicers to it.
"""
