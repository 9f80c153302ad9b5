"""Names of files and classes on one line of text: whatever a file system allows, no line and no encoding breaks."""

import re

_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LONG = {text: char for char, text in _SHORT.items()}
_CARRY = "surrogateescape"
_CARRIED = re.compile("[\\udc80-\\udcff]+")
_ESCAPED = re.compile(r"\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def escape(name: str) -> str:
    r"""The name on one line that any UTF-8 file, table or terminal takes.

    Control characters, line separators and the backslash become `\n`, `\u2028`, `\\` and the like; bytes that are not
    UTF-8 (which Python carries as lone surrogates) become `\xe9`. All other characters stay, in a shell without UTF-8
    too, where Python carries their bytes likewise: the same folder has the same name wherever it is read.
    """
    if _CARRIED.search(name):
        name = _CARRIED.sub(lambda run: run[0].encode(errors=_CARRY).decode(errors=_CARRY), name)
    if name.isprintable() and "\\" not in name:  # as nearly all are
        return name
    return "".join(map(_escape, name))


def unescape(text: str) -> str:
    """The name that `escape` was given; a backslash that begins no escape stands for itself."""
    return _ESCAPED.sub(lambda match: _unescape(match[0]), text)


def _escape(char: str) -> str:
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if char.isprintable():
        return char
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _unescape(text: str) -> str:
    if text in _LONG:
        return _LONG[text]
    code = int(text[2:], 16)
    return chr(code + 0xDC00 if text[1] == "x" else code)
