"""Records on disk, in files of any published form, and the values in them."""
