"""Which switch port a packet leaves by: the rules (pure) and the OpenFlow controller that installs them."""
