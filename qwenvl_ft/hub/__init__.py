"""Brings models from a hub, pushes them there, says what is wrong with a folder or a machine."""
