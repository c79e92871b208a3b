"""A terminal's screen, as far as our displays use one: what a person would see after some
output.
"""

import re

SEQUENCE = re.compile(r"\x1b\[\??([0-9;]*)([A-Za-z])")


class Screen:
    """Lines of `width` characters that scroll without end; a line that is full goes on in the
    next.
    """

    def __init__(self, width):
        self.width = width
        self.lines = [""]
        self.row = self.column = 0
        self.cursor_shown = True

    def feed(self, text):
        """Take some output, whole escape sequences alone."""
        at = 0
        while at < len(text):
            sequence = SEQUENCE.match(text, at)
            if sequence:
                self._control(sequence.group(2), sequence.group(1), sequence.group())
                at = sequence.end()
                continue
            self._put(text[at])
            at += 1

    def _control(self, kind, given, whole):
        count = int(given or 1) if given.isdigit() or not given else 1
        if kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "K":
            assert given == "2", whole
            self.lines[self.row] = ""
        elif kind in "hl":
            assert given == "25", whole
            self.cursor_shown = kind == "h"
        else:
            assert kind == "m", f"the screen does not know {whole!r}"

    def _put(self, character):
        if character == "\n":
            self._down()
        elif character == "\r":
            self.column = 0
        else:
            assert character >= " ", repr(character)
            if self.column == self.width:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self):
        self.row += 1
        while len(self.lines) <= self.row:
            self.lines.append("")
