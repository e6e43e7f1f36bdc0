"""When an answer counts as right: exactly, or by ChartQA's relaxed rule.

>>> relaxed("16.5", "16"), relaxed("17", "16"), relaxed("ferrari", "Ferrari"), relaxed("", "")
(True, False, True, False)
"""

TOLERANCE = 0.05  # of the wanted number; Source: Masry et al. 2022, ChartQA


def exact(answer: str, wanted: str) -> bool:
    """The same text, but for white space around it and the case of letters. An empty answer is wrong."""
    return bool(answer.strip()) and answer.strip().casefold() == wanted.strip().casefold()


def relaxed(answer: str, wanted: str) -> bool:
    """Numbers within 5 % of the wanted one, zero exactly; everything else as `exact`."""
    number, target = _number(answer), _number(wanted)
    if number is None or target is None:
        return exact(answer, wanted)
    return abs(number - target) <= TOLERANCE * abs(target)


def _number(text: str) -> float | None:
    """The number that the whole text is, a percent sign and thousands separators allowed."""
    try:
        number = float(text.strip().rstrip("%").replace(",", "").replace("_", "?"))  # 1_6 is no number, but Python's
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None  # "nan" and "infinity" are words here
