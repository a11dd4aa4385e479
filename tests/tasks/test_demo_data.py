import re

from hf_sara.tasks.demo_data import SIZES, make_demo_data
from hf_sara.tasks.e2e import group_by_mr, load_e2e


def test_the_demo_data_have_the_layout_and_the_sizes_that_they_claim(tmp_path):
    data = load_e2e(make_demo_data(tmp_path / "new" / "folder"))
    groups = {split: group_by_mr(part) for split, part in data.items()}
    assert [len(group) for group in groups.values()] == list(SIZES.values())
    assert all(len(texts) == 3 and len(set(texts)) == 3 for group in groups.values() for texts in group.values())
    # No test input stands in the training data.
    assert not set(groups["train"]) & (set(groups["validation"]) | set(groups["test"]))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    one, same, other = (make_demo_data(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    for name in SIZES:
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()


def test_every_text_tells_the_facts(tmp_path):
    data = load_e2e(make_demo_data(tmp_path))
    for mr, texts in group_by_mr(data["train"]).items():
        facts = dict(part.split(" : ") for part in mr.split(" | "))
        for text in texts:
            assert facts["name"] in text
            assert re.match(r"[A-Z]", text)
            assert text.endswith(" .")
            assert "  " not in text
            for key in ("food", "near"):
                assert facts.get(key, "") in text
