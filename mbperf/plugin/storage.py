"""pytest-benchmark's file storage, its files written lean: one row a line, each digit with a meaning."""

from typing import Any

from pytest_benchmark.storage.file import FileStorage

from mbperf.report.lean import read_later, text


class LeanStorage(FileStorage):  # type: ignore[misc]  # pytest-benchmark has no types
    """What `storage` is, saving lean records."""

    def __init__(self, storage: FileStorage) -> None:
        """Take over the folder of a storage."""
        super().__init__(storage.path, storage.logger, storage.default_machine_id)

    def save(self, output_json: dict[str, Any], save: str) -> None:
        """Write a run under the next number, as the base class would."""
        file = self.get(f"{self._next_num}_{save}.json")
        file.write_text(text(read_later(output_json)), encoding="utf-8")
        self.logger.info(f"Saved benchmark data in: {file}")
