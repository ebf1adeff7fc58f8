"""Lines of the log, without the secrets that a library or an address may have brought into them."""

import logging
import sys
import traceback
from pathlib import Path
from types import TracebackType

from finetune_trainer.lastmessage import scrub, secrets_of


class Scrubbed(logging.Formatter):
    """Credentials that are renewed while a run goes on are hidden, too, and so are those before."""

    def __init__(self, form: str, credentials: Path | None) -> None:
        super().__init__(form)
        self._credentials = credentials
        self._seen: set[str] = set()

    def format(self, record: logging.LogRecord) -> str:
        return self.hidden(super().format(record))

    def hidden(self, text: str) -> str:
        self._seen |= secrets_of(self._credentials)
        return scrub(text, self._seen)


def begin(form: str, credentials: Path | None) -> None:
    """Log to the standard error from INFO on; what ends the process unexpectedly is told there as well."""
    formatter, handler = Scrubbed(form, credentials), logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            sys.stderr.write(formatter.hidden("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = told
