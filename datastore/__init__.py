"""Where the state of the network functions lives: the store itself and the placements that decide which host has what."""
