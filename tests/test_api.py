"""The public API: three names, nothing imported before it is used."""

import subprocess
import sys

import pytest

import qwenvl_ft
from tests.conftest import ROOT, SAMPLE, TINY


def test_the_public_names_work_and_import_no_torch():
    code = """
import sys
from qwenvl_ft import Engine, load_config, read_records
found = read_records("data/sample/train.json", "data/sample/images")
assert found.num_records == len(found.records) > 200 and not found.problems
assert load_config("configs/demo.yaml", ["lora_rank=8"]).lora_rank == 8
assert Engine.open.__doc__
heavy = {"torch", "transformers", "peft", "accelerate", "torchvision"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_the_package_alone_imports_nothing_of_it():
    code = "import sys, qwenvl_ft; assert not [name for name in sys.modules if name.startswith('qwenvl_ft.')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_engine_answers_what_a_record_asks():
    record = qwenvl_ft.read_records(SAMPLE / "eval.json", SAMPLE / "images", most=1).records[0]
    engine = qwenvl_ft.Engine.open(str(TINY))
    assert engine.ask(record.turns[:1], max_new_tokens=4) == engine.ask(
        [{"role": "user", "content": [{"image": str(record.pictures[0].source)}, record.turns[0].text]}], max_new_tokens=4
    )


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = qwenvl_ft.Engin
