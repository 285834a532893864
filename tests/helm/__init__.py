"""The chart on a cluster: everything an operator does with it, under load."""
