"""Which host has which partition, who leads, and who lives: the coordinator, and how all others speak with it.

maps          groups of hosts by partition, under one epoch
heartbeats    what coordinator and stores tell each other
coordinator   who is primary, who is backup, who is learning; leases; failures and moves (pure)
attendance    whose process has ended, as its connection or its host says (pure)
switchover    where packets go while partitions change hosts (pure)
process       the coordinator on a network; `state_file`, `etcd`: where its state outlives it; `switch`: the controller
messages      the messages' JSON; `dialer`, `reporter`, `routed`: the other end of the coordinator's connections
report        what people are shown
"""
