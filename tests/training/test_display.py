"""The live view in a real pseudo-terminal, wide and narrow; plain and quiet where there is none."""

import codecs
import io
import json
import multiprocessing.connection
import os
import pty
import re
import signal
import sys
import termios

import pytest

from faults import child
from screen import Screen
from smoldpo.training import display
from smoldpo.training.display import flowed
from smoldpo.utils import progress

VIEW = ("pairs/s", "memory", "evaluated at step", "left")


class Terminal:
    """`smoldpo train` in a pseudo-terminal of forty lines, so many columns wide."""

    def __init__(self, width, model, data, folder, *more, **variables):
        child.prepare_server()
        self.width = width
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, width))
        self.process = child.start(
            "train", "--model", model, "--data", data, "--output-dir", folder / "run", "--dtype",
            "float32", "--max-new-tokens", 2, "--generate-prompts", 2, "--freeze-layers", 2,
            "--num-train-epochs", 4, "--eval-steps", 16, "--per-device-train-batch-size", 2,
            "--gradient-accumulation-steps", 1, "--cache", "off", *more,
            log=folder / "said.txt", terminal=os.ttyname(theirs),
            environment={"TERM": "xterm-256color", "XDG_CACHE_HOME": str(folder / "cache")}
            | {"NO_COLOR": "", "COLUMNS": "", "LINES": ""} | variables,
        )  # fmt: skip
        wait_for = self.process.process.sentinel
        self._ready = lambda: multiprocessing.connection.wait([self._ours, wait_for])
        self._theirs = theirs

    def _pieces(self):
        """What it writes, as it comes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        while self._ours in self._ready():
            yield decoder.decode(os.read(self._ours, 4096))

    def watch(self, until=None):
        """The screen at the end, all that was written, and the screen after each piece of output.

        `until`: what the screen shows when Ctrl-C is pressed.
        """
        screen, written, seen = Screen(self.width), "", []
        rest = ""
        for piece in self._pieces():
            written += piece
            rest += piece
            # An escape sequence may be cut in two.
            cut = rest.rfind("\x1b")
            complete = cut < 0 or re.match(r"\x1b\[\??[0-9;]*[A-Za-z]", rest[cut:])
            whole = len(rest) if complete else cut
            screen.feed(rest[:whole])
            rest = rest[whole:]
            seen.append(list(screen.lines))
            if until is not None and until(screen):
                until = None
                self.process.signal(signal.SIGINT)
        os.close(self._ours)
        os.close(self._theirs)
        assert "Traceback" not in written, written
        return screen, written, seen


def squeezed(text):
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("width, variables", [(80, {}), (40, {"NO_COLOR": "1"})])
def test_a_run_on_a_terminal(width, variables, tiny_folder, pairs_file, tmp_path):
    terminal = Terminal(width, tiny_folder, pairs_file, tmp_path, **variables)
    screen, written, seen = terminal.watch()
    assert terminal.process.wait() == 0, "\n".join(screen.lines)
    # While it trains: everything is there, and no line of the view is wider than the terminal.
    during = [lines for lines in seen if any("pairs/s" in line for line in lines)]
    assert during
    views = ["\n".join(lines) for lines in during]
    assert any(all(word in view for word in VIEW) for view in views), views[-1]
    for title in ("loss", "accuracy", "margin"):
        assert any(re.search(rf"{title} [-\d]", view) for view in views)
    assert any(re.search(r"training\s.*\d+/\d+ left", view) for view in views), views[-1]
    for view in views:  # one view at a time, whole
        assert view.count("pairs/s") == 1 and view.count("memory") <= 1, view
    # At its end: it is gone, and all that the run says is there, whole and in its order.
    end = "\n".join(screen.lines)
    for word in ("pairs/s", "memory", "evaluated at", "━━━━ "):
        assert word not in end, end
    assert screen.cursor_shown
    assert bool(re.findall(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", written)) == (not variables), "colours"
    text = squeezed("".join(line.ljust(width) for line in screen.lines))
    metrics = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len([row for row in metrics if "loss" in row]) > 50
    at = 0
    for said in (
        "data: ", "split: ", "precision: float32, as asked; cpu, 2 threads", "trains: ",
        "layers 0-1", "layers 2-3", "final norm", "engine: fast",
        "prefers the human-preferred answer", "implicit reward", "Policy:", "Run folder: ",
    ):  # fmt: skip
        found = text.find(squeezed(said), at)
        assert found >= 0, f"{said!r} is missing or out of order in\n{end}"
        at = found


def test_ctrl_c_on_a_terminal_says_so_and_leaves_a_clean_screen(tiny_folder, pairs_file, tmp_path):
    terminal = Terminal(80, tiny_folder, pairs_file, tmp_path, "--max-steps", 5000)
    screen, _, _ = terminal.watch(until=lambda s: any("pairs/s" in line for line in s.lines))
    assert terminal.process.wait() == 130
    end = [line for line in screen.lines if line.strip()]
    assert not any("pairs/s" in line or "memory" in line or "training ━" in line for line in end)
    assert sum(line.startswith("stopping: what is finished is saved first") for line in end) == 1
    assert "interrupted after" in "".join(end) and "smoldpo resume" in squeezed(
        "".join(end)
    ).replace("smoldporesume", "smoldpo resume")
    assert screen.cursor_shown


def test_off_a_terminal_it_is_the_plain_line(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with display.training("training", 3) as advance:
        advance(1, note="loss 0.5")
        advance(2)
    assert re.fullmatch(r"training: 1 of 3, about \d+ s left loss 0.5\n", capsys.readouterr().err)


def test_silence_holds_on_a_terminal_too(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.silenced(), display.training("training", 3) as advance:
        advance(3)
        progress.urgent("nobody hears")
    assert capsys.readouterr() == ("", "")


def test_within_another_display_it_is_a_line_of_that(monkeypatch):
    """As of a run that is one of several."""
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar("runs", 2) as runs, display.training("training", 3) as advance:
        advance(1, note="loss 0.5")
        runs(1)
        titles = [task.description for task in progress._live.tasks]
    assert titles == ["runs", "training"] and not progress.is_drawing()


def shown(view, width):
    """The view as plain lines."""
    from rich.console import Console

    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    now = {"loss": 12.3456, "rewards/accuracies": 0.5, "rewards/margins": -10.25}
    now |= {"pairs": 8, "seconds": 0.5}
    last = {f"eval_{name}": value for name, value in now.items()} | {"step": 1200}
    view = display.View("training", 12_345, lambda: now, lambda: last)
    view.advance(1)
    lines = shown(view, width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(lines)
    if width > 20:
        for said in ("loss 12.3456", "accuracy 0.50", "margin -10.250", "16.0 pairs/s", "memory"):
            assert said in text, said
        assert "evaluated at step 1,200: loss 12.3456" in text and "1/12,345" in text


def test_a_loss_without_a_reference_shows_log_probabilities():
    now = {"loss": 1.0, "logps/accuracies": 0.25, "logps/margins": 2.0, "logps/chosen": -3.0}
    view = display.View("training", 3, lambda: now | {"pairs": 1, "seconds": 1}, dict)
    assert "accuracy" not in " ".join(shown(view, 80)), "nothing before the first step"
    view.advance(1)
    text = " ".join(shown(view, 80))
    assert "accuracy 0.25" in text and "margin 2.000" in text and "evaluated" not in text


def test_speed_is_that_of_the_last_steps():
    slow, fast = ({"loss": 0.0, "pairs": 8, "seconds": seconds} for seconds in (100.0, 2.0))
    steps = iter([slow] + 10 * [fast])
    view = display.View("training", 11, lambda: next(steps), dict)
    for _ in range(11):
        view.advance(1)
    assert "4.0 pairs/s" in " ".join(shown(view, 80))


def test_items_flow_and_are_never_broken():
    assert flowed(["one", "two", "three"], 8) == ["one  two", "three"]
    assert flowed(["one", "two"], 7) == ["one", "two"]
    assert flowed(["longer than that"], 5) == ["longer than that"] and flowed([], 9) == []


def test_the_view_may_be_drawn_in_the_middle_of_the_first_step():
    """Another thread draws; here the drawing comes when the step's figures are being taken in."""
    figures = {"loss": 0.5, "pairs": 4.0, "seconds": 2.0}
    view = display.View("training", 2, lambda: figures, dict)
    drawn = []

    class Drawn(display.deque):
        def append(self, item):
            drawn.append(view._step())
            super().append(item)

    view._steps = Drawn(maxlen=display.STEPS)
    view.advance(1)
    assert drawn == [[]] and view._step()[-1] == "2.0 pairs/s"
