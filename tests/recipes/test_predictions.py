import json

import pytest

from harness.predictions import decode_to_file

LENGTHS = [5, 1, 4, 2, 3]


def rows_of(batch):
    return [{"index": index, "text": f"é\u2028{index}"} for index in batch]


def test_inputs_of_like_length_share_a_batch_and_rows_come_in_order(tmp_path):
    batches = []

    def decode(batch):
        batches.append(batch)
        return rows_of(batch)

    rows = decode_to_file(tmp_path / "rows.jsonl", "index", range(5), LENGTHS, decode, batch_size=2)
    assert batches == [[1, 3], [4, 2], [0]]
    assert rows == rows_of(range(5))
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").split("\n")[:-1]] == rows


@pytest.mark.parametrize("cut", [1, 6, 20, 22, 25])
def test_an_interrupted_call_goes_on_wherever_its_last_line_was_cut(cut, tmp_path):
    path, calls = tmp_path / "rows.jsonl", []

    def decode(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows_of(batch)

    with pytest.raises(KeyboardInterrupt):
        decode_to_file(path, "index", range(5), LENGTHS, decode, batch_size=2)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 4
    # Bytes, so that a character may be cut in two as well.
    path.write_bytes(whole[:-cut])
    assert decode_to_file(path, "index", range(5), LENGTHS, decode, batch_size=2) == rows_of(range(5))
    # The batch of the cut line is decoded again, as a whole; the one before it is not. Without its end of line only,
    # a line is complete.
    assert calls[3:] == ([[0]] if cut == 1 else [[4, 2], [0]])


def test_fewer_inputs_leave_the_rows_of_the_others(tmp_path):
    path, calls = tmp_path / "rows.jsonl", []

    def decode(batch):
        calls.append(batch)
        return rows_of(batch)

    for count in (5, 2, 5):
        rows = decode_to_file(path, "index", range(count), LENGTHS[:count], decode, batch_size=2)
        assert rows == rows_of(range(count))
    assert len(calls) == 3
    assert [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] == rows_of(range(5))
