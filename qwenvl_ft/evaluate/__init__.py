"""Asks every question of a meta-file and scores the answers."""
