"""How one trial is measured: a file each, with SETTINGS (its parameters and their defaults) and measure(bench) -> points."""
