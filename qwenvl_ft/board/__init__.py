"""The board: a local web page of runs, answers and data. Only cli imports this room."""
