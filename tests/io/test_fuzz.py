"""A short run of the fuzzer; the long ones are run by hand (see docs/spx.md)."""

from __future__ import annotations

import collections

import pytest

from tests.io import fuzz_spx


def test_cases_follow_from_their_numbers(tmp_path):
    files = fuzz_spx.corpus(tmp_path, "read")
    assert [fuzz_spx.make_case(number, files) for number in range(20)] == [
        fuzz_spx.make_case(number, files) for number in range(20)
    ]


def test_damaged_files_load_or_give_one_error(tmp_path):
    files = fuzz_spx.corpus(tmp_path, "read")
    path = tmp_path / "case.spx"
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(1500):
        path.write_bytes(fuzz_spx.make_case(number, files))
        outcomes[fuzz_spx.attempt(path, "read")] += 1
    # Both outcomes must occur, and many kinds of refusal: otherwise the mutations do not reach the checks.
    assert outcomes["accepted"] > 50
    assert len(outcomes) > 60


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["load", "run"])
def test_a_minute_of_fuzzing(stage):
    summary = fuzz_spx.fuzz(minutes=1, stage=stage, first=10**6, out=None)
    assert summary["findings"] == 0, summary["first_findings"]
