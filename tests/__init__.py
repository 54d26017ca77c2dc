"""Every part is tested here: `unit` needs no root and no network, `emulation` builds networks."""
