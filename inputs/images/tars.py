"""Reads labeled images from tars: with a CSV of labels, or the tars of image-net.org."""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable
from typing import IO, NamedTuple

from inputs.errors import InputError
from inputs.images import imagenet
from inputs.images.sources import (
    Class,
    Item,
    Source,
    is_picture,
    label_of,
    labels_of,
    make_parts,
    parse_label,
    read_classes,
    read_csv,
    stem,
)
from inputs.storage.files import (
    PassedOver,
    exists,
    file_state,
    is_left_over,
    open_bytes,
    parent,
)

MAX_LINKS = 40  # longest chain of links that is followed, as in Linux


class Member(NamedTuple):
    """Where a file lies in a tar, in bytes."""

    offset: int
    size: int


def tar_source(
    path: str, split: str, classes_csv: str, other_classes: list[Class] | None = None
) -> Source:
    """A tar of image files, or a tar of tars of them, one for each class.

    The labels are in a CSV of the same name, with the columns file and index; in a file beside the
    tar that `imagenet.find_labels` finds; or, in a tar of tars, in the names of the tars.

    Args:
        path: of the tar, which must not be compressed.
        split: "train" or "validation".
        classes_csv: the class list; "" for classes.csv beside the tar, or for the names of the
            classes in alphabetical order if there are labels without a CSV.
        other_classes: the class list of the other split, if it is known.

    Raises:
        InputError: a file, column or member is missing, or a label is outside the classes.
    """
    members = _read_members(path)
    passed_over = PassedOver()
    table = f"{os.path.splitext(path)[0]}.csv"
    folder = parent(path)
    if exists(table):
        listed = read_classes(classes_csv or os.path.join(folder, "classes.csv"))
        rows = _listed(path, table, listed, members)
        _visible(members.keys() - {name for name, *_ in rows}, passed_over, lambda name: False)
        return _source(path, split, rows, listed, passed_over)
    classes = read_classes(classes_csv) if classes_csv else imagenet.find_classes(folder)
    classes = classes or other_classes
    is_nested = any(map(_is_tar, members))
    names = _visible(members, passed_over, _is_tar if is_nested else is_picture)
    if is_nested:
        return _tar_of_tars(path, split, classes, members, names, passed_over)
    wnids = imagenet.find_labels(folder)
    # In a tar of class folders, none of the pictures is listed.
    if wnids is None or (names and not any(stem(name) in wnids for name in names)):
        raise InputError(
            f"--source: the labels of {path} are not known. Write {table} (columns file, index), "
            f"or put {' or '.join(imagenet.LABELS)} beside the tar. If the tar has class folders, "
            "unpack it and give the folder."
        )
    classes = classes or imagenet.sorted_classes(wnids.values())
    labels = labels_of(classes)
    rows = [(name, label_of(name, wnids, labels), members[name]) for name in names]
    return _source(path, split, rows, classes, passed_over)


def _is_tar(name):
    return name.endswith(".tar")


def _visible(
    names: Iterable[str], passed_over: PassedOver, wanted: Callable[[str], bool]
) -> list[str]:
    """The names of members that are wanted and no left-overs, sorted; counts the others."""
    found = []
    for name in sorted(names):
        if any(map(is_left_over, name.split("/"))):
            passed_over["hidden"] += 1
        elif wanted(name):
            found.append(name)
        else:
            passed_over.add(name)
    return found


def _listed(path, table, classes, members):
    """Returns (member, label, place) of each line of the CSV."""
    rows = []
    known: dict[str, int] = {}
    for line, row in read_csv(table, ("file", "index")):
        label = parse_label(row["index"], classes, f"{table}, line {line}, index")
        name = posixpath.normpath(row["file"])
        if name not in members:
            raise InputError(f"{table}, line {line}, file: {row['file']!r} is not in {path}.")
        if row.get("wnid", classes[label].wnid) != classes[label].wnid:
            raise InputError(
                f"{table}, line {line}, wnid: {row['wnid']!r}, but class {label} of the class "
                f"list is {classes[label].wnid!r}. The two count their labels differently."
            )
        if known.setdefault(name, label) != label:
            raise InputError(
                f"{table}, line {line}, file: {row['file']!r} has the label {label} here, but "
                f"{known[name]} in an earlier line. Remove one of the lines."
            )
        rows.append((name, label, members[name]))
    return rows


def _tar_of_tars(path, split, classes, members, names, passed_over) -> Source:
    wnids = [posixpath.basename(name).removesuffix(".tar") for name in names]
    classes = classes or [Class(wnid, wnid) for wnid in wnids]
    labels = labels_of(classes)
    rows = []
    with open_bytes(path) as file:
        for name, wnid in zip(names, wnids, strict=True):
            if wnid not in labels:
                raise InputError(f"--source: {path}:{name} is not a class of the class list.")
            found = _members_of(_Slice(file, members[name]), f"{path}:{name}")
            pictures = _visible(found, passed_over, is_picture)
            if not pictures:
                raise InputError(f"--source: {path}:{name} has no image.")
            for inner in pictures:
                place = Member(members[name].offset + found[inner].offset, found[inner].size)
                rows.append((f"{name}:{inner}", labels[wnid], place))
    return _source(path, split, rows, classes, passed_over)


def _source(path, split, rows, classes, passed_over) -> Source:
    def read(chosen):
        # Seeks to each file, because `tarfile` would read all headers again for each shard.
        with open_bytes(path) as file:
            for name, label, place, _ in chosen:
                file.seek(place.offset)
                yield Item(f"{path}:{name}", file.read(place.size), label)

    state = file_state(path)
    parts = make_parts(split, [(*row, state) for row in rows], read, path)
    return Source(split, parts, classes, passed_over=passed_over)


def _read_members(path) -> dict[str, Member]:
    try:
        with open_bytes(path) as file:
            return _members_of(file, path)
    except OSError as error:
        raise InputError(f"--source: {path} cannot be read ({error.strerror}).") from None


def _members_of(file: IO[bytes], where: str) -> dict[str, Member]:
    """The files in a tar by name; a link has the place of its target.

    Raises:
        InputError: the tar is damaged or cut, or a link leads to nothing.
    """
    members: dict[str, Member] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                if member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(
                        posixpath.join(posixpath.dirname(name), member.linkname)
                    )
                elif member.issparse():
                    raise InputError(f"--source: {where}:{name} is a sparse file. Unpack the tar.")
                elif member.isfile():
                    members[name] = Member(member.offset_data, member.size)
            end = archive.offset
        # `tarfile` also stops, without an error, at the end of the file and at a damaged header.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is cut or damaged at byte {end:,}: its end is missing")
    except tarfile.TarError as error:
        raise InputError(
            f"--source: {where} cannot be read as a tar ({error}). Decompress it if it is "
            "compressed; otherwise copy it again."
        ) from None
    targets = {name: _target(name, links, members) for name in links}
    for name, target in targets.items():
        if target in members:
            members[name] = members[target]
        elif is_picture(name):
            raise InputError(
                f"--source: {where}:{name} is a link to {target}, which is not in the tar."
            )
    return members


def _target(name, links, members) -> str:
    """The target of a link; a name that is not in `members` if the link is broken."""
    for _ in range(MAX_LINKS):
        if name in members or name not in links:
            break
        name = links[name]
    return name


class _Slice:
    """A part of a file, as a file object that `tarfile` can read."""

    def __init__(self, file: IO[bytes], place: Member):
        self._file = file
        self._place = place
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        self._file.seek(self._place.offset + self._position)
        data = self._file.read(max(0, min(size, self._place.size - self._position)))
        self._position += len(data)
        return data
