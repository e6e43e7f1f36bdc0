"""Asks all questions of records, as `eval` does."""

from qwenvl_ft.evaluate.scoring import Sheet, ask_all, batches


def predictions_of(engine, records, batch_size, max_new_tokens=10, out=None, who="me"):
    sheet = Sheet.of(records, engine.chat)
    return ask_all(sheet, batches(engine, batch_size, max_new_tokens), [who, max_new_tokens], lambda *_: None, out, engine)
