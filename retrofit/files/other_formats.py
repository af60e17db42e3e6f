"""What a file is that is no weights file, told by its first bytes, and what to do about it."""

from __future__ import annotations

from retrofit.tables import one_line

HEAD = 512  # bytes that tell
AGAIN = "copy or download it again"
FORMATS = {
    b"version https://git-lfs": "only Git LFS's pointer to the file: run git lfs pull",
    b"\x93NUMPY": (
        "one array of numpy, without a name: torch.save({name: torch.from_numpy(array)}, "
        "'weights.pth') with all of them"
    ),
    b"\x89HDF": "an HDF5 file, of Keras say: save its arrays as tensors by their names in torch",
    b"GGUF": "a GGUF file: its tensors are in a format of llama.cpp",
    **dict.fromkeys(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"7z\xbc\xaf", b"Rar!"),
        "compressed: unpack it, and give what is inside",
    ),
}


def other_format(head: bytes) -> str:
    """Say what a file is that begins so, and what to do; "" for what is not known."""
    if not head:
        return f"empty: {AGAIN}"
    if not any(head):
        return f"full of zeros: {AGAIN}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it, and give what is inside"
    known = next((text for magic, text in FORMATS.items() if head.startswith(magic)), "")
    return known or _text(head)


def _text(head: bytes) -> str:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not in a character that is cut off at the end
            return ""
        text = head[: error.start].decode()
    if not text.strip() or not all(c.isprintable() or c.isspace() for c in text):
        return ""
    page = text.lstrip().lower().startswith(("<!doctype html", "<html"))
    return (
        f"{'a web page' if page else 'text'}, {one_line(text)[:40]!r}, perhaps a server's message "
        "in its place: get the file itself"
    )
