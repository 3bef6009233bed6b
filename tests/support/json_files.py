"""Whole and broken JSON files: what this package's check reports, and whether the hosts read
them."""

from __future__ import annotations

import json

ROWS = [{"a": "x\ny", "b": [{"c": i}]} for i in range(3)]
LINES = [json.dumps(row) for row in ROWS]
ARRAY = json.dumps(ROWS, indent=1)
#: The content of a file, and the refused line with a part of the reason; None if it passes.
FILES: dict[str, tuple[str, int | None, str]] = {
    "lines": ("\n".join(LINES), None, ""),
    "the first line cut": ("\n".join([LINES[0][:9], *LINES]), 1, "Unterminated string"),
    "the first line's start cut": ("\n".join([LINES[0][9:], *LINES]), 1, "Expecting value"),
    "the first line's start cut, to an array": ("\n".join([LINES[0][LINES[0].index("[") :], *LINES]), 1, "Expecting value"),
    "the first line alone, cut": (LINES[0][:9], 1, "Unterminated string"),
    # Line 2 reads on into line 3, and the whole breaks on line 4.
    "a line cut before a value": ("\n".join([LINES[0], '{"a": ', *LINES]), 2, "Expecting value"),
    "the last line cut": ("\n".join(LINES)[:-9], 3, "Expecting property name"),
    "a header": ("\n".join(["a,b", *LINES]), 1, "Expecting value"),
    "a comma after each line": (",\n".join(LINES), 1, "Expecting value"),
    "a number": ("\n".join([*LINES, "3"]), 4, "it is not one JSON object"),
    "a string": ("\n".join(['"a"', *LINES]), 1, "it is not one JSON object"),
    "an array": ("\n".join([*LINES, '["a"]']), 4, "it is not one JSON object"),
    "an array first": ("\n".join(['["a"]', *LINES]), 1, "it is not one JSON object"),
    "half a surrogate pair": ("\n".join([*LINES, '{"a": "\\ud800"}']), 4, "JSON parse error: The surrogate pair in string is invalid"),
    "a surrogate pair": ("\n".join([*LINES, '{"a": "\\uD83D\\uDE00"}']), None, ""),
    "a raw line end": ("\n".join([*LINES, '{"a": "x\ny"}']), 4, "Unterminated string"),
    "blank lines": ("\n \n" + "\n\t\n".join(LINES) + "\n\n", None, ""),
    "a broken line among blank ones": ("\n\n" + "\n\n".join([*LINES, "b"]), 9, "Expecting value"),
    "line ends of Windows": ("\r\n".join(LINES), None, ""),
    "NaN": ("\n".join([*LINES, '{"a": "x", "d": NaN, "e": -Infinity}']), None, ""),
    "null": ("\n".join([*LINES, "null"]), None, ""),
    "two on a line": (LINES[0] + LINES[1] + "\n" + LINES[2], None, ""),
    "a byte order mark": ("\ufeff" + "\n".join(LINES), None, ""),
    "an array on a line": (json.dumps(ROWS), None, ""),
    "an array over lines": (ARRAY, None, ""),
    "an array of a row a line": ("[\n" + ",\n".join(LINES) + "\n]\n", None, ""),
    "an array, cut": (ARRAY[:-9], ARRAY[:-9].count("\n") + 1, "Expecting"),
    "an array of a row a line, cut": ("[\n" + ",\n".join(LINES), 4, "Expecting ',' delimiter"),
    "an object over lines": (json.dumps(ROWS[0], indent=1), None, ""),
    "objects over lines": ("\n".join(json.dumps(row, indent=1) for row in ROWS), None, ""),
    "an object of lists": ('{"a":\n [1],\n "b": [2]}', None, ""),
}  # fmt: skip
