"""What a run folder is swept of, and what a run's fingerprint sees of its pairs."""

from smoldpo.training.fingerprint import _numbers
from smoldpo.training.run_folder import make_folder, remove_partial_files
from smoldpo.types import PairNumbers, PreferencePair


def test_leftovers_of_kills_are_swept_and_nothing_else(tmp_path):
    (tmp_path / ".model-x1y2").mkdir()
    (tmp_path / ".model-x1y2" / "model.safetensors").write_bytes(b"half")
    for name in (".evaluation.json.4242", ".mine", "evaluation.json", ".config.yaml.7"):
        (tmp_path / name).write_text("")
    (tmp_path / "model").mkdir()
    remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "evaluation.json", "model"]


def test_a_pairs_own_numbers_are_part_of_what_a_run_began_with():
    plain = PreferencePair("p", "c", "r")
    assert _numbers(plain) == ""
    heavy, other = (
        PreferencePair("p", "c", "r", numbers=PairNumbers(weight=w)) for w in (2.0, 3.0)
    )
    assert len({_numbers(plain), _numbers(heavy), _numbers(other)}) == 3


def test_a_new_run_leaves_of_the_pairs_handed_over_its_own(tmp_path):
    def fresh():
        for name in (
            "given/a.jsonl",
            "given/b.jsonl",
            "given/.half/pairs.jsonl",
            "config.yaml",
            "mine",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)

    def left():
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())

    for sources, kept in (
        ([str(tmp_path / "given" / "a.jsonl"), ""], ["given/a.jsonl", "mine"]),
        (["builtin", ""], ["mine"]),
        ([str(tmp_path)], ["mine"]),
        (
            [str(tmp_path / "given")],
            ["given/.half/pairs.jsonl", "given/a.jsonl", "given/b.jsonl", "mine"],
        ),
    ):
        fresh()
        make_folder(tmp_path, sources)
        assert left() == kept, sources
