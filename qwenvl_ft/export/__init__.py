"""The merge as a stream, its proof, the folder that comes of it."""
