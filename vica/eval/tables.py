"""Reads MMBench's tables of tab-separated values, whose pictures stay in the file, and writes its server's
spreadsheets."""

import base64
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from ..utils.errors import ViCAError

PARTS = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml"'
    ' ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml"'
    ' ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship'
    ' Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"'
    ' Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    ' xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": "<Relationships"
    ' xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="rId1"'
    ' Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet"'
    ' Target="worksheets/sheet1.xml"/></Relationships>',
}
# characters that a model may write and XML may not hold
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LONGEST_CELL = 32767


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a table of tab-separated values, each with its byte position in the file."""
    with open(path, "rb") as file:
        rows = _rows(file)
        heading = next(rows, [])
        while True:
            place = file.tell()
            row = next(rows, None)
            if row is None:
                return
            if len(row) not in (0, len(heading)):
                raise ViCAError(f"{path}: the row at byte {place} has {len(row)} values, its heading {len(heading)}")
            if row:
                yield place, dict(zip(heading, row))


def read_picture(path: Path, place: int, column: str) -> bytes:
    """Returns the base64 picture of the row that begins at byte `place`."""
    with open(path, "rb") as file:
        heading = next(_rows(file))
        file.seek(place)
        return base64.b64decode(next(_rows(file))[heading.index(column)])


def _rows(file) -> Iterator[list[str]]:
    csv.field_size_limit(1 << 30)  # a picture is a field
    # readline reads no further than the current row, so file.tell() is the position of the next one
    return csv.reader((line.decode("utf-8-sig") for line in iter(file.readline, b"")), delimiter="\t")


def write_spreadsheet(path: Path, rows: Sequence[Sequence]) -> Path:
    """Writes an .xlsx of numbers, texts and empty cells. All texts are marked as such: an answer that begins with = is
    no formula."""
    lines = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in rows)
    sheet = (
        f'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{lines}</sheetData>'
    )
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        for name, text in {**PARTS, "xl/worksheets/sheet1.xml": sheet + "</worksheet>"}.items():
            part = ZipInfo(name)  # without today's date: equal answers give equal files
            part.compress_type = ZIP_DEFLATED
            file.writestr(part, '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n' + text)
    return path


def _cell(value) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    text = escape(NO_XML.sub("", value)[:LONGEST_CELL])
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
