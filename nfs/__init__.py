"""What happens to packets: the network functions, one file each, and the dataplane that runs them."""
