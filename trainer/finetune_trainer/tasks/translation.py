"""Translation: a text and the same in another language."""

from finetune_trainer.tasks.seq2seq import Seq2Seq


class Translation(Seq2Seq):
    """Rows with a source and a target. What needs no model is the source as it is."""

    roles = ("source", "target")

    def trivial(self, source: str) -> str:
        return source

    def prefixes(self) -> list[str]:
        task = self.config.task
        return [f"translation_{task.source_language}_to_{task.target_language}"]
