"""How fast this machine is, how fast we are on it, and how far apart the two are."""
