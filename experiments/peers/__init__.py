"""The systems measured beside ours, on the same path in the same run: a file each.

A peer declares STORES (role of the host it wants for itself, or None) and start(bench), which returns an object with
`next_hop_mac` (where the generator sends frames) and `stop()`. One that the experiment `failover` loses hosts of also has
`take_over(dead, survivor)`: what its own switchover does besides the switch's. FORWARDS = False: no packets pass it.
What it cannot do is refused by `check(planned)` (`harness/checks.py`), before anything starts.
"""
