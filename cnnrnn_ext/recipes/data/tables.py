"""Tables of the user's own: UTF-8 text, one row a line, tabs between the columns."""


def read_rows(path, bad, names, optional=()):
    """(place, columns) of each row; ``place`` is what to call it in a message ("names.tsv, line 3").

    names, optional: what the columns hold; the optional ones come last and are "" where a row ends before
    them. A first row that has all of ``names`` is a header: then the columns may stand in any order and
    among others. Empty lines and lines that begin with # are left out. Rows that are no UTF-8, have fewer or
    more columns, or nothing in one of ``names`` go to ``bad`` (:class:`files.BadFiles`). Raises OSError.
    """
    wanted = (*names, *optional)
    places, fewest, most = None, len(names), len(wanted)
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        place = f"{path}, line {number}"
        try:
            columns = [column.strip() for column in line.decode("utf-8").split("\t")]
        except UnicodeDecodeError:
            bad.add(place, "not UTF-8")
            continue
        if places is None:
            heads = [column.lower() for column in columns]
            if set(names) <= set(heads):
                places = [heads.index(name) if name in heads else len(heads) for name in wanted]
                fewest, most = 1 + max(places[: len(names)]), len(heads)
                continue
            places = range(len(wanted))
        if not fewest <= len(columns) <= most:
            expected = ", ".join((*names, *(f"perhaps {name}" for name in optional)))
            bad.add(place, f"expected {expected}, tabs between; got {len(columns)} column(s)")
            continue
        found = [columns[at] if at < len(columns) else "" for at in places]
        empty = [name for name, column in zip(names, found, strict=False) if not column]
        if empty:
            bad.add(place, f"no {empty[0]}")
            continue
        yield place, found
