"""Facts about a folder on disk, each stated once: whole or not there, what is missing, which adapter, which base."""
