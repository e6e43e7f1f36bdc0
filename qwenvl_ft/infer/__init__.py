"""Answers conversations: messages as people send them, the engine, files of questions."""
