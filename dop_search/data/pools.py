"""Samples of a source by row number, made when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dop_search.data.images import read_image
from dop_search.data.samples import IMAGE_PLACE, Sample, without_places
from dop_search.data.sources import DatasetSource, Location, Origin, Source, TaskSource
from dop_search.data.tables import check_reachable, load_table, need_columns
from dop_search.data.tasks import scored_origin, task_fields, task_file, task_location, task_on
from dop_search.utils.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def open_pool(source: Source) -> Pool:
    """Load what a source names; DataError if it cannot be loaded, lacks a column, or is what its own task scores."""
    return TaskPool(source) if isinstance(source, TaskSource) else DatasetPool(source)


def location_of(source: Source) -> Location:
    """The data set that a source reads, its task's own where it names none; DataError if neither names one."""
    if isinstance(source, DatasetSource):
        return Location(source.path, source.name, source.data_files, source.revision)
    file = task_file(source.task)
    fields = task_fields(file)
    if source.dataset_path is not None:
        return Location(source.dataset_path, source.dataset_name, source.data_files, source.revision)
    if not fields.get("dataset_path"):
        raise DataError(f"the task {source.task!r} names no data set; give dataset_path")
    own = task_location(fields, file)
    name, revision = source.dataset_name or own.name, source.revision or own.revision
    if source.data_files:
        return Location(own.path, name, source.data_files, revision)
    return Location(own.path, name, own.data_files, revision, own.base)


def check_sources(sources: Sequence[Source]) -> None:
    """Find out before a model is loaded whether the sources' data sets can be had; else DataError, with remedies."""
    for source in sources:
        check_reachable(location_of(source))


def refuse_overlap(sources: Sequence[Source], scored: Mapping[str, Origin]) -> None:
    """Refuse, by DataError, search data that a benchmark scores; ``scored``: benchmark → the data that it scores."""
    for source in sources:
        ours = Origin.of(location_of(source), source.split)
        for benchmark, theirs in scored.items():
            if ours.overlaps(theirs):
                raise DataError(
                    f"the search data {source.label!r} ({ours.text}) is what the benchmark {benchmark!r} scores; a "
                    "strategy must not be searched on the samples that judge it: take another split "
                    "(train or validation) in data.sources, or leave the benchmark out"
                )


class DatasetPool:
    """A split of a Hugging Face data set, by columns; samples by row number, whose ids name source, split and row."""

    def __init__(self, source: DatasetSource) -> None:
        self.label, self._source = source.label, source
        self._table = load_table(location_of(source), source.split)
        columns = {name: getattr(source, name) for name in ("image", "question", "answer", "id", "family")}
        need_columns(self._table, columns, f"the data set {source.path!r}")
        if source.id is not None:
            names = Counter(self._table[source.id])
            twice = [name for name, count in names.items() if count > 1]
            if twice:
                raise DataError(
                    f"the column {source.id!r} of {source.path!r} has {twice[0]!r} {names[twice[0]]} times, but `id` "
                    "must tell samples apart; name another column, or leave `id` out: rows are numbered then"
                )

    def __len__(self) -> int:
        return len(self._table)

    def sample(self, row: int) -> Sample:
        """The sample of a row."""
        source, doc = self._source, self._table[row]
        name = str(row if source.id is None else doc[source.id])
        where = f"{self.label}/{source.split}/{name}"
        fields = {column: value for column, value in doc.items() if column != source.image}
        try:
            question = source.prompt.format(**{**fields, "question": doc[source.question]})
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"the prompt {source.prompt!r} cannot be filled ({error!r}); the columns are {sorted(fields)}"
            ) from error
        return Sample(
            id=where,
            image=read_image(doc[source.image], where),
            question=without_places(question),
            answers=accepted_answers(doc[source.answer], where),
            family=self.label if source.family is None else str(doc[source.family]),
        )


class TaskPool:
    """A split of an lmms-eval task's data set, through the task's own code; else as :class:`DatasetPool`."""

    def __init__(self, source: TaskSource) -> None:
        self.label, self._source = source.label, source
        refuse_overlap([source], {source.label: scored_origin(source.task)})
        where = location_of(source)
        table = load_table(where, source.split)
        self._task = task_on(source.task, table, source.split, run_process_docs=source.images is None)
        self._table: Dataset = self._task.task_docs
        self._images: Dataset | None = None
        self._image_rows: dict[Any, int] = {}
        if source.images is not None:
            images = Location(where.path, source.images.dataset_name, revision=where.revision)
            self._images = load_table(images, source.images.split)
            need_columns(self._table, {"images.key": source.images.key}, f"the data set {where.path!r}")
            needed = {"images.id": source.images.id, "images.image": source.images.image}
            need_columns(self._images, needed, f"the images {source.images.dataset_name!r} of {where.path!r}")
            self._image_rows = {name: row for row, name in enumerate(self._images[source.images.id])}
        need_columns(self._table, {"target": source.target}, f"the data set {where.path!r}")

    def __len__(self) -> int:
        return len(self._table)

    def sample(self, row: int) -> Sample:
        """The sample of a row."""
        where = f"{self.label}/{self._source.split}/{row}"
        doc = dict(self._table[row])
        join = self._source.images
        if join is not None and self._images is not None:
            if doc[join.key] not in self._image_rows:
                raise DataError(f"{where}: there is no image {doc[join.key]!r} among {join.dataset_name!r}")
            doc[join.image] = self._images[self._image_rows[doc[join.key]]][join.image]
        visuals = self._task.doc_to_visual(doc) or []
        if len(visuals) != 1:
            raise DataError(f"{where}: a sample has exactly one image, but {self._source.task!r} gives {len(visuals)}")
        question = str(self._task.doc_to_text(doc)).replace(IMAGE_PLACE, "").strip()
        return Sample(
            id=where,
            image=read_image(visuals[0], where),
            question=question,
            answers=accepted_answers(self._target(doc), where),
            family=self.label,
        )

    def _target(self, doc: dict[str, Any]) -> Any:
        """What the task calls the target; several VQA tasks name a column that is not there and score ``answers``."""
        named = self._task.config.doc_to_target
        if self._source.target is not None:
            return doc[self._source.target]
        if isinstance(named, str) and named not in doc and "{" not in named:
            if "answers" in doc:
                return doc["answers"]
            raise DataError(
                f"the task {self._source.task!r} names the target {named!r}, but its data has only {sorted(doc)}; "
                "set target=COLUMN in the source"
            )
        target = self._task.doc_to_target(doc)
        if isinstance(target, int) and self._task.config.doc_to_choice is not None:
            return self._task.doc_to_choice(doc)[target]
        return target


Pool = DatasetPool | TaskPool


def accepted_answers(value: Any, where: str) -> tuple[str, ...]:
    """Accepted answers, each once and the most frequent first, from a text, number or list; DataError without any."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    texts = [str(item["answer"] if isinstance(item, dict) and "answer" in item else item) for item in items]
    answers = tuple(text for text, _ in Counter(text for text in texts if text.strip()).most_common())
    if not answers or value is None:
        raise DataError(f"{where} has no answer; drop the row, or name another column (answer or target)")
    return answers
