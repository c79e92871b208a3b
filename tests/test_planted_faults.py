"""The list of planted faults still fits the package; scripts/planted_faults.py runs it."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import planted_faults


def test_every_fault_can_be_planted_and_names_tests_that_are_there():
    faults = planted_faults.read_faults()
    assert len({fault.name for fault in faults}) == len(faults) >= 60
    for fault in faults:
        text = (ROOT / fault.file).read_text()
        assert text.count(fault.before) == 1, f"{fault.name}: rewrite its `before`"
        assert fault.before != fault.after
        for test in fault.tests:
            file, _, function = test.partition("::")
            wanted = f"def {function.partition('[')[0]}("
            assert not function or wanted in (ROOT / file).read_text(), (fault.name, test)


def test_every_wing_has_faults():
    wings = {path.name for path in (ROOT / "smoldpo").iterdir() if path.is_dir()} - {"__pycache__"}
    planted = [fault.place.split("/")[0] for fault in planted_faults.read_faults()]
    assert wings == set(planted) and min(map(planted.count, wings)) >= 5
