"""Starting the parts of one server, each on its own: what fails is left stock, and remembered with the reason.

Covers: :class:`Parts`. See also: :mod:`dask_gpurt.seams` for what is checked before a part is started.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dask_gpurt import seams
from dask_gpurt.installation import PartStatus

if TYPE_CHECKING:
    from dask_gpurt.config import Settings

__all__ = ["LEFT_OUT", "Parts"]

logger = logging.getLogger(__name__)

#: What is said of a part that was not asked for.
LEFT_OUT = "left out"


class Parts:
    """The status of each part on one scheduler or worker.

    Parameters
    ----------
    side
        ``"scheduler"`` or ``"worker"``.
    server
        The scheduler or worker itself; its seams are checked.
    settings
        Which parts are enabled.
    """

    def __init__(self, side: seams.Side, server: object, settings: Settings) -> None:
        self._side = side
        self._server = server
        self._settings = settings
        #: Part to its status; a part that was not tried has no entry.
        self.statuses: dict[str, PartStatus] = {}

    def startable(self, part: str) -> bool:
        """Whether ``part`` is enabled and finds what it needs in this version of Dask."""
        refusal = self.refusal(part)
        if refusal is None:
            return True
        if refusal != LEFT_OUT:
            logger.warning("dask-gpurt: %s is left stock on this %s: %s", part, self._side, refusal)
        self.statuses[part] = PartStatus(False, refusal)
        return False

    def refusal(self, part: str) -> str | None:
        """Say why ``part`` is not even tried; None: it is."""
        if not self._settings.enabled(part):
            return LEFT_OUT
        if libraries := seams.lacking(part, self._side):
            return f"not installed: {', '.join(libraries)}"
        problems = seams.broken(part, self._side, self._server)
        return "Dask has changed: " + "; ".join(problems) if problems else None

    @contextlib.contextmanager
    def starting(self, part: str) -> Iterator[None]:
        """Note that ``part`` is installed once the block has ended, or why it is not."""
        try:
            yield
        except Exception as error:
            # Any error at all: whatever keeps a part from starting must not keep the server from working. It is
            # logged with its traceback here, and told to the user by the answer of install.
            logger.exception("dask-gpurt: %s is left stock on this %s", part, self._side)
            self.statuses[part] = PartStatus(False, f"{type(error).__name__}: {error}")
        else:
            self.statuses[part] = PartStatus(True)

    def remark(self, part: str, text: str) -> None:
        """Say more about a part that is installed."""
        self.statuses[part] = PartStatus(True, text)
