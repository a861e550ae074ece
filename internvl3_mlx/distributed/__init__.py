"""Several processes as one: their group, their heartbeats and who does not answer."""
