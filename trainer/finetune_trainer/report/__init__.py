"""report.html: one file that says what was trained, how good it is and how sure that is. Opens with no network."""

from finetune_trainer.report.page import Errors, Mistake, Report, page

__all__ = ["Errors", "Mistake", "Report", "page"]
