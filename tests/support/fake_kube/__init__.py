"""A Kubernetes cluster of one node in one process, for tests: API server, controllers, and a kubelet.

Good enough for real helm, kubectl and the Python client. The kubelet starts what a chart renders as real processes of
this machine, each in a mount and process namespace of its own, with its command, environment, volumes, user, probes,
signals and grace periods; all that is missing of a container are limits of memory and CPU, and its own network: pods
have addresses in 127.0.0.0/8. See docs/adr/0015-pods-as-processes.md.
"""
