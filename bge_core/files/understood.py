"""What prepare.py understood of each file: columns, a sample, what was kept and what was lost, in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bge_core.files.cells import HTML, RawPair
from bge_core.files.columns import Columns, holds_yes_and_no

MAX_SHOWN = 5
LOSS_TO_WARN_OF = 0.1


@dataclass
class Understood:
    """What was understood of one file. All counts are of rows."""

    path: Path
    columns: dict[str, list[str]] = field(default_factory=dict)  # what they are taken as -> which
    sample: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    answers: int = 0  # texts in the rows that are kept
    negatives: int = 0  # rows whose answers became negatives of their question
    lost: Counter[str] = field(default_factory=Counter)  # why -> how many
    html: int = 0
    has_scores: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def add_columns(self, columns: Columns, values: Mapping[str, Sequence[Any]]) -> None:
        """Take in how a table's columns were understood; `values`: some cells of each."""
        self.has_scores |= columns.is_score
        question = " or ".join(columns.question) + (f" + {columns.appended}" if columns.appended else "")
        used = {*columns.question, columns.appended, columns.answer, *columns.negatives, *columns.similar, *columns.off}
        unused = [name for name in values if name.strip() and name not in used and name != columns.label]
        label = f"{columns.label} ({'by --min_label' if columns.is_score else 'yes: pair, no: negative'})"
        roles = {
            "question": [question, *(f"{name} (each)" for name in columns.similar)],
            "answer": [columns.answer],
            "negatives": list(columns.negatives),
            "label": [label] if columns.label else [],
            "in use": list(columns.off),
            "not taken": unused,
        }
        for role, names in roles.items():
            known = self.columns.setdefault(role, [])
            known += [name for name in (" ".join(name.split()) for name in names) if name not in known]
        for name in unused:
            if columns.label is None and holds_yes_and_no(values[name]):
                self.note(
                    f"'{name}' says yes or no and was not taken; if it says whether the answer fits, name it label"
                )

    def count(self, pair: RawPair) -> None:
        """Take in a row."""
        self.rows += 1
        texts = [*pair.questions, *pair.answers, *pair.negatives]
        if html := next(filter(None, map(HTML.search, texts)), None):
            self.html += 1
            if self.html == 1:
                self.sample["HTML"] = html.string[max(html.start() - 10, 0) :][:40]
        if pair.problem:
            self.lost[pair.problem] += 1
        elif pair.is_negative:
            self.negatives += 1
        else:
            self.answers += sum(map(bool, pair.answers))
        if not pair.problem and not pair.is_negative and "question" not in self.sample:
            answer = next(filter(None, pair.answers))
            negatives = {"negative": pair.negatives[0][:60]} if pair.negatives else {}
            self.sample |= {"question": pair.questions[0][:60], "answer": answer[:60]} | negatives

    @property
    def kept(self) -> int:
        """How many rows gave pairs."""
        return self.rows - self.negatives - self.lost.total()

    def as_entry(self) -> dict[str, Any]:
        """The facts for the manifest."""
        columns = {role: names for role, names in self.columns.items() if names}
        counts = {"rows_kept": self.kept, "rows_negative": self.negatives, "rows_lost": dict(self.lost)}
        return {"columns": columns, "sample": self.sample, **counts, "rows_with_html": self.html, "notes": self.notes}


def summarize(files: Sequence[Understood]) -> list[str]:
    """A block of lines for all files of one layout, then a warning of those that lose many rows."""
    layouts: dict[str, list[Understood]] = {}
    for file in files:
        layouts.setdefault(repr(file.columns), []).append(file)
    lines = [line for alike in layouts.values() for line in _block(alike)]
    losing = [file for file in files if file.lost.total() > file.rows * LOSS_TO_WARN_OF]
    if losing:
        shown = [f"{f.path} {f.lost.total():,} of {f.rows:,} ({_reasons(f.lost)})" for f in losing[:MAX_SHOWN]]
        more = f" and {len(losing) - MAX_SHOWN} more files" * (len(losing) > MAX_SHOWN)
        lines.append(f"warning: more than a tenth of the rows is lost: {', '.join(shown)}{more}")
    return lines


def _block(files: Sequence[Understood]) -> list[str]:
    first = next((file for file in files if "question" in file.sample), files[0])
    names = ("rows", "kept", "answers", "negatives")
    rows, kept, answers, negatives = (sum(getattr(file, name) for file in files) for name in names)
    lost = sum((file.lost for file in files), Counter[str]())
    counts = [f"{rows:,} rows", f"{kept:,} kept"]
    counts += [f"{negatives:,} as negatives"] * bool(negatives)
    counts += [f"{lost.total():,} lost ({_reasons(lost)})"] * bool(lost)
    title = f"{first.path}" if len(files) == 1 else f"{len(files)} files, as {first.path}"
    lines = [f"{title}: {', '.join(counts)}"]
    several = {"answer": f" ({answers / kept:.1f} texts a row)"} if answers > kept else {}
    roles = [
        (role, ", ".join(name[:50] for name in taken) + several.get(role, ""))
        for role, taken in first.columns.items()
        if taken
    ]
    lines += [f"  {role:<10} {taken}" for role, taken in roles]
    if "question" in first.sample:
        sample = [first.sample[name] for name in ("question", "answer", "negative") if name in first.sample]
        lines.append(f"  {'sample':<10} {' | '.join(sample)}")
    html = sum(file.html for file in files)
    if html:
        example = next(file.sample["HTML"] for file in files if file.html)
        lines.append(f"  {'HTML':<10} in {html:,} row{'s' * (html > 1)}, as '{example}'; --strip_html cleans it")
    notes = list(dict.fromkeys(note for file in files for note in file.notes))
    lines += [f"  {'note':<10} {note}" for note in notes[:MAX_SHOWN]]
    return lines + [f"  {'':<10} and {len(notes) - MAX_SHOWN} more notes"] * (len(notes) > MAX_SHOWN)


def _reasons(lost: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in lost.most_common(MAX_SHOWN))
