"""Progress of a multi-part download on stderr: one updated line on a terminal, one line per part in a script."""

from __future__ import annotations

from types import TracebackType


class Transfer:
    """A progress bar over all parts.

    Args:
        total_bytes: size of all parts.
    """

    def __init__(self, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._plain = not self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, disable=self._plain, transient=True)
        self._task = self._bar.add_task("", total=total_bytes)
        self._before_bytes = 0

    def __enter__(self) -> Transfer:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, title: str, size_bytes: int) -> None:
        """Start a part.

        Args:
            title: description of the part.
            size_bytes: size of the part.
        """
        self._bar.update(self._task, description=title)
        if self._plain:
            line = f"fetching {title}, {size_bytes / 1e6:,.0f} MB"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def update(self, so_far_bytes: int) -> None:
        """Show the bytes of the part downloaded so far."""
        self._bar.update(self._task, completed=self._before_bytes + so_far_bytes)

    def end(self, size_bytes: int) -> None:
        """Finish a part of ``size_bytes`` bytes."""
        self._before_bytes += size_bytes
        self.update(0)
