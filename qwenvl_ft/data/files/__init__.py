"""From a path to entries: each container of records that people have, one small module each."""
