"""scripts/recorded_runs.py and scripts/markdown_table.py, which all studies share."""

from dataclasses import dataclass, replace

import pytest
from markdown_table import markdown_table
from recorded_runs import RecordedRuns


@dataclass
class Run:
    name: str
    steps: int
    loss: float
    diverged: bool
    left_out: dict[str, list[str]]


ONE = Run("plain", 300, 0.1 + 0.2, True, {})
OTHER = Run('a, "b"', 300, float("inf"), False, {"a | b": ["x.0", "x.1"]})


def test_runs_come_back_as_they_were_and_new_ones_are_added(tmp_path):
    file = tmp_path / "runs.csv"
    RecordedRuns(file, Run).append(ONE)
    record = RecordedRuns(file, Run, {"steps": 300})
    record.append(OTHER)
    assert record.runs == RecordedRuns(file, Run).runs == [ONE, OTHER]
    assert file.read_text().count("name,steps,loss") == 1


@pytest.mark.parametrize("left", ["na", "name,steps,loss,diverged,left_out\npla"])
def test_what_was_half_written_is_dropped(tmp_path, left):
    file = tmp_path / "runs.csv"
    file.write_text(left)
    record = RecordedRuns(file, Run)
    assert record.runs == []
    record.append(ONE)
    assert RecordedRuns(file, Run).runs == [ONE]


def test_runs_of_other_settings_or_columns_are_refused_and_stay(tmp_path):
    file = tmp_path / "runs.csv"
    RecordedRuns(file, Run).append(ONE)
    with pytest.raises(SystemExit, match="runs with steps = 300, this study has 5"):
        RecordedRuns(file, Run, {"steps": 5})
    before = file.read_text().replace("loss", "gain")
    file.write_text(before)
    with pytest.raises(SystemExit, match=r"runs\.csv has other columns"):
        RecordedRuns(file, Run)
    assert file.read_text() == before


def test_studies_that_share_a_file_have_settings_of_their_own(tmp_path):
    file = tmp_path / "runs.csv"
    RecordedRuns(file, Run).append(ONE)
    other = RecordedRuns(file, Run, {"name": OTHER.name, "steps": 5}, study="name")
    assert other.runs == []
    other.append(replace(OTHER, steps=5))
    assert RecordedRuns(file, Run, {"name": "plain", "steps": 300}, study="name").runs == [ONE]
    with pytest.raises(SystemExit, match="runs with steps = 300, this study has 5"):
        RecordedRuns(file, Run, {"name": "plain", "steps": 5}, study="name")


def test_a_table_has_words_on_the_left_and_numbers_on_the_right():
    rows = [("one", "1.5", "yes"), ("a|b", "20", "no")]
    assert markdown_table(("name", "count", "done"), rows, ("name", "done")) == (
        "| name | count | done |\n| --- | ---: | --- |\n| one | 1.5 | yes |\n| a\\|b | 20 | no |\n"
    )
    assert markdown_table(("name", "count"), [row[:2] for row in rows], padded=True) == (
        "| name | count |\n| ---- | ----: |\n| one  |   1.5 |\n| a\\|b |    20 |\n"
    )
