"""Draws the pictures of data/sample and writes its two meta-files from data/sample/statistics.yaml.

Deterministic: the same statistics give the same bytes with the same Pillow.

    python scripts/draw_sample.py [--out data/sample]
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from charts import BAR_COLORS, PAPER_COLORS, UNIT, Style, draw_chart, spelled, width_of
from ruamel.yaml import YAML

SHORT = " Answer the question using a single word or phrase."
STATISTICS = Path(__file__).parent.parent / "data" / "sample" / "statistics.yaml"

# The two records of the documentation, word for word.
DOCUMENTED = {
    "two_col_103562.png": [
        ("As of 2021, how many championship titles had Ferrari won?" + SHORT, "16"),
        ("As of 2021, how many championship titles had Ferrari won?", "As of 2021, Ferrari had won 16 championship titles."),
    ],
    "two_col_2954.png": [
        (
            "What game topped the charts with 512.3 million hours watched on Twitch in the first half of 2019?" + SHORT,
            "League of Legends",
        ),
        (
            "What game topped the charts with 512.3 million hours watched on Twitch in the first half of 2019?",
            "The game that topped the charts with 512.3 million hours watched on Twitch in the first half of 2019 is League of Legends.",
        ),
        ("How many hours did League of Legends watch on Twitch in the first half of 2019?" + SHORT, "512.3"),
        (
            "How many hours did League of Legends watch on Twitch in the first half of 2019?",
            "In the first half of 2019, League of Legends was watched for a total of 512.3 hours on Twitch.",
        ),
    ],
}


def style_of(chart: dict[str, Any], rng: random.Random) -> Style:
    """Columns where they were asked for and the names are short enough for them, else bars with the value behind or before."""
    values = chart["values"]
    column = chart["kind"] == "column" and len(values) <= 4 and max(map(len, values)) <= 7
    kind = "column" if column else rng.choice(["bar", "bar", "label"])
    width = width_of(kind, values) + (0 if column else UNIT * rng.randrange(3))
    return Style(kind, width, rng.randrange(len(BAR_COLORS)), rng.randrange(len(PAPER_COLORS)))


def questions(chart: dict[str, Any], rng: random.Random) -> list[tuple[str, str]]:
    """Every question with a short answer that can be asked of a chart, in random order: values, names, the extremes."""
    values = chart["values"]
    asked = [(chart["how_many"].format(name=name), spelled(value)) for name, value in values.items()]
    asked += [(chart["which"].format(value=spelled(value)), name) for name, value in values.items()]
    asked += [(chart["most"], max(values, key=values.get)), (chart["least"], min(values, key=values.get))]
    rng.shuffle(asked)
    return [(question + SHORT, answer) for question, answer in asked]


def in_words(chart: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """A value question without the instruction, and its answer as a sentence."""
    name = rng.choice(list(chart["values"]))
    return chart["how_many"].format(name=name), chart["sentence"].format(name=name, value=spelled(chart["values"][name]))


def record(turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Turns in the documented format."""
    talk = []
    for ask, answer in turns:
        talk += [{"from": "user", "value": ask}, {"from": "assistant", "value": answer}]
    return {"conversations": talk}


def shown(chart: dict[str, Any], turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns with the chart's picture before the first question."""
    (ask, answer), *rest = turns
    return [(f"<img>{chart['file']}</img>\n{ask}", answer), *rest]


def training_records(charts: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Two records a chart, then pairs of pictures, pictures in a later turn, and no picture at all."""
    by_file = {chart["file"]: chart for chart in charts}
    records = [record(shown(by_file[file], turns)) for file, turns in DOCUMENTED.items()]
    for chart in charts:
        asked = questions(chart, rng)
        half = len(asked) // 2
        records.append(record(shown(chart, asked[:half] + [in_words(chart, rng)])))
        records.append(record(shown(chart, asked[half:])))
    for first, second in zip(charts[0::4], charts[1::4], strict=False):
        (ask_1, answer_1), (ask_2, answer_2) = questions(first, rng)[0], questions(second, rng)[0]
        pair = f"<img>{first['file']}</img>\n<img>{second['file']}</img>\n"
        records.append(record([(pair + ask_1, answer_1), (ask_2, answer_2)]))
    for first, second in zip(charts[2::4], charts[3::4], strict=False):
        records.append(record(shown(first, questions(first, rng)[:1]) + shown(second, questions(second, rng)[:2])))
    for chart in charts[::8]:
        question, sentence = in_words(chart, rng)
        value = next(spelled(value) for name, value in chart["values"].items() if chart["how_many"].format(name=name) == question)
        records.append(record([(f"{sentence} {question}{SHORT}", value)]))
    return records


def evaluation_records(charts: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Of each chart a value and a name, alone; of every fifth a sentence too."""
    records = []
    for number, chart in enumerate(charts):
        asked = questions(chart, rng)
        is_value = [answer in map(spelled, chart["values"].values()) for _, answer in asked]
        records.append(record(shown(chart, [asked[is_value.index(True)]])))
        records.append(record(shown(chart, [asked[is_value.index(False)]])))
        if number % 5 == 0:
            records.append(record(shown(chart, [in_words(chart, rng)])))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STATISTICS.parent)
    out = parser.parse_args().out
    (out / "images").mkdir(parents=True, exist_ok=True)
    charts = YAML(typ="safe").load(STATISTICS.read_text(encoding="utf-8"))
    rng = random.Random("sample")
    for chart in charts:
        names = list(chart["values"])
        rng.shuffle(names)  # else the largest would always come first
        chart["values"] = {name: chart["values"][name] for name in names}
        draw_chart(chart["title"], chart["values"], style_of(chart, rng)).save(out / "images" / chart["file"], optimize=True)
    for split, write in (("train", training_records), ("eval", evaluation_records)):
        records = write([chart for chart in charts if chart["split"] == split], rng)
        (out / f"{split}.json").write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
