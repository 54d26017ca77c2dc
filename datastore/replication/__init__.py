"""How does state survive the host it is on? Copies of partitions, and what a store does to keep them alike.

    frames        what stores send each other (compiled)
    link          what a store remembers of each peer and partition
    shipping      the primary's changes on their way to the backups (compiled; arrays in, arrays out)
    applying      what a backup does with them (compiled)
    completions   that an operation was done, and its answer, travel with them (compiled)
    holds         which answers wait for which changes to be committed (compiled)
    links         connections to the other stores (compiled, but for making them)
    replica       what a store host makes of the maps and leases it is given (pure)
    spokesman     what a store says to the coordinator, and takes from it (pure)

None but `links` opens a socket or looks at a clock: the store process and the simulator (`datastore/verification/simulator.py`)
run the same code, the one on a network, the other on an imagined one.
"""
