"""How does state survive the host it is on? Copies of partitions, who holds them, and who says so.

    shipping      the primary's changes on their way to the backups, frame by frame (compiled; arrays in, arrays out)
    holds         which answers wait for which changes to be committed (compiled)
    replica       what a store host makes of the maps and leases it is given (pure)
    coordinator   who is primary, who is backup, who is learning; leases; failures and moves (pure)

None of them opens a socket or looks at a clock: the store process and the simulator (`datastore/verification/simulator.py`)
run the same code, the one on a network, the other on an imagined one.
"""
