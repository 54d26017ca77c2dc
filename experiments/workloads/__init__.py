"""What load the network functions see: the open-loop generator, the sink, and the probes of the store."""
