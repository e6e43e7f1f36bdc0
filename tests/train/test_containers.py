"""A tar and a parquet file train as they are: to the very weights of loose files, and a run of them knows when they change."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.errors import UserError
from tests.conftest import SAMPLE
from tests.runs import config, few_records, run, same


def packed(records: Path, folder: Path) -> dict[str, Path]:
    """The records of a documented meta-file and their pictures, in a tar and in a parquet file."""
    rows = []
    with tarfile.open(folder / "train.tar", "w") as tar:
        for at, record in enumerate(json.loads(records.read_text())):
            name = record["conversations"][0]["value"].split("<img>")[1].split("</img>")[0]
            picture = (SAMPLE / "images" / name).read_bytes()
            for file, content in ((f"{Path(name).stem}.json", json.dumps(record).encode()), (name, picture)):
                member = tarfile.TarInfo(f"{at:03}/{file}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            turns = [{**turn, "value": turn["value"].replace(f"<img>{name}</img>", "<image>")} for turn in record["conversations"]]
            rows.append({"conversations": turns, "image": {"bytes": picture, "path": name}})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=3)
    return {"tar": folder / "train.tar", "parquet": folder / "train.parquet"}


def test_they_train_to_the_weights_of_loose_files(tmp_path):
    off = {"share_prefix": "off"}  # a tar and a table hold a picture with each of its records, so none is shared
    loose = run(tmp_path, "loose", **off)
    for name, file in packed(few_records(tmp_path), tmp_path).items():
        settings = {"train_meta_file": file, "train_data_dir": None, "dataloader_num_workers": int(name == "parquet"), **off}
        assert same(loose, run(tmp_path, name, **settings)), name


def test_a_run_does_not_go_on_with_another_file_under_their_name(tmp_path):
    file = packed(few_records(tmp_path), tmp_path)["tar"]
    settings = {"train_meta_file": file, "train_data_dir": None, "max_steps": 1}
    run(tmp_path, **settings)
    run(tmp_path, resume=True, **settings)
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        first = next(member for member in tar if not member.name.endswith("json"))
    content[first.offset_data + first.size // 2] ^= 1
    file.write_bytes(content)
    assert prepare(config(tmp_path, **settings)).num_records
    with pytest.raises(UserError, match="the pictures changed: what is in them"):
        run(tmp_path, resume=True, **settings)
