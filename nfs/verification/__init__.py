"""The packet path on an imagined network, under imagined clocks: is what it promises of packets kept whatever goes wrong?

rings        ports that are memory: frames in, frames out, no network and no root
counted      the network function under test: it numbers the packets of a flow
claimed      the same, and it claims a name for each flow
instance     an NF process: the product's packet loop, client and orders, with its sockets in the simulator's hands
steering     the switch, which goes on with old rules for a while
packets      what was sent, what left, and what must hold of it
simulator    stores, coordinator, clients (`datastore/verification/`) and all these together, from one seed
"""
